"""Pairs of options: whether each of them changes the outcome."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

Outcome = Any
REFUSED = "refused"


def unheard(outcome: Callable[[Mapping[str, Any]], Outcome], given: Mapping[str, Any], samples: Mapping[str, list[Any]]) -> list[str]:
    """The options of `given` that are neither heard nor refused."""
    here = outcome(given)
    if here == REFUSED:
        return []

    def otherwise(name: str) -> Iterator[Mapping[str, Any]]:
        yield from ({**given, name: value} for value in samples[name] if value != given[name])
        yield {k: v for k, v in given.items() if k != name}

    return [name for name in given if all(outcome(other) == here for other in otherwise(name))]


def words(options: Mapping[str, Any], place: Path) -> list[str]:
    out: list[str] = []
    for name, value in options.items():
        out += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value).format(tmp=place)])]
    return out
