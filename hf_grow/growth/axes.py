"""Axis maps: how one dimension grows, with gains for activations and for gradients.

Activations map by x' = A x and their gradients by g' = B g, with B^T A = I (then every map built from them is exact). A and B have at most
one nonzero per row, at the same place, so an AxisMap is a list of runs

    AxisRun(start, length, a, b)      target rows copy source rows start, start+1, ... with gain a in A and b in B
    AxisRun(None, length, 0, 0)       target rows outside the range of A

that are executed as a few slice copies. Tiling, zero padding, uneven splits, whole heads and single duplicated neurons are all lists of runs.
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
    """`length` target rows: source rows from `start` on (None: none), with gain ``a`` in A and ``b`` in B."""

    start: int | None
    length: int
    a: float = 1.0
    b: float = 1.0

    def gain(self, role: Literal["out", "in"], quantity: Quantity) -> float:
        """Gain on `quantity` along a dimension of `role`: weights W' = A_out W B_in^T, gradients G' = B_out G A_in^T, grad2 the squared gains."""
        gain = self.a if (role == "out") == (quantity == "weight") else self.b
        return gain * gain if quantity == "grad2" else gain


@dataclass(frozen=True)
class AxisMap:
    """A map from an axis of ``source_size`` coordinates to one of ``target_size``. Raises ValueError for a run outside the source axis."""

    source_size: int
    runs: tuple[AxisRun, ...]
    dual: bool = True
    """Whether the map grows an activation space, so that B^T A = I is required; not for maps that only place or cut values."""

    def __post_init__(self) -> None:
        for run in self.runs:
            if run.length <= 0 or (run.start is not None and not 0 <= run.start <= self.source_size - run.length):
                raise ValueError(f"{run} lies outside an axis of {self.source_size}")

    @cached_property
    def target_size(self) -> int:
        return sum(r.length for r in self.runs)

    def rows(self) -> Iterator[tuple[int | None, float, float]]:
        """(source coordinate or None, a, b) of every target coordinate."""
        for r in self.runs:
            for i in range(r.length):
                yield (None if r.start is None else r.start + i), r.a, r.b

    def window(self, start: int, stop: int) -> Iterator[AxisRun]:
        """The runs of target rows [start, stop), cut to that range."""
        at = 0
        for r in self.runs:
            low, high = max(start, at), min(stop, at + r.length)
            if low < high:
                yield AxisRun(None if r.start is None else r.start + low - at, high - low, r.a, r.b)
            at += r.length

    def is_exact(self) -> bool:
        """Whether B^T A = I: over the copies of every source coordinate the products a b sum to one."""
        total = [0.0] * self.source_size
        for source, a, b in self.rows():
            if source is not None:
                total[source] += a * b
        return all(math.isclose(t, 1.0, rel_tol=1e-12) for t in total)

    def times(self, inner: AxisMap) -> AxisMap:
        """The map of the product axis self * inner (`self` is the slower one), as the Kronecker product."""
        runs: list[AxisRun] = []
        for source, a, b in self.rows():
            for r in inner.runs:
                if source is None or r.start is None:
                    runs.append(AxisRun(None, r.length, 0.0, 0.0))
                else:
                    runs.append(AxisRun(source * inner.source_size + r.start, r.length, a * r.a, b * r.b))
        return AxisMap(self.source_size * inner.source_size, merge_runs(runs), self.dual and inner.dual)

    def to_json(self) -> Any:
        """Plain JSON data, as growth.json stores it."""
        return {"source_size": self.source_size, "dual": self.dual, "runs": [[r.start, r.length, r.a, r.b] for r in self.runs]}

    @staticmethod
    def from_json(data: Any) -> AxisMap:
        """Inverse of `to_json`, for untrusted data. Raises ValueError."""

        def number(value: Any, kind: type[int] | type[float] = int) -> Any:
            if isinstance(value, bool) or not isinstance(value, (int, kind)) or not math.isfinite(value):
                raise TypeError(f"{str(value)[:80]} is not {'an int' if kind is int else 'a float'}")
            return kind(value)

        try:
            runs = [AxisRun(s if s is None else number(s), number(n), number(a, float), number(b, float)) for s, n, a, b in data["runs"]]
            return AxisMap(number(data["source_size"]), tuple(runs), bool(data["dual"]))
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"not an axis map: {error}") from None


def merge_runs(runs: Iterable[AxisRun]) -> tuple[AxisRun, ...]:
    """Merges neighbouring runs that continue each other."""
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


def select(size: int, indices: Sequence[int]) -> AxisMap:
    """Source rows picked by index with unit gains (a cut, a shard, a permutation)."""
    return AxisMap(size, merge_runs(AxisRun(i, 1) for i in indices))


def duplicate(size: int, sources: Sequence[int]) -> AxisMap:
    """Target row i copies source row sources[i]; readers divide by the number of copies (Net2Net, Chen et al. 2016, section 3.2)."""
    counts = [0] * size
    for s in sources:
        counts[s] += 1
    return AxisMap(size, merge_runs(AxisRun(s, 1, 1.0, 1.0 / counts[s]) for s in sources))
