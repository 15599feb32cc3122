"""Progress bars: one line that fits, whatever the width. What counts (how far, how long yet) keeps its room, the bar and the facts share the rest."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

LOG_INTERVAL = 30.0
"""Seconds between two lines of progress in a file."""


def progress_bar(console: Any, *counts: Any, facts: bool = False) -> Any:
    """A rich Progress of a label, the bar, ``counts`` (classes of columns) and the time left; with ``facts`` also the text of that field of a task, as far as it fits."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    whole = Column(no_wrap=True)
    columns: list[Any] = [TextColumn("{task.description}", table_column=whole), BarColumn(None, table_column=Column(ratio=1, min_width=4))]
    columns += [count(table_column=Column(no_wrap=True, justify="right")) for count in counts]
    columns.append(TimeRemainingColumn(table_column=Column(no_wrap=True)))
    if facts:
        columns.append(TextColumn("{task.fields[facts]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=4)))
    return Progress(*columns, console=console, transient=True, expand=True)


class TokenProgress:
    """Called with tokens that are done; `within` with how far the piece of work is that is under way. This one shows nothing."""

    def __call__(self, tokens: int) -> None:
        pass

    def within(self, step: int, of: int) -> None:
        pass


@contextmanager
def token_progress(label: str, total: int, *, console: Any = None, note: Callable[[str], None]) -> Iterator[TokenProgress]:
    """A bar on stderr that counts tokens, and a second one for what is under way; where stderr is no terminal, a line by ``note`` now and then."""
    if not sys.stderr.isatty():
        yield _Lines(label, total, note)
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn

    with progress_bar(console or Console(stderr=True), MofNCompleteColumn) as drawn:
        yield _Bars(drawn, label, total)


class _Bars(TokenProgress):
    def __init__(self, drawn: Any, label: str, total: int) -> None:
        self.drawn, self.whole, self.piece = drawn, drawn.add_task(f"{label}, tokens", total=total), None

    def __call__(self, tokens: int) -> None:
        self.drawn.advance(self.whole, tokens)
        if self.piece is not None:
            self.drawn.remove_task(self.piece)
            self.piece = None

    def within(self, step: int, of: int) -> None:
        if self.piece is None:
            self.piece = self.drawn.add_task("this batch", total=of)
        self.drawn.update(self.piece, completed=step, total=of)


class _Lines(TokenProgress):
    def __init__(self, label: str, total: int, note: Callable[[str], None]) -> None:
        self.label, self.total, self.note, self.done, self.told = label, total, note, 0, time.monotonic()

    def __call__(self, tokens: int) -> None:
        self.done += tokens
        self._tell("")

    def within(self, step: int, of: int) -> None:
        self._tell(f"; this batch: token {step:,} of at most {of:,}")

    def _tell(self, more: str) -> None:
        if time.monotonic() - self.told >= LOG_INTERVAL:
            self.told = time.monotonic()
            self.note(f"{self.label}: {self.done:,} of {self.total:,} tokens{more}")
