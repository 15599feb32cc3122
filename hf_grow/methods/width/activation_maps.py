"""Activation maps of the hidden state and the FFN: for each role of a dimension, the AxisMap that grows it.

    residual   written by o_proj, down_proj and the embedding        normed       after an RMSNorm, read by q, k, v, gate, up and head
    gain       the RMSNorm gains in between                          final gain   the last norm, if the head is tied to the embedding
    query, stored, attended   rows of q, rows of k and v, columns of o (attention_maps)        ffn   rows of gate and up, columns of down

Every space is a dual pair (A, B) with B^T A = I, so W' = A_out W B_in^T computes the same function wherever the nonlinearities between the
spaces commute with A: SwiGLU and attention do for whole units and whole heads, RMSNorm only for even tiling (below).

**RMSNorm.** k copies and zeros up to D' make the mean square r = kD/D' times the old one. Mode scale divides every writer of the residual
stream by sqrt(r), mode eps multiplies rms_norm_eps by r; both multiply the gains by sqrt(r). (Derived here; LEMON, Wang et al. 2024, section 4,
treats LayerNorm.)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from hf_grow.growth.axes import AxisMap, AxisRun, duplicate, merge_runs


@dataclass(frozen=True)
class ActivationSpace:
    """One grown space. ``null``: target coordinates outside the range of A, which are random on the side that `alive` names."""

    name: str
    map: AxisMap
    alive: str = ""
    """'out': rows of null coordinates are random and the columns that read them zero; 'in': the reverse."""
    null: tuple[int, ...] = ()
    above: AxisMap | None = None
    """Rows outside the range of A that are copied from the next layer; the columns that read them are zero."""

    @cached_property
    def changed(self) -> bool:
        return self.map.runs != (AxisRun(0, self.map.source_size),)

    @cached_property
    def scatter(self) -> AxisMap:
        """Places null coordinate i at its target coordinate."""
        return _scatter(self.null, self.map.target_size)

    @cached_property
    def kept(self) -> AxisMap:
        """Places the other coordinates at their target coordinates."""
        null = set(self.null)
        return _scatter([i for i in range(self.map.target_size) if i not in null], self.map.target_size)

    @cached_property
    def contrasts(self) -> list[AxisMap]:
        """Helmert contrasts over the copies of every source coordinate: contrast j is the first j copies against the next one.

        Noise along them sums to zero over the copies (they span the null space N A = 0), with variance 1 - 1/count per copy. Empty if
        nothing is copied.
        """
        counts = Counter(s for s, a, _ in self.map.rows() if s is not None and a)
        maps = []
        for j in range(1, max(counts.values(), default=1)):
            seen: Counter[int] = Counter()
            runs = []
            for source, a, _ in self.map.rows():
                if source is None or not a or counts[source] <= j:
                    runs.append(AxisRun(None, 1, 0.0, 0.0))
                    continue
                at = seen[source]
                gain = 1.0 if at < j else -float(j) if at == j else 0.0
                runs.append(AxisRun(source, 1, 0.0, gain / math.sqrt(j * (j + 1))))
                seen[source] += 1
            maps.append(AxisMap(self.map.source_size, merge_runs(runs), dual=False))
        return maps

    @cached_property
    def first_and_added(self) -> tuple[AxisMap, AxisMap]:
        """The map split in two: the first copy of every source coordinate, and the added copies (which AKI takes from the next layer)."""
        seen: set[int] = set()
        first, added = [], []
        for source, a, b in self.map.rows():
            nothing = AxisRun(None, 1, 0.0, 0.0)
            run = nothing if source is None else AxisRun(source, 1, a, b)
            old = source is not None and source in seen
            first.append(nothing if old else run)
            added.append(run if old else nothing)
            if source is not None:
                seen.add(source)
        size = self.map.source_size
        return AxisMap(size, merge_runs(first), dual=False), AxisMap(size, merge_runs(added), dual=False)


def _scatter(places: Sequence[int], size: int) -> AxisMap:
    runs: list[AxisRun] = []
    for at, (before, place) in enumerate(pairwise([-1, *places])):
        if place > before + 1:
            runs.append(AxisRun(None, place - before - 1, 0.0, 0.0))
        runs.append(AxisRun(at, 1))
    if places and places[-1] + 1 < size:
        runs.append(AxisRun(None, size - places[-1] - 1, 0.0, 0.0))
    return AxisMap(len(places), merge_runs(runs), dual=False)


# The residual stream


@dataclass(frozen=True)
class HiddenSpaces:
    """The spaces of hidden_size, and the change of rms_norm_eps."""

    residual: ActivationSpace
    normed: ActivationSpace
    gain: ActivationSpace
    final_gain: ActivationSpace
    """Gain of the final norm for a tied head: it carries the 1/copies that other readers have in their columns."""
    eps: float
    """Factor on rms_norm_eps."""
    lossless: bool


def tiled_hidden(size: int, target: int, copies: int, *, mode: str) -> HiddenSpaces:
    """`copies` of the residual stream, then zeros. Exact for every target size. ``mode``: scale or eps."""
    pad = target - copies * size
    ratio = copies * size / target
    write = 1.0 / math.sqrt(ratio) if mode == "scale" else 1.0
    zeros = [AxisRun(None, pad, 0.0, 0.0)] if pad else []
    null = tuple(range(target - pad, target))

    def space(a: float, b: float, name: str) -> ActivationSpace:
        return ActivationSpace(name, AxisMap(size, (*[AxisRun(0, size, a, b)] * copies, *zeros)), "in", null)

    residual, normed = space(write, 1 / (copies * write), "residual"), space(1.0, 1.0 / copies, "normed")
    return _with_gains(residual, normed, math.sqrt(ratio), 1.0 if mode == "scale" else ratio, True)


def duplicated_hidden(size: int, sources: Sequence[int]) -> HiddenSpaces:
    """Coordinate i copies sources[i] (function-preserving initialization). Exact only if all are copied equally often."""
    plain = duplicate(size, sources)
    return _with_gains(
        ActivationSpace("residual", plain), ActivationSpace("normed", plain), 1.0, 1.0, len(set(Counter(sources).values())) == 1
    )


def _with_gains(residual: ActivationSpace, normed: ActivationSpace, root: float, eps: float, lossless: bool) -> HiddenSpaces:
    """Adds the gains: gamma' = sqrt(r) A_normed gamma, with gradients by B_normed / sqrt(r).

    Where x' is zero the gain is arbitrary; old gains are repeated, since a zero would stop the coordinate from ever learning.
    """

    def gains(pairs: Iterable[tuple[int | None, float, float]]) -> AxisMap:
        size = residual.map.source_size
        runs = [AxisRun(i % size, 1, root, 0.0) if s is None else AxisRun(s, 1, root * a, b / root) for i, (s, a, b) in enumerate(pairs)]
        return AxisMap(size, merge_runs(runs))

    after_tied = (
        (s, b, a) for s, a, b in residual.map.rows()
    )  # the tied head reads with A_residual, so the last norm must produce its dual
    return HiddenSpaces(
        residual, normed, ActivationSpace("gain", gains(normed.map.rows())), ActivationSpace("final_gain", gains(after_tied)), eps, lossless
    )


# Feed-forward units


def ffn_space(name: str, size: int, target: int, *, null: bool, above: bool = False) -> ActivationSpace:
    """New FFN units: copies in turn, or null (random rows, zero columns). ``above``: null units with rows from the next layer, in turn."""
    if not null:
        return ActivationSpace(name, duplicate(size, [i % size for i in range(target)]))
    axis = AxisMap(size, (AxisRun(0, size), *([AxisRun(None, target - size, 0.0, 0.0)] if target > size else [])))
    if above:
        return ActivationSpace(name, axis, above=next_layer_rows(size, [None if i < size else i % size for i in range(target)]))
    return ActivationSpace(name, axis, "out", tuple(range(size, target)))


def next_layer_rows(size: int, sources: Sequence[int | None]) -> AxisMap:
    """Places rows of the next layer (none where the source is None). Nothing reads them yet, so no gradient flows back (b = 0)."""
    return AxisMap(size, merge_runs(AxisRun(None, 1, 0.0, 0.0) if s is None else AxisRun(s, 1, 1.0, 0.0) for s in sources), dual=False)
