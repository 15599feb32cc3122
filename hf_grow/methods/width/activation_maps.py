"""Activation spaces grown: for each place a dimension can stand in, the AxisMap that grows it and the values of what is outside its range.

    residual   what o_proj, down_proj and the embedding write          normed     what follows an RMSNorm and is read by q, k, v, gate, up, head
    gain       the RMSNorm gains between the two                        final gain the last one, where the head is tied to the embedding
    query, stored, attended     rows of q, rows of k and v, columns of o        ffn, expert_ffn   rows of gate and up, columns of down

Every space is a dual pair (A, B) with B^T A = I, so W' = A_out W B_in^T computes the same function wherever the nonlinearities between the
spaces commute with A: SwiGLU and attention always do for whole units and whole heads, RMSNorm only for even tiling (below).

**RMSNorm.** k copies and zeros up to D' make the mean square r = kD/D' times the old one. Mode S (scale) divides every writer of the residual
stream by sqrt(r), mode E (eps) multiplies rms_norm_eps by r; both multiply the gains by sqrt(r). (Derived here; LEMON, Wang et al. 2024, section 4
treats LayerNorm.)

**Grouped-query attention.** Query head h reads kv head h // (H/G). With r = H/G and r' = H'/G', growth is exact iff H' % G' == 0 and
ceil(r/r') * G <= G': each old kv head then has room for its query heads.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from hf_grow.errors import PlanError
from hf_grow.growth.axes import AxisMap, AxisRun, duplicate, merge_runs


@dataclass(frozen=True)
class ActivationSpace:
    """One grown space. ``null``: target coordinates outside the range of A that hold random values on the side that may (`alive`)."""

    name: str
    map: AxisMap
    alive: str = ""
    """'out': rows of null coordinates are random and the columns reading them zero; 'in': the other way round."""
    null: tuple[int, ...] = ()
    above: AxisMap | None = None
    """Rows outside the range of A that the next layer gives, from its own coordinates; the columns reading them are zero."""

    @cached_property
    def changed(self) -> bool:
        return self.map.runs != (AxisRun(0, self.map.source_size),)

    @cached_property
    def scatter(self) -> AxisMap:
        """From null coordinates, counted 0, 1, ..., to their places."""
        return _scatter(self.null, self.map.target_size)

    @cached_property
    def kept(self) -> AxisMap:
        """From the other coordinates to their places."""
        null = set(self.null)
        return _scatter([i for i in range(self.map.target_size) if i not in null], self.map.target_size)

    @cached_property
    def contrasts(self) -> list[AxisMap]:
        """Helmert contrasts over the copies of every source coordinate: contrast j weighs the first j copies against the next one.

        Noise through them adds up to zero over the copies (they span the null space N A = 0), with variance 1 - 1/count in each copy.
        Empty where nothing is copied.
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
        """The map in two: first appearances of every source coordinate, and the added ones (AKI takes these from the next layer)."""
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
    """The four spaces of hidden_size, and what becomes of rms_norm_eps."""

    residual: ActivationSpace
    normed: ActivationSpace
    gain: ActivationSpace
    final_gain: ActivationSpace
    """For a head tied to the embedding: the final norm then carries the share that untied readers have in their columns."""
    eps: float
    """Factor on rms_norm_eps."""
    lossless: bool


def tiled_hidden(size: int, target: int, copies: int, *, mode: str) -> HiddenSpaces:
    """`copies` of the residual stream, then zeros. Exact for every target size."""
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
    """Coordinate i copies sources[i] (function-preserving initialisation). Exact only if all are copied equally often."""
    plain = duplicate(size, sources)
    return _with_gains(
        ActivationSpace("residual", plain), ActivationSpace("normed", plain), 1.0, 1.0, len(set(Counter(sources).values())) == 1
    )


def _with_gains(residual: ActivationSpace, normed: ActivationSpace, root: float, eps: float, lossless: bool) -> HiddenSpaces:
    """The gains follow from the spaces before and after: gamma' = sqrt(r) A_normed gamma, its gradient by B_normed / sqrt(r).

    Where x' is zero the gain is free; it repeats old gains, since a zero would cut its coordinate off from learning for good.
    """

    def gains(pairs: Iterable[tuple[int | None, float, float]]) -> AxisMap:
        size = residual.map.source_size
        runs = [AxisRun(i % size, 1, root, 0.0) if s is None else AxisRun(s, 1, root * a, b / root) for i, (s, a, b) in enumerate(pairs)]
        return AxisMap(size, merge_runs(runs))

    after_tied = ((s, b, a) for s, a, b in residual.map.rows())  # the head reads by A_residual, so the last norm must write its dual
    return HiddenSpaces(
        residual, normed, ActivationSpace("gain", gains(normed.map.rows())), ActivationSpace("final_gain", gains(after_tied)), eps, lossless
    )


# Feed-forward units


def ffn_space(name: str, size: int, target: int, *, null: bool, above: bool = False) -> ActivationSpace:
    """New units random in, zero out (null), or copies of the old ones in turn. ``above``: null ones with the rows of the next layer's, in turn."""
    if not null:
        return ActivationSpace(name, duplicate(size, [i % size for i in range(target)]))
    axis = AxisMap(size, (AxisRun(0, size), *([AxisRun(None, target - size, 0.0, 0.0)] if target > size else [])))
    if above:
        return ActivationSpace(name, axis, above=_given(size, [None if i < size else i % size for i in range(target)]))
    return ActivationSpace(name, axis, "out", tuple(range(size, target)))


def _given(size: int, sources: Sequence[int | None]) -> AxisMap:
    """The map that places rows of another layer, and nothing where the source is None. Nothing reads them, so no gradient reaches them (b = 0)."""
    return AxisMap(size, merge_runs(AxisRun(None, 1, 0.0, 0.0) if s is None else AxisRun(s, 1, 1.0, 0.0) for s in sources), dual=False)


# Attention


@dataclass(frozen=True)
class HeadSpaces:
    """The spaces of attention."""

    query: ActivationSpace
    stored: ActivationSpace
    """Keys and values: what the KV cache stores."""
    attended: ActivationSpace


def check_heads(heads: int, kv: int, new_heads: int, new_kv: int) -> None:
    """Raises PlanError for a pair that no exact growth reaches, with the rule and the nearest pairs that work."""
    if heads_feasible(heads, kv, new_heads, new_kv):
        return
    near = nearest_heads(heads, kv, new_heads, new_kv)
    raise PlanError(
        f"{heads} query heads on {kv} kv heads cannot become {new_heads} on {new_kv}: the number of heads must be a multiple of the number of kv heads, "
        f"and ceil(r/r') * {kv} <= {new_kv} must hold with r = {heads // kv} and r' = new heads / new kv heads.",
        hint="Nearest pairs that work: " + ", ".join(f"{h}/{g}" for h, g in near) + ".",
    )


def nearest_heads(heads: int, kv: int, new_heads: int, new_kv: int, most: int = 5) -> list[tuple[int, int]]:
    """The feasible pairs nearest to a wanted one, by the sum of both relative distances.

    For every number of query heads a kv head, that sum is convex in the kv heads, with its kinks where one of the two is met: what is nearest
    lies around them, or at the least feasible number. So the work grows with the heads, not with their product.
    """
    found: set[tuple[int, int]] = set()
    for group in range(1, max(new_heads, heads) // kv + 1 + most):
        least = max(kv, -(-(heads // kv) // group) * kv, -(-heads // group))
        around = {at + step for at in (new_heads // group, new_kv, least) for step in range(1 - most, most)}
        found |= {(g * group, g) for g in around if g >= least}
    return sorted(found, key=lambda p: (abs(p[0] - new_heads) / new_heads + abs(p[1] - new_kv) / new_kv, p))[:most]


def divisors(number: int) -> list[int]:
    """All of them, smallest first."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def heads_feasible(heads: int, kv: int, new_heads: int, new_kv: int) -> bool:
    if new_heads < heads or new_kv < kv or new_heads % new_kv:
        return False
    return math.ceil((heads // kv) / (new_heads // new_kv)) * kv <= new_kv


def _place_heads(heads: int, kv: int, new_heads: int, new_kv: int, null: bool) -> tuple[list[int], list[int | None]]:
    """The old kv head of every new kv head, and the old query head (None: a null head) of every new query head.

    New kv heads go round the old ones, so x2 gives [0..G-1, 0..G-1] as HyperCloning does; the query heads of an old kv head are dealt in order
    over its copies, and spare slots repeat them in order, inside their group: appended at the end, they would read other kv heads.
    """
    group, new_group = heads // kv, new_heads // new_kv
    owners = [g % kv for g in range(new_kv)]
    slots: list[int | None] = [None] * new_heads
    whole = math.ceil(group / new_group) * new_group  # slots of as many kv heads as one old group needs
    for g in range(kv):
        places = [i * new_group + s for i, owner in enumerate(owners) if owner == g for s in range(new_group)]
        for n, place in enumerate(places):
            if n < group or not null:
                slots[place] = g * group + n % whole % group
    return owners, slots


def head_spaces(heads: int, kv: int, new_heads: int, new_kv: int, head_dim: HeadDimSpace, *, null: bool, above: bool = False) -> HeadSpaces:
    """Attention with more heads. ``null``: spare heads have zero o_proj columns; otherwise they are copies that share them.

    ``above``: null heads are those of the next layer, and so are the kv heads that none but null heads read.
    Raises PlanError for a pair of head counts that cannot be reached exactly.
    """
    check_heads(heads, kv, new_heads, new_kv)
    owners, slots = _place_heads(heads, kv, new_heads, new_kv, null)
    count = Counter(s for s in slots if s is not None)
    new_group = new_heads // new_kv
    query = AxisMap(heads, merge_runs(AxisRun(None, 1, 0.0, 0.0) if s is None else AxisRun(s, 1, 1.0, 1.0 / count[s]) for s in slots))
    # The gradient of a kv head goes to its copies as their query heads share it: evenly where each copy serves the same heads.
    shares = []
    for i, owner in enumerate(owners):
        served = [s for s in slots[i * new_group : (i + 1) * new_group] if s is not None]
        shares.append(sum(1.0 / count[s] for s in served) / (heads // kv) if served else 0.0)
        assert all(s // (heads // kv) == owner for s in served)
    ours = [share > 0 or not above for share in shares]
    stored = AxisMap(
        kv, merge_runs(AxisRun(o, 1, 1.0, s) if own else AxisRun(None, 1, 0.0, 0.0) for o, s, own in zip(owners, shares, ours, strict=True))
    )
    null_heads = [i for i, s in enumerate(slots) if s is None]
    wide, padded = head_dim.size, head_dim.padded
    used = [i for i, s in enumerate(slots) if s is not None]
    random_queries = [] if above else [h * wide + p for h in null_heads for p in range(wide)]
    random_queries += [h * wide + p for h in used for p in padded if head_dim.alive]
    queries_above = stored_above = None
    if above:
        copied = _place_heads(heads, kv, new_heads, new_kv, False)[1]
        queries_above = _given(heads, [c if s is None else None for c, s in zip(copied, slots, strict=True)]).times(head_dim.query)
        stored_above = _given(kv, [None if own else o for o, own in zip(owners, ours, strict=True)]).times(head_dim.stored)
    return HeadSpaces(
        ActivationSpace("query", query.times(head_dim.query), "out", tuple(sorted(random_queries)), queries_above),
        # New coordinates are zero: neither scores nor values see them yet.
        ActivationSpace("stored", stored.times(head_dim.stored), above=stored_above),
        ActivationSpace("attended", query.times(head_dim.stored), "in", tuple(h * wide + p for h in used for p in padded)),
    )


@dataclass(frozen=True)
class HeadDimSpace:
    """head_dim grown inside every head. RoPE pairs coordinates j and j + d/2 and turns pair j at frequency theta^(-2j/d)."""

    query: AxisMap
    stored: AxisMap
    norm: AxisMap
    """Gains of q_norm and k_norm."""
    theta: float
    """Exponent on rope_theta."""
    alive: bool
    """Whether query rows of new coordinates may be random (not under a norm over head_dim, which they would change)."""

    @property
    def size(self) -> int:
        return self.query.target_size

    @property
    def padded(self) -> list[int]:
        return [i for i, (s, _, _) in enumerate(self.query.rows()) if s is None]


def head_dim_space(size: int, target: int, *, normed: bool) -> HeadDimSpace:
    """Two exact recipes: pair j to slot n*j for a whole factor n (theta kept), else the front slots with theta^(d'/d).

    Scores divide by sqrt(d'), so query rows carry sqrt(d'/d). Under a norm over head_dim (Qwen3) q and k both carry sqrt(d'/d), which keeps the
    mean square and so eps, and both gains take (d/d')^(1/4). Values do as keys do; o_proj takes it back.
    """
    if target % 2 or target < size:
        raise PlanError(f"head_dim {size} cannot become {target}: rotary embeddings need an even size that is not smaller.")
    whole = target % size == 0
    step = target // size if whole else 1
    places = [j * step for j in range(size // 2)] + [target // 2 + j * step for j in range(size // 2)]
    root = math.sqrt(target / size)

    def placed(a: float, b: float) -> AxisMap:
        rows: list[AxisRun] = [AxisRun(None, 1, 0.0, 0.0)] * target
        for source, place in enumerate(places):
            rows[place] = AxisRun(source, 1, a, b)
        return AxisMap(size, merge_runs(rows))

    def gains(a: float) -> AxisMap:
        rows = [AxisRun(i % size, 1, a, 0.0) for i in range(target)]
        for source, place in enumerate(places):
            rows[place] = AxisRun(source, 1, a, 1 / a)
        return AxisMap(size, merge_runs(rows))

    quarter = (size / target) ** 0.25
    return HeadDimSpace(
        query=placed(root, 1 / root),
        stored=placed(root, 1 / root) if normed else placed(1.0, 1.0),
        norm=gains(quarter),
        theta=1.0 if whole else target / size,
        alive=not normed,
    )
