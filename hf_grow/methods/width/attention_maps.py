"""Activation maps of attention: query heads, key/value heads and head_dim.

**Grouped-query attention.** Query head h reads kv head h // (H/G). With r = H/G and r' = H'/G', growth is exact iff H' % G' == 0 and
ceil(r/r') * G <= G': each old kv head then has room for its query heads. (Derived here.)
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from hf_grow.errors import PlanError
from hf_grow.growth.axes import AxisMap, AxisRun, merge_runs
from hf_grow.methods.width.activation_maps import ActivationSpace, next_layer_rows


@dataclass(frozen=True)
class HeadSpaces:
    """The spaces of attention: rows of q, rows of k and v, columns of o."""

    query: ActivationSpace
    stored: ActivationSpace
    """Keys and values, as in the KV cache."""
    attended: ActivationSpace


def check_heads(heads: int, kv: int, new_heads: int, new_kv: int) -> None:
    """Raises PlanError, with the nearest pairs that work, for head counts that no exact growth reaches."""
    if heads_feasible(heads, kv, new_heads, new_kv):
        return
    near = nearest_heads(heads, kv, new_heads, new_kv)
    raise PlanError(
        f"{heads} query heads on {kv} kv heads cannot become {new_heads} on {new_kv}: the number of heads must be a multiple of the number of kv heads, "
        f"and ceil(r/r') * {kv} <= {new_kv} must hold with r = {heads // kv} and r' = new heads / new kv heads.",
        hint="Nearest pairs that work: " + ", ".join(f"{h}/{g}" for h, g in near) + ".",
    )


def nearest_heads(heads: int, kv: int, new_heads: int, new_kv: int, most: int = 5) -> list[tuple[int, int]]:
    """The `most` feasible (heads, kv heads) nearest to a wanted pair, by the sum of both relative distances.

    For a fixed group size that sum is convex in the number of kv heads, so only the neighbourhood of its kinks and the smallest feasible number
    are tried: linear in the number of heads.
    """
    found: set[tuple[int, int]] = set()
    for group in range(1, max(new_heads, heads) // kv + 1 + most):
        least = max(kv, -(-(heads // kv) // group) * kv, -(-heads // group))
        around = {at + step for at in (new_heads // group, new_kv, least) for step in range(1 - most, most)}
        found |= {(g * group, g) for g in around if g >= least}
    return sorted(found, key=lambda p: (abs(p[0] - new_heads) / new_heads + abs(p[1] - new_kv) / new_kv, p))[:most]


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def heads_feasible(heads: int, kv: int, new_heads: int, new_kv: int) -> bool:
    """Whether attention can grow exactly to these head counts (rule in the module docstring)."""
    if new_heads < heads or new_kv < kv or new_heads % new_kv:
        return False
    return math.ceil((heads // kv) / (new_heads // new_kv)) * kv <= new_kv


def _place_heads(heads: int, kv: int, new_heads: int, new_kv: int, null: bool) -> tuple[list[int], list[int | None]]:
    """The old kv head of every new kv head, and the old query head (None: a null head) of every new query head.

    New kv heads repeat the old ones in turn, so x2 gives [0..G-1, 0..G-1] as in HyperCloning. The query heads of an old kv head are distributed
    in order over its copies; spare slots repeat them inside their group, since at the end they would read other kv heads.
    """
    group, new_group = heads // kv, new_heads // new_kv
    owners = [g % kv for g in range(new_kv)]
    slots: list[int | None] = [None] * new_heads
    whole = math.ceil(group / new_group) * new_group  # slots of the kv heads that one old group needs
    for g in range(kv):
        places = [i * new_group + s for i, owner in enumerate(owners) if owner == g for s in range(new_group)]
        for n, place in enumerate(places):
            if n < group or not null:
                slots[place] = g * group + n % whole % group
    return owners, slots


def head_spaces(heads: int, kv: int, new_heads: int, new_kv: int, head_dim: HeadDimSpace, *, null: bool, above: bool = False) -> HeadSpaces:
    """Attention with more heads. ``null``: spare heads have zero o_proj columns; otherwise copies share them.

    ``above``: null heads, and kv heads that only null heads read, are copied from the next layer. Raises PlanError for head counts that cannot
    be reached exactly.
    """
    check_heads(heads, kv, new_heads, new_kv)
    owners, slots = _place_heads(heads, kv, new_heads, new_kv, null)
    count = Counter(s for s in slots if s is not None)
    new_group = new_heads // new_kv
    query = AxisMap(heads, merge_runs(AxisRun(None, 1, 0.0, 0.0) if s is None else AxisRun(s, 1, 1.0, 1.0 / count[s]) for s in slots))
    # The gradient of a kv head is divided among its copies by the query heads they serve.
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
        queries_above = next_layer_rows(heads, [c if s is None else None for c, s in zip(copied, slots, strict=True)]).times(head_dim.query)
        stored_above = next_layer_rows(kv, [None if own else o for o, own in zip(owners, ours, strict=True)]).times(head_dim.stored)
    return HeadSpaces(
        ActivationSpace("query", query.times(head_dim.query), "out", tuple(sorted(random_queries)), queries_above),
        # New coordinates are zero, so neither scores nor values change.
        ActivationSpace("stored", stored.times(head_dim.stored), above=stored_above),
        ActivationSpace("attended", query.times(head_dim.stored), "in", tuple(h * wide + p for h in used for p in padded)),
    )


@dataclass(frozen=True)
class HeadDimSpace:
    """head_dim grown inside every head. RoPE rotates the pair (j, j + d/2) at frequency theta^(-2j/d)."""

    query: AxisMap
    stored: AxisMap
    norm: AxisMap
    """Gains of q_norm and k_norm."""
    theta: float
    """Exponent on rope_theta."""
    alive: bool
    """Whether query rows of new coordinates may be random (not under a norm over head_dim, whose mean square they would change)."""

    @property
    def size(self) -> int:
        return self.query.target_size

    @property
    def padded(self) -> list[int]:
        return [i for i, (s, _, _) in enumerate(self.query.rows()) if s is None]


def head_dim_space(size: int, target: int, *, normed: bool) -> HeadDimSpace:
    """Exact growth of head_dim: pair j moves to slot n*j for an integer factor n (theta unchanged), else to the front slots with theta^(d'/d).

    Scores are divided by sqrt(d'), so query rows are scaled by sqrt(d'/d). With a norm over head_dim (Qwen3) q and k are both scaled by
    sqrt(d'/d), which keeps the mean square and eps, and both gains by (d/d')^(1/4). Values are scaled like keys, o_proj by the inverse.
    Raises PlanError for an odd or smaller target.
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
