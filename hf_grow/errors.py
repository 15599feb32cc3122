"""The exceptions of hf-grow and their exit statuses.

    GrowError                    exit status 1: the work failed
    ├── InputError               exit status 2: invalid input
    │   ├── SourceError          the source checkpoint is missing, damaged, malicious or of an unsupported family
    │   ├── PlanError            the requested growth is impossible or misses its target
    │   └── OutputError          the output exists, cannot be written, or the disk is full
    ├── ExecutionError           writing failed; the partial folder remains and can be resumed
    └── VerificationError        the result differs from the plan

``message`` says what is wrong, what was found and what is allowed; ``hint`` says what to do next. Both may quote untrusted files, so they are
made safe to print (`printable`) and bounded here.
"""

from __future__ import annotations

import unicodedata

MAX_COLUMNS, MAX_LINES = 1_000, 60
"""Limits of one message: characters per line, and lines."""


def printable(text: str, columns: int = MAX_COLUMNS) -> str:
    """`text` without control characters, format characters and lone surrogates (ESC becomes \\x1b), long lines shortened in the middle."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() or c == "\n" or unicodedata.category(c) == "Zs" else escape(c) for c in text)
    if len(text) <= columns:
        return text
    half = (columns - 5) // 2
    return "\n".join(line if len(line) <= columns else f"{line[:half]} ... {line[-half:]}" for line in text.split("\n"))


def escape(character: str) -> str:
    """A character as a Python escape sequence."""
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _bounded(message: str) -> str:
    lines = printable(message).split("\n")
    more = len(lines) - MAX_LINES
    return "\n".join(lines if more <= 0 else [*lines[:MAX_LINES], f"  ... and {more} more lines"])


class GrowError(Exception):
    """Base of all errors that users see; the command line prints them without a traceback and exits with `exit_code`."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        self.message, self.hint = _bounded(message), _bounded(hint)
        super().__init__(self.message)

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class InputError(GrowError):
    """Invalid input: options, recipes, files or folders."""

    exit_code = 2


class SourceError(InputError):
    """The source checkpoint is missing, damaged, malicious or of an unsupported family."""


class PlanError(InputError):
    """The requested growth is impossible or misses its target."""


class OutputError(InputError):
    """The output exists, cannot be written, or does not fit on its disk."""


class ExecutionError(GrowError):
    """Writing failed; the partial folder remains and can be resumed."""


class VerificationError(GrowError):
    """The result differs from the plan or from what its guarantee promises."""
