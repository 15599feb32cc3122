"""Progress bars: one line that fits, whatever the width. What counts (how far, how long yet) keeps its room, the bar and the facts share the rest."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

EVERY = 30.0
"""Seconds between two lines of progress in a file."""


def bar(console: Any, *counts: Any, facts: bool = False) -> Any:
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


@contextmanager
def counting(label: str, total: int, *, console: Any = None, note: Callable[[str], None]) -> Iterator[Callable[[int], None]]:
    """A bar on stderr that counts tokens; where stderr is no terminal, a line by ``note`` now and then."""
    if not sys.stderr.isatty():
        yield _lines(label, total, note)
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn

    with bar(console or Console(stderr=True), MofNCompleteColumn) as drawn:
        task = drawn.add_task(f"{label}, tokens", total=total)
        yield lambda tokens: drawn.advance(task, tokens)


def _lines(label: str, total: int, note: Callable[[str], None]) -> Callable[[int], None]:
    done, told = 0, time.monotonic()

    def progress(tokens: int) -> None:
        nonlocal done, told
        done += tokens
        if time.monotonic() - told >= EVERY:
            told = time.monotonic()
            note(f"{label}: {done:,} of {total:,} tokens")

    return progress
