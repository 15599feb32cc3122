"""Results files: records in JSON Lines that survive a crash, Markdown tables, and the command line that made them."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file, none if it does not exist; a line cut short by a crash is left out."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Writes a line of its own, also after one that was cut short."""
    cut_short = path.is_file() and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * cut_short + json.dumps(record) + "\n")


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """Its lines; the first ``left`` columns are aligned left, the others right."""
    rule = "|---" * left + "|---:" * (len(columns) - left) + "|"
    return [f"| {' | '.join(columns)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)]


def markdown_list(facts: Mapping[str, str]) -> list[str]:
    return [f"- {name}: {value}" for name, value in facts.items()]


def command_line(script: str, arguments: argparse.Namespace, names: Sequence[str]) -> str:
    """The command again, with those of its arguments that are set; a path is left out of it, since it names a place on this machine."""
    words = ["python", f"benchmarks/{script}.py"]
    for name in names:
        value, flag = getattr(arguments, name), "--" + name.replace("_", "-")
        if value is True or isinstance(value, Path):
            words.append(flag)
        elif isinstance(value, list):
            words += [flag, *value]
        elif value not in (None, False, ""):
            words += [f"{flag}={value}"] if str(value).startswith("-") else [flag, str(value)]
    return shlex.join(words)
