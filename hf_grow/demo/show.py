"""What the demo prints while it works: a headline for each stage with its time, and one line of progress for each training."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import environ

from rich.console import Console
from rich.text import Text

from hf_grow.errors import ExecutionError

STAGES = 6
_INDENT = "    "

Progress = Callable[[int, float | None], None]
"""Called with the step, and with the held-out loss where it was just taken."""


class Clock:
    """Seconds a stage took; set when the stage is over."""

    seconds = 0.0


@contextmanager
def stage(console: Console, number: int, title: str) -> Iterator[Clock]:
    console.print(f"\n[bold cyan]{number}/{STAGES}[/] [bold]{title}[/]")
    clock, start = Clock(), time.perf_counter()
    yield clock
    clock.seconds = time.perf_counter() - start
    say(console, f"{clock.seconds:.1f} s", style="dim")


def say(console: Console, text: str, style: str = "") -> None:
    console.print(_INDENT + text, style=style, markup=False)


@contextmanager
def training(console: Console, steps: int) -> Iterator[Progress]:
    """A bar that goes away on a terminal; a line at each quarter elsewhere (a log file, CI)."""
    loss = float("nan")  # until the first evaluation, before the first step
    if not console.is_terminal:
        quarters = {0, *(steps * q // 4 for q in range(1, 5))}

        def report(step: int, new: float | None) -> None:
            nonlocal loss
            loss = loss if new is None else new
            if new is not None and step in quarters:
                say(console, f"step {step:>4}/{steps}   held-out loss {loss:.3f}")

        yield report
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn(_INDENT + "training"), BarColumn(), MofNCompleteColumn(), TextColumn("held-out loss {task.fields[loss]:.3f}"))
    with Bar(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task("", total=steps, loss=loss)

        def advance(step: int, new: float | None) -> None:
            bar.update(task, completed=step)
            if new is not None:
                bar.update(task, loss=new)

        yield advance


def command(console: Console, *words: str) -> None:
    """Runs `hf-grow WORDS` exactly as typed, and prints the line and what it printed. Raises ExecutionError where it fails."""
    console.print(f"{_INDENT}$ hf-grow {' '.join(words)}", style="green", markup=False)
    # Its table takes the room left of the indent; colours only where we have a terminal ourselves.
    env = {**environ, "COLUMNS": str(max(console.width - len(_INDENT), 60))}
    if console.is_terminal:
        env["FORCE_COLOR"] = "1"
    done = subprocess.run([sys.executable, "-m", "hf_grow", *words], stdout=subprocess.PIPE, text=True, encoding="utf-8", env=env)
    for line in done.stdout.splitlines():
        console.print(Text.from_ansi(_INDENT + line))
    if done.returncode:
        raise ExecutionError(f"hf-grow {words[0]} failed with exit status {done.returncode}.", hint="Its own message is above.")
