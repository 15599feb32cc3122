"""Parameter counts from the table of a family, and checks of target sizes.

total     all stored parameters (a tied head counts once)
active    parameters used per token: top_k of the experts, and the embedding only if it is also the head
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from hf_grow.errors import PlanError
from hf_grow.model.architecture import Architecture
from hf_grow.model.family import PREDICATES, TensorSpec

TOLERANCE = 0.05
"""Largest allowed relative distance from the target size."""
LARGEST_STEP = 4.0
"""Growth factor of the active parameters above which a growth is marked as untested: what G_stack (arXiv 2405.15319) recommends."""
MANY_EXPERTS = 64
"""Number of experts above which a growth is marked as untested. A rule of thumb, not from a paper."""


@dataclass(frozen=True)
class ModelSize:
    """Parameter counts and what follows from them."""

    total: int
    active: int
    kv_values: int
    """Values in the KV cache per token (keys and values, all layers)."""

    @property
    def flops(self) -> int:
        """Forward FLOPs per token: 2 per active parameter, without attention scores (which depend on the length)."""
        return 2 * self.active

    def serving_bytes(self, context: int) -> int:
        """Memory in bytes to serve one sequence of `context` tokens in 16 bit: all weights and the KV cache."""
        return 2 * self.total + 2 * self.kv_values * context


def _counts(arch: Architecture) -> Iterator[tuple[TensorSpec, int, list[int]]]:
    """Every table row with its parameters per layer (all experts together) and the layers that have it (-1: outside the blocks)."""
    for spec in arch.family.tensors:
        layers = [i for i in (range(arch.layers) if "{layer}" in spec.name else (-1,)) if PREDICATES[spec.when](arch, i)]
        count = math.prod(arch.size(axis) for d in spec.dims for axis in d.axes)
        yield spec, count * (arch.size("experts") if "{expert}" in spec.name else 1), layers


def count_parameters(arch: Architecture) -> ModelSize:
    """Total and active parameters of an architecture."""
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


def check_larger(now: int, target: int, *, hint: str = "Give a larger --to.") -> None:
    """Raises PlanError if `target` parameters are not more than the source's (`now`), also as they are printed."""
    if target <= now or format_count(target) == format_count(now):
        raise PlanError(
            f"The source already has {format_count(now)} parameters ({now:,}); {format_count(target)} is not larger.", hint=hint
        )


def check_target(now: int, target: int, nearest: int, *, hint: str = "Give a larger --to.") -> None:
    """`check_larger`; and raises PlanError if `nearest`, the closest size that a method reaches, is more than 5 % off or no closer than the source:
    142M is no answer to 135M for a source of 134.5M.
    """
    check_larger(now, target, hint=hint)
    if abs(nearest - target) > TOLERANCE * target:
        raise PlanError(
            f"{format_count(target)} parameters cannot be reached within {TOLERANCE:.0%}: the source has {format_count(now)}, "
            f"the nearest reachable size is {format_count(nearest)}.",
            hint=hint,
        )
    if abs(target - now) <= abs(target - nearest):
        raise PlanError(
            f"The source has {format_count(now)} parameters, closer to {format_count(target)} than the nearest growth, {format_count(nearest)}.",
            hint=hint,
        )


def extrapolation_warnings(old: Architecture, new: Architecture) -> list[str]:
    """One warning for each respect in which a growth goes beyond what is known to work."""
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
