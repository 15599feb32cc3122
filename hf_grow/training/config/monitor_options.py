"""Options of the monitor (`monitor`)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from hf_grow.options import Options, Requires
from hf_grow.training.config.schedules import NumberOfSteps, Positive

Action = Literal["none", "lower_lr", "longer_warmup", "rollback"]


class MonitorOptions(Options):
    """Detection of instability and forgetting, and reactions."""

    on_instability: Action = "none"
    """Reaction to a spike: none (an event only), lower_lr, longer_warmup (of new parameters), or rollback to the last checkpoint, skipping the batches since then, with a temporarily lower learning rate."""
    lr_factor: Annotated[float, Field(gt=0, lt=1), Requires("on_instability", ("lower_lr", "rollback"))] = 0.5
    """Factor of a reaction on learning rates."""
    restore_steps: Annotated[NumberOfSteps, Requires("on_instability", ("rollback",))] = 100
    """Steps after a rollback over which learning rates return. 0: they do not."""
    extra_warmup: Annotated[NumberOfSteps, Requires("on_instability", ("longer_warmup",))] = 100
    """Steps that longer_warmup adds to the warm-up of new parameters, which starts again."""
    max_reactions: Annotated[NumberOfSteps, Requires("on_instability", ("lower_lr", "longer_warmup", "rollback"))] = 3
    """Number of reactions after which a spike is an event only."""
    window: Annotated[int, Field(ge=8)] = 64
    """Number of past steps that a step is compared with."""
    threshold: Annotated[float, Field(gt=0)] = 8.0
    """Robust z-score above which a loss or gradient norm is a spike."""
    variance: Annotated[float, Field(gt=1)] = 16.0
    """Ratio of the variance in the window's last quarter to that of the window above which the run is unstable."""
    shock: Annotated[float, Field(gt=0)] = 0.5
    """Rise of the training loss over that before the growth, in nats per token, that is a transition shock."""
    baseline: Literal["auto", "start", "source"] = "auto"
    """Baseline of forgetting and regressions: this run's first evaluation (start), or the source of the growth, evaluated once (source). Default: auto, the source if the growth changed the function, else start."""
    regression: Annotated[float, Field(gt=0)] = 0.1
    """Rise of a set's loss over its baseline, in nats per token, that is a regression."""
    contribution_steps: NumberOfSteps = 0
    """Steps between measurements of what each new block contributes, by leaving it out: a forward pass over `rows` per new block. Default: 0, never."""
    rows: Positive = 16
    """Rows of each set that contributions are measured on."""
