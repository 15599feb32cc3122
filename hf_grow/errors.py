"""Everything hf-grow raises on purpose.

    GrowError                    exit status 1: the work failed
    ├── InputError               exit status 2: what the user gave cannot be used
    │   ├── SourceError          the source checkpoint is missing, damaged, hostile or of no known family
    │   ├── PlanError            the growth asked for is impossible, or misses its target
    │   └── OutputError          the output exists, cannot be written, or has no room
    ├── ExecutionError           writing went wrong half-way (the partial folder stays, and can be resumed)
    └── VerificationError        the result is not what the plan says

A message says what is wrong, what was found, what is allowed; ``hint`` says what to do next. Values in it come from files of unknown origin,
so `shown` makes every message fit to be read, in one place.
"""

from __future__ import annotations

import unicodedata

MAX_COLUMNS, MAX_LINES = 1_000, 60
"""The longest line, and the most lines, of one message."""


def printable(text: str, columns: int = MAX_COLUMNS) -> str:
    """`text` as a terminal may show it: no control, format or half characters (ESC becomes \\x1b), and long lines without their middle."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() or c == "\n" or unicodedata.category(c) == "Zs" else escape(c) for c in text)
    if len(text) <= columns:
        return text
    half = (columns - 5) // 2
    return "\n".join(line if len(line) <= columns else f"{line[:half]} ... {line[-half:]}" for line in text.split("\n"))


def escape(character: str) -> str:
    """A character by its number, as Python writes it."""
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _bounded(message: str) -> str:
    lines = printable(message).split("\n")
    more = len(lines) - MAX_LINES
    return "\n".join(lines if more <= 0 else [*lines[:MAX_LINES], f"  ... and {more} more lines"])


class GrowError(Exception):
    """Base of all errors a user may see; the command line prints it without a traceback."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        self.message, self.hint = _bounded(message), _bounded(hint)
        super().__init__(self.message)

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class InputError(GrowError):
    exit_code = 2


class SourceError(InputError):
    pass


class PlanError(InputError):
    pass


class OutputError(InputError):
    pass


class ExecutionError(GrowError):
    pass


class VerificationError(GrowError):
    pass
