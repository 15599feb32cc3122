"""Terminal output of plans, candidates and progress."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from hf_grow.checkpoint.writer import Progress
from hf_grow.common.progress_bars import TokenProgress, progress_bar, token_progress
from hf_grow.errors import printable
from hf_grow.methods import starting_loss as starting
from hf_grow.model.param_count import count_parameters, format_count
from hf_grow.publish.layer_map import layer_ranges
from hf_grow.publish.size_table import size_rows

if TYPE_CHECKING:
    from hf_grow.growth.growth import CandidateTable
    from hf_grow.growth.plan import GrowthPlan

MAX_CHARACTERS = 4_000
"""Of one piece of text: enough for a list of all layers of a large model."""


class Screen(Console):
    """A console for values from untrusted files: all text goes through `printable`, so that only rich's own control codes reach the terminal."""

    def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text, MAX_CHARACTERS), segment.style)


# No markup: names of folders, files and tensors may contain brackets and colons.
console = Screen(highlight=False, soft_wrap=True, markup=False, emoji=False)
notes = Screen(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)


def note(message: str) -> None:
    notes.print(message, style="dim", markup=False)


def plan_facts(plan: GrowthPlan) -> dict[str, Any]:
    """The plan as JSON data, for --json."""
    old, new = plan.sizes
    return {
        "method": plan.growth.method,
        "options": dict(plan.growth.options),
        "source": plan.source.ref,
        "revision": plan.source.revision,
        "layers": [plan.source.architecture.layers, plan.architecture.layers],
        "layer_map": [list(o.sources) for o in plan.growth.layers],
        "parameters": [old.total, new.total],
        "active_parameters": [old.active, new.active],
        "bytes": [plan.source.nbytes, plan.nbytes],
        "further_sources": {
            label: {"source": o.ref, "revision": o.revision, "parameters": count_parameters(o.architecture).total, "bytes": o.nbytes}
            for label, o in plan.source.donors.items()
        },
        "flops_per_token": [old.flops, new.flops],
        "kv_values_per_token": [old.kv_values, new.kv_values],
        "guarantee": plan.guarantee.kind,
        "because": plan.guarantee.because,
        "starting_loss": asdict(start) | {"model": starting.MODEL}
        if (start := starting.nearest_starting_loss(plan.growth, plan.source.architecture))
        else None,
        "dropped": dict(plan.growth.dropped),
        "warnings": list(plan.growth.warnings),
    }


def show_plan(plan: GrowthPlan) -> None:
    """Prints the table of a plan, its layers, guarantee and warnings."""
    old, new = plan.sizes
    a, b = plan.source.architecture, plan.architecture
    table = Table(title=f"{plan.growth.method}: {plan.source.refs}", title_justify="left", title_style="bold")
    for column in ("", "source", "target"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("layers", str(a.layers), str(b.layers))
    table.add_row("parameters", format_count(old.total), format_count(new.total))
    for row in size_rows(plan):
        table.add_row(*row)
    console.print(table)
    console.print(f"layers     {layer_ranges(plan.growth.layers)}", markup=False)
    copies = len(plan.copies())
    console.print(f"tensors    {len(plan.targets)}: {copies} copied byte for byte, {len(plan.targets) - copies} computed")
    style = "green" if plan.guarantee.lossless else "yellow"
    console.print(Text.assemble("guarantee  ", (plan.guarantee.kind, style), f": {plan.guarantee.because}"))
    if start := starting.nearest_starting_loss(plan.growth, a):
        console.print(f"start      {start} (one model: guidance only)", style="yellow", markup=False)
    reasons: dict[str, list[str]] = {}
    for name, reason in plan.growth.dropped.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        console.print(f"dropped    {len(names)} tensors: {reason}", markup=False)
    for warning in plan.growth.warnings:
        console.print(f"warning    {warning}", style="yellow", markup=False)


def show_candidates(candidates: CandidateTable) -> None:
    """Prints the sizes that a method ranked, the chosen one in bold."""
    table = Table(title=candidates.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", *candidates.columns):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_row("now", *candidates.source)
    for number, cells in enumerate(candidates.rows, 1):
        table.add_row(str(number), *cells, style="bold" if number == candidates.chosen else "")
    console.print(table)
    console.print(candidates.hint, style="dim")


@contextmanager
def bytes_bar(label: str, total: int, *, quiet: bool, then: str = "") -> Iterator[Progress]:
    """A progress bar on stderr with bytes per second and the time left; nothing where stderr is not a terminal.

    ``then``: the description after the last byte, if the work goes on.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda nbytes: None
        return
    from rich.progress import DownloadColumn, TransferSpeedColumn

    with progress_bar(notes, DownloadColumn, TransferSpeedColumn) as drawn:
        task = drawn.add_task(label, total=total)

        def progress(nbytes: int) -> None:
            drawn.advance(task, nbytes)
            if then and drawn.tasks[task].finished:
                drawn.reset(task, description=then, total=None)

        yield progress


@contextmanager
def tokens_bar(label: str, total: int, *, quiet: bool) -> Iterator[TokenProgress]:
    """A progress bar on stderr that counts tokens; where stderr is not a terminal, a line now and then."""
    if quiet:
        yield TokenProgress()
        return
    with token_progress(label, total, console=notes, note=note) as progress:
        yield progress
