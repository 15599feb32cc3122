"""Gentle starts for what is new: what the recipe may ask for, and how large each effect is at a step. Plain numbers, no tensors.

The host of new parts may be frozen for a while (`phases`), new parameters may warm up on their own (`lr`, `steps`), and new blocks may be
blended in (`alpha_steps`). Steps count from the growth, so a run that was grown at step 500 starts these at 500.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from hf_grow.options import Options, Requires

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Factor = Annotated[float, Field(gt=0, le=100)]
Share = Annotated[float, Field(ge=0, le=1)]


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Parts = Annotated[list[str], BeforeValidator(_listed), Field(min_length=1)]
"""Names of parts; one alone needs no list."""


class Warmup(Options):
    """Learning rate of new parameters, and new blocks that are blended in."""

    zero_init: bool = False
    """Set what new blocks add to the residual stream to zero before the first step, so that they start as identity blocks."""
    lr: Factor = 1.0
    """Learning rate of new parameters (and of the new rows of grown ones) as a multiple of the schedule's."""
    steps: Count = 0
    """Steps over which that multiple rises linearly from zero. Default: 0, no warm-up of their own."""
    alpha_steps: Count = 0
    """Steps over which the output of new blocks is blended in: h + alpha * (block(h) - h). Default: 0, at once."""
    alpha_start: Annotated[Share, Requires("alpha_steps")] = 0.0
    """Where alpha starts."""
    shape: Annotated[Literal["linear", "cosine"], Requires("alpha_steps")] = "linear"
    """How alpha rises."""

    def lr_factor(self, step: int, extra: int = 0) -> float:
        """Multiple for the optimizer step number `step` (from 0) since the growth; `extra` steps of warm-up were added by the monitor."""
        steps = self.steps + extra
        return self.lr * min(1.0, (step + 1) / steps) if steps else self.lr

    def alpha(self, step: int) -> float:
        """Share of a new block's output in the forward pass of step number `step`; 1 from `alpha_steps` on."""
        if step >= self.alpha_steps:
            return 1.0
        risen = step / self.alpha_steps
        if self.shape == "cosine":
            risen = (1 - math.cos(math.pi * risen)) / 2
        return self.alpha_start + (1 - self.alpha_start) * risen


class Phase(Options):
    """Steps in which only some parts train: [new] freezes the host, [routers] trains routers alone."""

    steps: Positive
    """How many."""
    train: Parts
    """The parts that train meanwhile."""


class AfterGrowth(Options):
    """The time after a growth."""

    settle_steps: Count = 0
    """Steps at a reduced learning rate: half of it after a width growth by two, which doubles the effective step of Adam."""
    settle_lr: Factor = 0.5
    """Multiple of the schedule's learning rate while settling."""
    restore_steps: Count = 0
    """Steps over which the rate then returns to the schedule's."""
    consolidate_steps: Count = 0
    """Steps before the model should be grown again: recorded in every checkpoint, and growth commands warn of it."""

    def factor(self, step: int) -> float:
        if step < self.settle_steps:
            return self.settle_lr
        since = step - self.settle_steps + 1
        return 1.0 if since > self.restore_steps else self.settle_lr + (1 - self.settle_lr) * since / (self.restore_steps + 1)


def phase_at(phases: Sequence[Phase], step: int) -> int | None:
    """The index of the phase that step number `step` (from 0, since the growth) lies in; None after the last."""
    end = 0
    for i, phase in enumerate(phases):
        end += phase.steps
        if step < end:
            return i
    return None
