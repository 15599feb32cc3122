"""Standard output with --json: one object, whatever libraries print beside it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def json_alone(asked: bool) -> Iterator[None]:
    """What is written to file descriptor 1 past sys.stdout goes to standard error meanwhile: tokenizers, which is no Python, prints there."""
    own = sys.stdout
    try:
        kept = os.dup(1) if asked and own is not None and own.fileno() == 1 else -1
    except (OSError, ValueError):  # no file behind it, or a closed one
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
            with suppress(OSError):  # told already
                alone.close()
