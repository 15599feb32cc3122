"""How large a model is, counted from the table of its family, never estimated.

total     all parameters stored (a tied head counts once)
active    parameters a token passes through: of the experts only top_k, and not the embedding table unless it is the head too

And what is no sensible size: one that is no growth (`check_target`), or farther than anyone is known to have gone in one step (`beyond`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from hf_grow.errors import PlanError
from hf_grow.model.architecture import Architecture
from hf_grow.model.family import PREDICATES, TensorSpec

TOLERANCE = 0.05
"""A growth misses its target when it ends farther away than this share of it."""


LARGEST_STEP = 4.0
"""Growth of the active parameters at once from which a growth is marked as far: four times, the factor that G_stack (arXiv 2405.15319) recommends."""
MANY_EXPERTS = 64
"""Experts of the target from which a growth is marked as far. A rule of thumb of ours, not of a paper."""


@dataclass(frozen=True)
class ModelSize:
    total: int
    active: int
    kv_values: int
    """Numbers stored in the KV cache for one token (keys and values, all layers)."""

    @property
    def flops(self) -> int:
        """Forward FLOPs of one token: 2 a parameter passed, attention scores not counted (they depend on the length)."""
        return 2 * self.active

    def serving_bytes(self, context: int) -> int:
        """Memory to serve one sequence of `context` tokens in 16 bit: all weights (experts that rest count too) and the KV cache."""
        return 2 * self.total + 2 * self.kv_values * context


def _counts(arch: Architecture) -> Iterator[tuple[TensorSpec, int, list[int]]]:
    """Every row of the table with its parameters in one place (all experts together) and the layers it stands in (-1: outside the blocks)."""
    for spec in arch.family.tensors:
        layers = [i for i in (range(arch.layers) if "{layer}" in spec.name else (-1,)) if PREDICATES[spec.when](arch, i)]
        each = math.prod(arch.size(axis) for d in spec.dims for axis in d.axes)
        yield spec, each * (arch.size("experts") if "{expert}" in spec.name else 1), layers


def count_parameters(arch: Architecture) -> ModelSize:
    total, active = 0, 0.0
    for spec, count, layers in _counts(arch):
        total += count * len(layers)
        if "{expert}" in spec.name:
            active += count * len(layers) * min(arch.top_k, arch.size("experts")) / arch.size("experts")
        elif spec.dims[0].axes != ("vocab",) or spec.dims[0].role == "out" or arch.tied:
            active += count * len(layers)
    return ModelSize(total, round(active), 2 * arch.layers * arch.size("kv") * arch.size("head_dim"))


def block_parameters(arch: Architecture) -> list[int]:
    """Parameters of each block."""
    counts = [0] * arch.layers
    for _, count, layers in _counts(arch):
        for layer in layers:
            if layer >= 0:
                counts[layer] += count
    return counts


def check_target(now: int, target: int, nearest: int, *, hint: str = "Give a larger --to.") -> None:
    """Raises PlanError where `target` parameters are no growth, or where `nearest`, which a method reaches, misses them by more than 5 %.

    Also where the source itself is as near: a model of 134.5 million is called 135M, and one of 142 million is no answer to that.
    """
    if target <= now or format_count(target) == format_count(now):
        raise PlanError(f"The source has {format_count(now)} parameters ({now:,}) already; {format_count(target)} is no growth.", hint=hint)
    if abs(nearest - target) > TOLERANCE * target:
        raise PlanError(
            f"{format_count(target)} parameters cannot be met within {TOLERANCE:.0%}: the source has {format_count(now)}, "
            f"the nearest reachable size is {format_count(nearest)}.",
            hint=hint,
        )
    if abs(target - now) <= abs(target - nearest):
        raise PlanError(
            f"The source has {format_count(now)} parameters, nearer to {format_count(target)} than the nearest growth, {format_count(nearest)}.",
            hint=hint,
        )


def extrapolation_warnings(old: Architecture, new: Architecture) -> list[str]:
    """What of a growth is farther than is known to work, in words."""
    out = []
    times = count_parameters(new).active / count_parameters(old).active
    if times > LARGEST_STEP:
        out.append(
            f"Far beyond what is known to work: {times:.1f} times the active parameters in one step; more than {LARGEST_STEP:g} times counts as untried here. "
            "Grow in steps, and train between them."
        )
    if (count := new.size("experts")) > max(MANY_EXPERTS, old.size("experts")):
        out.append(f"Far beyond what is known to work: {count} experts; more than {MANY_EXPERTS} count as untried here.")
    return out


def format_count(count: float) -> str:
    """10_731_524_096 -> '10.73B'."""
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= 0.9995 * scale:  # 999_999 is 1.00M, not 1000K
            return f"{count / scale:.{0 if count >= 99.995 * scale else 2}f}{unit}"
    return f"{count:.0f}"
