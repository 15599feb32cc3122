"""How large a model is, counted from the table of its family, never estimated.

total     all parameters stored (a tied head counts once)
active    parameters a token passes through: of the experts only top_k, and not the embedding table unless it is the head too
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from hf_grow.families import Architecture, Entry

TOLERANCE = 0.05
"""A growth misses its target when it ends farther away than this share of it."""


@dataclass(frozen=True)
class Size:
    total: int
    active: int
    kv_values: int
    """Numbers stored in the KV cache for one token (keys and values, all layers)."""

    @property
    def flops(self) -> int:
        """Forward FLOPs of one token: 2 a parameter passed, attention scores not counted (they depend on the length)."""
        return 2 * self.active


def _parameters(entries: Iterable[Entry]) -> int:
    return sum(math.prod(e.shape) for e in entries)


def measure(arch: Architecture) -> Size:
    total, active = 0, 0.0
    for entry in arch.tensors.values():
        count = math.prod(entry.shape)
        total += count
        if entry.expert >= 0:
            active += count * min(arch.top_k, arch.size("experts")) / arch.size("experts")
        elif entry.spec.dims[0].axes != ("vocab",) or entry.spec.dims[0].role == "out" or arch.tied:
            active += count
    return Size(total, round(active), 2 * arch.layers * arch.size("kv") * arch.size("head_dim"))


def block_parameters(arch: Architecture) -> list[int]:
    """Parameters of each block."""
    counts = [0] * arch.layers
    for entry in arch.tensors.values():
        if entry.layer >= 0:
            counts[entry.layer] += math.prod(entry.shape)
    return counts


def short(count: float) -> str:
    """10_731_524_096 -> '10.73B'."""
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= 0.9995 * scale:  # 999_999 is 1.00M, not 1000K
            return f"{count / scale:.{0 if count >= 99.995 * scale else 2}f}{unit}"
    return f"{count:.0f}"
