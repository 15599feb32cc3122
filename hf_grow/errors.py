"""Everything hf-grow raises on purpose.

    GrowError                    exit status 1: the work failed
    ├── InputError               exit status 2: what the user gave cannot be used
    │   ├── SourceError          the source checkpoint is missing, damaged, hostile or of no known family
    │   ├── PlanError            the growth asked for is impossible, or misses its target
    │   └── OutputError          the output exists, cannot be written, or has no room
    ├── ExecutionError           writing went wrong half-way (the partial folder stays, and can be resumed)
    └── VerificationError        the result is not what the plan says

A message says what is wrong, what was found, what is allowed; ``hint`` says what to do next.
"""

from __future__ import annotations


class GrowError(Exception):
    """Base of all errors a user may see; the command line prints it without a traceback."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

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
