"""Options of the monitor: what is watched, and what happens when something goes wrong."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from hf_grow.options import Options, Requires
from hf_grow.training.config.schedules import Count, Positive

Action = Literal["none", "lower_lr", "longer_warmup", "rollback"]


class MonitorOptions(Options):
    """What is watched, and what happens when something goes wrong."""

    on_instability: Action = "none"
    """Reaction to a spike: none (only told), lower_lr, longer_warmup (of new parameters), or rollback to the last checkpoint, past the batches since then, with a rate that is lower for a while."""
    lr_factor: Annotated[float, Field(gt=0, lt=1), Requires("on_instability", ("lower_lr", "rollback"))] = 0.5
    """What a reaction multiplies learning rates by."""
    restore_steps: Annotated[Count, Requires("on_instability", ("rollback",))] = 100
    """Steps after a rollback over which learning rates rise back. 0 leaves them lower."""
    extra_warmup: Annotated[Count, Requires("on_instability", ("longer_warmup",))] = 100
    """Steps that longer_warmup adds to the warm-up of new parameters, which begins anew."""
    max_reactions: Annotated[Count, Requires("on_instability", ("lower_lr", "longer_warmup", "rollback"))] = 3
    """After so many reactions spikes are only told."""
    window: Annotated[int, Field(ge=8)] = 64
    """Steps of the past that a step is compared with."""
    threshold: Annotated[float, Field(gt=0)] = 8.0
    """Robust z-score from which on a loss or gradient norm is a spike."""
    variance: Annotated[float, Field(gt=1)] = 16.0
    """How many times the variance of the window that of the last quarter of it may be, before the run counts as unstable."""
    shock: Annotated[float, Field(gt=0)] = 0.5
    """Rise of the training loss over that before the growth, in nats, that is told as a transition shock."""
    baseline: Literal["auto", "start", "source"] = "auto"
    """What forgetting and regressions are measured against: this run's first evaluation (start), or the source of the growth (source), which is evaluated once. Default: auto, the source where the growth changed the function, else start."""
    regression: Annotated[float, Field(gt=0)] = 0.1
    """Loss of a named set above its baseline, in nats, from which on an evaluation tells of a regression."""
    contribution_steps: Count = 0
    """Measure what each new block contributes every so many steps, by leaving it out. Default: 0, never. It takes a forward pass over `rows` for each new block."""
    rows: Positive = 16
    """Rows of each named set that contributions are measured on."""
