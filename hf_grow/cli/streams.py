"""With --json, standard output holds one JSON object and nothing that libraries print."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def only_json_on_stdout(enabled: bool) -> Iterator[None]:
    """Redirects file descriptor 1 to standard error, except for sys.stdout itself: native code such as tokenizers prints there."""
    stdout = sys.stdout
    try:
        saved = os.dup(1) if enabled and stdout is not None and stdout.fileno() == 1 else -1
    except (OSError, ValueError):  # not a file, or closed
        saved = -1
    if saved < 0:
        yield
        return
    with os.fdopen(os.dup(saved), "w", encoding=stdout.encoding, errors="backslashreplace") as json_stdout:
        with suppress(OSError):  # no standard error
            os.dup2(2, 1)
        sys.stdout = json_stdout
        try:
            yield
        finally:
            sys.stdout = stdout
            os.dup2(saved, 1)
            os.close(saved)
            with suppress(OSError):  # reported already
                json_stdout.close()
