"""Depth and width together: the shape for a target size, reached as one map. Not from a paper; guarantee as its two methods.

Candidates are every hidden_size in steps, every depth, and the FFN size that closes the gap. They are ranked by their distance from the target,
from the proportions of known models, and from the source's own proportions. The chosen one is the width growth followed by the depth growth,
composed by substitution into one pass over the weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from pydantic import Field

from hf_grow.errors import GrowError, PlanError
from hf_grow.growth.growth import CandidateTable, Growth, Method, compose
from hf_grow.methods.depth import DEPTH_METHODS
from hf_grow.methods.width.width_methods import WIDTH_METHODS, explicit_sizes
from hf_grow.methods.width.width_search import Widths, candidate_widths, widths_of, with_widths
from hf_grow.model.architecture import Architecture
from hf_grow.model.family import MAX_LAYERS
from hf_grow.model.param_count import TOLERANCE, block_parameters, check_target, count_parameters, format_count
from hf_grow.options import Count, Options

ASPECT = (80.0, 140.0)
"""hidden_size / layers of well-known dense models from 1B to 70B (Llama 2 and 3, Mistral, Qwen 2.5)."""
FFN_RATIO = (0.8, 1.3)
"""Range of intermediate_size / hidden_size relative to the source's."""
MAX_CANDIDATES = 5


class HybridOptions(Options):
    """Options of growing depth and width to one size."""

    to: Count
    """Number of parameters to grow to, such as 20B."""
    choose: Annotated[int, Field(ge=1)] = 1
    """Which of the listed candidates to build."""
    width_method: Literal["tile", "pad", "lemon", "fpi", "aki", "net2net"] = "tile"
    """Width method."""
    depth_method: Literal["identity", "interleave", "dus"] = "identity"
    """Depth method."""
    multiple_of: Annotated[int, Field(ge=2, le=2**20)] = 128
    """Step of hidden_size and intermediate_size."""
    max_depth: Annotated[int, Field(ge=1, le=MAX_LAYERS)] | None = None
    """Maximum number of layers. Default: three times the source's."""
    min_depth: Annotated[int, Field(ge=1, le=MAX_LAYERS)] | None = None
    """Minimum number of layers. Default: the source's."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of everything random."""


@dataclass(frozen=True)
class HybridCandidate:
    shape: Widths
    layers: int
    total: int
    cost: float


def rank_candidates(arch: Architecture, options: HybridOptions) -> list[HybridCandidate]:
    """At most MAX_CANDIDATES shapes, best first, with distinct hidden sizes. Raises PlanError if none is within 5 %."""
    best: dict[int, HybridCandidate] = {}
    nearest: HybridCandidate | None = None
    for c in _all(arch, options):
        if nearest is None or abs(c.total - options.to) < abs(nearest.total - options.to):
            nearest = c
        if abs(c.total / options.to - 1) <= TOLERANCE and (c.shape.hidden not in best or c.cost < best[c.shape.hidden].cost):
            best[c.shape.hidden] = c
    now, hint = count_parameters(arch).total, "Change --to, --max-depth or --multiple-of."
    if nearest is None and options.to > now:
        raise PlanError(
            f"{format_count(options.to)} parameters cannot be reached within {TOLERANCE:.0%}: the source has {format_count(now)}, and no depth and width within "
            "these limits come near.",
            hint=hint,
        )
    check_target(now, options.to, nearest.total if nearest else now, hint=hint)
    return sorted(best.values(), key=lambda c: c.cost)[:MAX_CANDIDATES]


def _ffn_axis(arch: Architecture) -> str:
    """The FFN axis that closes the gap: that of the experts if no layer is dense."""
    return "expert_inter" if all(map(arch.is_sparse, range(arch.layers))) else "inter"


def _all(arch: Architecture, options: HybridOptions) -> Iterator[HybridCandidate]:
    old = widths_of(arch)
    low, high = options.min_depth or arch.layers, options.max_depth or 3 * arch.layers
    depths = [
        n
        for n in range(max(low, arch.layers), high + 1)
        if options.depth_method != "dus" or n == arch.layers or (n % 2 == 0 and n <= 2 * arch.layers)
    ]
    axis = _ffn_axis(arch)
    for shape in (old, *candidate_widths(arch, multiple=options.multiple_of)):
        size, unit = getattr(shape, axis), _unit(getattr(old, axis), options.multiple_of)
        base = with_widths(arch, shape)
        block = sum(block_parameters(base)) / arch.layers
        more = with_widths(arch, replace(shape, **{axis: size + unit}))
        step = (sum(block_parameters(more)) / arch.layers - block) / unit  # parameters of a block for one more FFN unit
        outside = count_parameters(base).total - block * arch.layers
        for layers in depths:
            missing = (options.to - outside) / layers - block
            fitted = size + round(missing / step / unit) * unit
            ratio = fitted / shape.hidden / (getattr(old, axis) / old.hidden)
            if fitted < getattr(old, axis) or not FFN_RATIO[0] <= ratio <= FFN_RATIO[1]:
                continue
            total = round(outside + layers * (block + step * (fitted - size)))
            grown = replace(shape, **{axis: fitted})
            if (grown, layers) != (old, arch.layers):
                yield HybridCandidate(grown, layers, total, _cost(arch, grown, layers, total / options.to, ratio))


def _unit(size: int, multiple: int) -> int:
    while multiple > 2 and multiple > size // 8:
        multiple //= 2
    return multiple


def _cost(arch: Architecture, shape: Widths, layers: int, share: float, ffn: float) -> float:
    """Ranking cost: distance from the target first, then unusual proportions, then a changed FFN ratio and head counts."""
    aspect = shape.hidden / layers
    own = arch.size("hidden") / arch.layers
    low, high = min(ASPECT[0], own), max(ASPECT[1], own)
    outside = max(0.0, math.log(low / aspect), math.log(aspect / high))
    ratio = abs(math.log(shape.heads * shape.head_dim / shape.hidden) - math.log(arch.heads * arch.size("head_dim") / arch.size("hidden")))
    ratio += abs(math.log(shape.heads / shape.kv) - math.log(arch.size("group")))
    parallel = 0.05 if arch.size("kv") % 4 == 0 and shape.kv % 4 else 0.0
    return 8 * abs(share - 1) + outside + 0.3 * abs(math.log(ffn)) + ratio + parallel


def build_hybrid(arch: Architecture, options: HybridOptions) -> Growth:
    found = rank_candidates(arch, options)
    if options.choose > len(found):
        raise PlanError(
            f"There are {len(found)} candidates, not {options.choose}.", hint="hf-grow hybrid SOURCE --to SIZE --dry-run lists them."
        )
    return replace(build_candidate(arch, found[options.choose - 1], options), candidates=_table(arch, found, options))


def _table(arch: Architecture, found: list[HybridCandidate], options: HybridOptions) -> CandidateTable:
    axis = _ffn_axis(arch)

    def row(widths: Widths, layers: int, total: int) -> tuple[str, ...]:
        sizes = (str(layers), str(widths.hidden), str(getattr(widths, axis)), f"{widths.heads}/{widths.kv}")
        return *sizes, format_count(total), f"{total / options.to - 1:+.1%}", f"{widths.hidden / layers:.0f}"

    now = row(widths_of(arch), arch.layers, count_parameters(arch).total)
    return CandidateTable(
        title=f"shapes near {format_count(options.to)}",
        columns=("layers", "hidden", "FFN", "heads/kv", "size", "off", "hidden/layers"),
        source=(*now[:5], "", now[6]),
        rows=tuple(row(c.shape, c.layers, c.total) for c in found),
        chosen=options.choose,
        hint="Another of these: --choose N",
    )


def build_candidate(arch: Architecture, candidate: HybridCandidate, options: HybridOptions) -> Growth:
    """The composed growth to one candidate."""
    steps: list[Growth] = []
    if candidate.shape != widths_of(arch):
        width = next(m for m in WIDTH_METHODS if m.name == options.width_method)
        sizes = explicit_sizes(arch, candidate.shape)
        steps.append(width.build(arch, width.options.model_validate({**sizes, "seed": options.seed})))
    if candidate.layers != arch.layers:
        depth = next(m for m in DEPTH_METHODS if m.name == options.depth_method)
        wide = Architecture(steps[0].config) if steps else arch
        steps.append(depth.build(wide, depth.options.model_validate({"layers_to": candidate.layers, "seed": options.seed})))
    growth = steps[0] if len(steps) == 1 else compose(*steps)
    return replace(growth, method="hybrid", options=options.non_defaults())


def _for_size(arch: Architecture, target: int) -> Options | None:
    try:
        rank_candidates(arch, HybridOptions(to=target))
    except GrowError:
        return None
    return HybridOptions(to=target)


HYBRID = Method("hybrid", "hybrid", "depth, width and FFN together", "", "as its two methods", HybridOptions, build_hybrid, _for_size)
