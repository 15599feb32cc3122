"""With --json, standard output holds one JSON object and nothing that libraries print."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def only_json_on_stdout(asked: bool) -> Iterator[None]:
    """Redirects file descriptor 1 to standard error, except for sys.stdout itself: native code such as tokenizers prints there."""
    own = sys.stdout
    try:
        kept = os.dup(1) if asked and own is not None and own.fileno() == 1 else -1
    except (OSError, ValueError):  # not a file, or closed
        kept = -1
    if kept < 0:
        yield
        return
    with os.fdopen(os.dup(kept), "w", encoding=own.encoding, errors="backslashreplace") as alone:
        with suppress(OSError):  # no standard error
            os.dup2(2, 1)
        sys.stdout = alone
        try:
            yield
        finally:
            sys.stdout = own
            os.dup2(kept, 1)
            os.close(kept)
            with suppress(OSError):  # reported already
                alone.close()
