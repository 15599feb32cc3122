"""Measured rise of the loss right after growths that change the function: guidance from one model, not a guarantee.

Figures from benchmarks/results/starting-loss.md in nats per token; a test keeps them equal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_grow.growth.growth import Growth
from hf_grow.model.architecture import Architecture

MODEL = "SmolLM2-135M"
SOURCE_LOSS = 3.04
"""Loss of that model on the prose; an untrained one has log(VOCABULARY)."""
VOCABULARY = 49152


@dataclass(frozen=True)
class StartingLoss:
    """One measurement. ``kind`` and ``amount``: what grew and by which factor (see `_kind`)."""

    kind: str
    amount: float
    how: str
    """Command and flags."""
    prose: float
    code: float
    """Rise of the loss over the source's."""

    @property
    def is_chance_level(self) -> bool:
        """Whether the loss is within 10 % of an untrained model's, or above."""
        return SOURCE_LOSS + self.prose > 0.9 * math.log(VOCABULARY)

    def __str__(self) -> str:
        worth = ", about the loss of an untrained model" if self.is_chance_level else ""
        rise = f"{self.prose:+.2f} nats per token on prose, {self.code:+.2f} on code"
        return f"{MODEL} (30 layers of 576) began {rise} after {self.how}{worth}"


STARTING_LOSSES = (
    StartingLoss("dus", 32 / 30, "dus --layers-to 32", 0.10, 0.13),
    StartingLoss("dus", 38 / 30, "dus --layers-to 38", 0.14, 0.31),
    StartingLoss("dus", 44 / 30, "dus --layers-to 44", 0.32, 0.52),
    StartingLoss("interleave", 32 / 30, "interleave --layers-to 32", 2.51, 2.55),
    StartingLoss("interleave", 38 / 30, "interleave --layers-to 38", 2.94, 2.79),
    StartingLoss("interleave", 44 / 30, "interleave --layers-to 44", 3.26, 3.09),
    StartingLoss("interleave", 2.0, "interleave --layers-to 60", 5.14, 5.65),
    StartingLoss("stack", 2.0, "stack", 4.92, 4.60),
    StartingLoss("fpi", 4 / 3, "fpi --hidden 768 --heads 12 --kv-heads 3", 0.26, 0.27),
    StartingLoss("net2net", 4 / 3, "net2net --hidden 768 --heads 12 --kv-heads 3", 0.08, 0.06),
    StartingLoss("aki", 1.0, "aki --intermediate 3072", 7.60, 7.79),
    StartingLoss("aki", 4 / 3, "aki --hidden 768 --heads 12 --kv-heads 3", 3.38, 3.83),
    StartingLoss("aki", 2.0, "aki --factor 2", 8.53, 10.84),
    StartingLoss("experts noise", 0.01, "experts --experts 8 --init noise --noise 0.01", 0.00, 0.00),
    StartingLoss("experts noise", 0.1, "experts --experts 8 --init noise --noise 0.1", 0.08, 0.15),
    StartingLoss("experts noise", 0.3, "experts --experts 8 --init noise --noise 0.3", 1.06, 1.53),
    StartingLoss("experts drop", 0.1, "experts --experts 8 --init drop --drop 0.1", 0.59, 0.91),
    StartingLoss("experts drop", 0.25, "experts --experts 8 --init drop --drop 0.25", 3.78, 3.94),
    StartingLoss("experts drop", 0.5, "experts --experts 8 --init drop --drop 0.5", 8.44, 10.21),
    StartingLoss("experts drop", 1.0, "experts --experts 8 --init drop --drop 1.0", 18.97, 21.25),
)


def nearest_starting_loss(growth: Growth, source: Architecture) -> StartingLoss | None:
    """The measurement nearest to a growth; None if the growth is lossless or differs from all measurements by more than 15 %."""
    if growth.guarantee.lossless:
        return None
    kind, amount = _kind(growth.method, growth.options, source, Architecture(growth.config))
    alike = [s for s in STARTING_LOSSES if s.kind == kind and abs(s.amount - amount) <= 0.15 * amount]
    return min(alike, key=lambda s: abs(s.amount - amount), default=None)


def _kind(method: str, options: Mapping[str, Any], old: Architecture, new: Architecture) -> tuple[str, float]:
    """Depth: ratio of layers; width: ratio of hidden_size; experts of a dense model: amount of noise or re-initialized units."""
    if method == "experts":
        init = str(options.get("init", "copy"))
        kind = f"experts {init}" if not old.is_moe and not options.get("experts_from") else ""
        return kind, float(options.get(init) or {"noise": 0.01, "drop": 0.5}.get(init, 0.0))
    if method == "dus" and new.layers == 2 * old.layers:  # nothing is dropped
        return "stack", 2.0
    return method, new.layers / old.layers if new.layers != old.layers else new.size("hidden") / old.size("hidden")
