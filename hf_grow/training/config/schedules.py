"""Schedules after a growth: warm-up of new parameters, blending in of new blocks, phases that train some parts only, and settling.

Steps count from the growth: a run that was grown at step 500 starts these at 500.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from hf_grow.options import Options, Requires

NumberOfSteps = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Factor = Annotated[float, Field(gt=0, le=100)]
Share = Annotated[float, Field(ge=0, le=1)]


def as_list(value: Any) -> Any:
    """A single string as a list of one."""
    return [value] if isinstance(value, str) else value


Parts = Annotated[list[str], BeforeValidator(as_list), Field(min_length=1)]
"""Names of parts; a single name needs no list."""


class Warmup(Options):
    """Warm-up of new parameters and new blocks."""

    zero_init: bool = False
    """Zero the output projections of new blocks before the first step, so that they start as identity blocks."""
    lr: Factor = 1.0
    """Learning-rate multiplier of new parameters and new rows."""
    steps: NumberOfSteps = 0
    """Steps over which that multiplier rises linearly from zero. Default: 0, no warm-up."""
    alpha_steps: NumberOfSteps = 0
    """Steps over which new blocks are blended in: h + alpha * (block(h) - h). Default: 0, at once."""
    alpha_start: Annotated[Share, Requires("alpha_steps")] = 0.0
    """Initial alpha."""
    shape: Annotated[Literal["linear", "cosine"], Requires("alpha_steps")] = "linear"
    """Schedule of alpha."""

    def lr_factor(self, step: int, extra: int = 0) -> float:
        """Learning-rate multiplier of new parameters at optimizer step ``step`` (from 0) since the growth, with ``extra`` steps of warm-up."""
        steps = self.steps + extra
        return self.lr * min(1.0, (step + 1) / steps) if steps else self.lr

    def alpha(self, step: int) -> float:
        """alpha at step ``step``; 1 from `alpha_steps` on."""
        if step >= self.alpha_steps:
            return 1.0
        risen = step / self.alpha_steps
        if self.shape == "cosine":
            risen = (1 - math.cos(math.pi * risen)) / 2
        return self.alpha_start + (1 - self.alpha_start) * risen


class Phase(Options):
    """Steps in which only some parts train: [new] freezes old parameters, [routers] trains routers alone."""

    steps: Positive
    """Number of steps."""
    train: Parts
    """Parts that train."""


class AfterGrowth(Options):
    """Learning rate after a growth, and steps until the next one."""

    settle_steps: NumberOfSteps = 0
    """Steps at a reduced learning rate: half of it after doubling the width, which doubles the effective step of Adam."""
    settle_lr: Factor = 0.5
    """Learning-rate multiplier while settling."""
    restore_steps: NumberOfSteps = 0
    """Steps over which the multiplier then returns to 1."""
    consolidate_steps: NumberOfSteps = 0
    """Steps before the model should be grown again; recorded in every checkpoint, and growth commands warn before."""

    def factor(self, step: int) -> float:
        """Learning-rate multiplier at step ``step`` since the growth."""
        if step < self.settle_steps:
            return self.settle_lr
        since = step - self.settle_steps + 1
        return 1.0 if since > self.restore_steps else self.settle_lr + (1 - self.settle_lr) * since / (self.restore_steps + 1)


def phase_at(phases: Sequence[Phase], step: int) -> int | None:
    """Index of the phase of step ``step`` (from 0, since the growth); None after the last."""
    end = 0
    for i, phase in enumerate(phases):
        end += phase.steps
        if step < end:
            return i
    return None
