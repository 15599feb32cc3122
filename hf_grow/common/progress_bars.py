"""Progress bars that fit one line at any width, and progress lines where stderr is not a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

LOG_INTERVAL = 30.0
"""Seconds between two progress lines."""


def progress_bar(console: Any, *counts: Any, details: bool = False) -> Any:
    """A rich Progress with label, bar, ``counts`` (column classes) and remaining time, which keep their width.

    ``details``: also shows the task field `details`, cut to the space that is left.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    whole = Column(no_wrap=True)
    columns: list[Any] = [TextColumn("{task.description}", table_column=whole), BarColumn(None, table_column=Column(ratio=1, min_width=4))]
    columns += [count(table_column=Column(no_wrap=True, justify="right")) for count in counts]
    columns.append(TimeRemainingColumn(table_column=Column(no_wrap=True)))
    if details:
        columns.append(TextColumn("{task.fields[details]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=4)))
    return Progress(*columns, console=console, transient=True, expand=True)


class TokenProgress:
    """Called with the number of tokens just completed; `within` reports progress inside the current batch. This base class shows nothing."""

    def __call__(self, tokens: int) -> None:
        pass

    def within(self, step: int, of: int) -> None:
        pass


@contextmanager
def token_progress(label: str, total: int, *, console: Any = None, note: Callable[[str], None]) -> Iterator[TokenProgress]:
    """Progress over `total` tokens: bars on stderr, or where it is not a terminal a line through ``note`` every LOG_INTERVAL seconds."""
    if not sys.stderr.isatty():
        yield _Lines(label, total, note)
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn

    with progress_bar(console or Console(stderr=True), MofNCompleteColumn) as drawn:
        yield _Bars(drawn, label, total)


class _Bars(TokenProgress):
    def __init__(self, drawn: Any, label: str, total: int) -> None:
        self.drawn, self.total, self.batch = drawn, drawn.add_task(f"{label}, tokens", total=total), None

    def __call__(self, tokens: int) -> None:
        self.drawn.advance(self.total, tokens)
        if self.batch is not None:
            self.drawn.remove_task(self.batch)
            self.batch = None

    def within(self, step: int, of: int) -> None:
        if self.batch is None:
            self.batch = self.drawn.add_task("this batch", total=of)
        self.drawn.update(self.batch, completed=step, total=of)


class _Lines(TokenProgress):
    def __init__(self, label: str, total: int, note: Callable[[str], None]) -> None:
        self.label, self.total, self.note, self.done, self.logged_at = label, total, note, 0, time.monotonic()

    def __call__(self, tokens: int) -> None:
        self.done += tokens
        self._log("")

    def within(self, step: int, of: int) -> None:
        self._log(f"; this batch: token {step:,} of at most {of:,}")

    def _log(self, more: str) -> None:
        if time.monotonic() - self.logged_at >= LOG_INTERVAL:
            self.logged_at = time.monotonic()
            self.note(f"{self.label}: {self.done:,} of {self.total:,} tokens{more}")
