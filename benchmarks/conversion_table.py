"""The table of `conversion.py`, for the terminal and as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from measure import Usage
from results_file import markdown_list, markdown_table
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Row:
    name: str
    seconds: Sequence[float]
    runs: Sequence[Usage] = ()


COLUMNS = ("", "seconds (min to max)", "x cp (fastest)", "x cp + sync (fastest)", "CPU s", "peak RSS", "anonymous", "from disk")


def cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Medians over the repeats, ratios of medians and of the fastest runs, and the highest peaks. The first row is cp, the second cp and sync."""
    table = []
    for row in rows:
        middle = statistics.median(row.seconds)
        spread = f"{middle:.2f} ({min(row.seconds):.2f} to {max(row.seconds):.2f})"
        line = [row.name, spread]
        for base in rows[:2]:
            line.append(f"{middle / statistics.median(base.seconds):.2f} ({min(row.seconds) / min(base.seconds):.2f})")
        if row.runs:
            line += [
                f"{statistics.median(u.cpu for u in row.runs):.2f}",
                f"{max(u.peak for u in row.runs) / 1e6:.0f} MB",
                f"{max(u.anonymous for u in row.runs) / 1e6:.0f} MB",
                f"{statistics.median(u.disk_read for u in row.runs) / 1e9:.2f} GB",
            ]
        table.append((*line, *[""] * (len(COLUMNS) - len(line))))
    return table


def show(rows: Sequence[Row], facts: Mapping[str, str], title: str) -> None:
    table = Table(title=title, title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="right" if column else "left")
    for line in cells(rows):
        table.add_row(*line)
    console = Console(highlight=False)
    console.width = max(console.width, 160)
    console.print(table)
    for name, value in facts.items():
        console.print(f"{name}: {value}", markup=False, soft_wrap=True)


def markdown(rows: Sequence[Row], facts: Mapping[str, str], title: str) -> str:
    return "\n".join([f"# {title}", "", *markdown_table(COLUMNS, cells(rows)), "", *markdown_list(facts), ""])
