"""One axis grown: which source coordinate each target coordinate comes from, and the gains of the dual pair.

Activations of a space map by x' = A x, their gradients by g' = B g, with B^T A = I (then every map built from them is exact).
Both have one nonzero a row, at the same place, so an AxisMap is a list of runs

    Run(start, length, a, b)      target rows take source rows start, start+1, ... with gain a in A and b in B
    Run(None, length, 0, 0)       target rows outside the range of A

and executing one is a few slice copies. Tile, zero pad, uneven split, whole heads and single duplicated neurons are all run lists.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from hf_grow.growth.tensormap import Quantity


@dataclass(frozen=True)
class AxisRun:
    start: int | None
    length: int
    a: float = 1.0
    b: float = 1.0

    def gain(self, role: Literal["out", "in"], quantity: Quantity) -> float:
        """Gain applied to `quantity` by a dimension of `role`: weights W' = A W B^T, gradients G' = B G A^T, grad2 squared."""
        gain = self.a if (role == "out") == (quantity == "weight") else self.b
        return gain * gain if quantity == "grad2" else gain


@dataclass(frozen=True)
class AxisMap:
    source_size: int
    runs: tuple[AxisRun, ...]
    dual: bool = True
    """Whether this grows an activation space, so that B^T A = I is expected; maps that only place or cut values are not."""

    def __post_init__(self) -> None:
        for run in self.runs:
            if run.length <= 0 or (run.start is not None and not 0 <= run.start <= self.source_size - run.length):
                raise ValueError(f"{run} lies outside an axis of {self.source_size}")

    @cached_property
    def target_size(self) -> int:
        return sum(r.length for r in self.runs)

    def rows(self) -> Iterator[tuple[int | None, float, float]]:
        """(source, a, b) of every target coordinate."""
        for r in self.runs:
            for i in range(r.length):
                yield (None if r.start is None else r.start + i), r.a, r.b

    def window(self, start: int, stop: int) -> Iterator[AxisRun]:
        """The runs of target rows [start, stop)."""
        at = 0
        for r in self.runs:
            low, high = max(start, at), min(stop, at + r.length)
            if low < high:
                yield AxisRun(None if r.start is None else r.start + low - at, high - low, r.a, r.b)
            at += r.length

    def is_exact(self) -> bool:
        """B^T A = I: over the copies of every source coordinate, the products of the gains add up to one."""
        total = [0.0] * self.source_size
        for source, a, b in self.rows():
            if source is not None:
                total[source] += a * b
        return all(math.isclose(t, 1.0, rel_tol=1e-12) for t in total)

    def then(self, after: AxisMap) -> AxisMap:
        """The map that does this one first, then `after`."""
        if after.source_size != self.target_size:
            raise ValueError(f"cannot follow a map to {self.target_size} by one from {after.source_size}")
        runs: list[AxisRun] = []
        for r in after.runs:
            if r.start is None:
                runs.append(r)
                continue
            for inner in self.window(r.start, r.start + r.length):
                runs.append(AxisRun(inner.start, inner.length, inner.a * r.a, inner.b * r.b))
        return AxisMap(self.source_size, merge_runs(runs))

    def times(self, inner: AxisMap) -> AxisMap:
        """The map of the product axis self * inner (row-major: `self` is the slow one)."""
        runs: list[AxisRun] = []
        for source, a, b in self.rows():
            for r in inner.runs:
                if source is None or r.start is None:
                    runs.append(AxisRun(None, r.length, 0.0, 0.0))
                else:
                    runs.append(AxisRun(source * inner.source_size + r.start, r.length, a * r.a, b * r.b))
        return AxisMap(self.source_size * inner.source_size, merge_runs(runs), self.dual and inner.dual)

    def to_json(self) -> Any:
        return {"source_size": self.source_size, "dual": self.dual, "runs": [[r.start, r.length, r.a, r.b] for r in self.runs]}

    @staticmethod
    def from_json(data: Any) -> AxisMap:
        def number(value: Any, kind: type[int] | type[float] = int) -> Any:
            if isinstance(value, bool) or not isinstance(value, (int, kind)) or not math.isfinite(value):
                raise TypeError(f"{str(value)[:80]} is no {kind.__name__}")
            return kind(value)

        try:
            runs = [AxisRun(s if s is None else number(s), number(n), number(a, float), number(b, float)) for s, n, a, b in data["runs"]]
            return AxisMap(number(data["source_size"]), tuple(runs), bool(data["dual"]))
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"not an axis map: {error}") from None


def merge_runs(runs: Iterable[AxisRun]) -> tuple[AxisRun, ...]:
    """Neighbouring runs that continue each other become one."""
    out: list[AxisRun] = []
    for r in runs:
        last = out[-1] if out else None
        if last and (last.a, last.b) == (r.a, r.b) and (
            (last.start is None and r.start is None)
            or (last.start is not None and r.start is not None and last.start + last.length == r.start)
        ):  # fmt: skip
            out[-1] = AxisRun(last.start, last.length + r.length, r.a, r.b)
        else:
            out.append(r)
    return tuple(out)


def identity(size: int) -> AxisMap:
    return AxisMap(size, (AxisRun(0, size),))


def select(size: int, indices: Sequence[int]) -> AxisMap:
    """Rows picked one by one with unit gains (a cut, a shard, a permutation)."""
    return AxisMap(size, merge_runs(AxisRun(i, 1) for i in indices))


def tile(size: int, copies: int, pad: int = 0) -> AxisMap:
    """`copies` of the whole axis, each holding 1/copies of what readers see, then `pad` zero rows (LEMON; HyperCloning)."""
    runs = [AxisRun(0, size, 1.0, 1.0 / copies)] * copies
    return AxisMap(size, (*runs, AxisRun(None, pad, 0.0, 0.0)) if pad else tuple(runs))


def duplicate(size: int, sources: Sequence[int]) -> AxisMap:
    """Target row i copies source row sources[i], readers divide by the number of copies (Net2Net, Chen et al. 2016, section 3.2)."""
    counts = [0] * size
    for s in sources:
        counts[s] += 1
    return AxisMap(size, merge_runs(AxisRun(s, 1, 1.0, 1.0 / counts[s]) for s in sources))
