"""What BaseGrowTrainer does besides training, as one object: everything in it may be left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_grow.training.config.monitor_options import MonitorOptions
from hf_grow.training.config.schedules import AfterGrowth, Phase, Warmup
from hf_grow.training.distillation.distill import Distiller
from hf_grow.training.param_updates.residual_scale import ResidualScale
from hf_grow.training.param_updates.updates import ParamUpdates
from hf_grow.training.trainer.events import EventLog
from hf_grow.training.trainer.monitor import Monitor

if TYPE_CHECKING:
    from hf_grow.training.regularizers.penalty import Penalty


@dataclass
class Growing:
    """What BaseGrowTrainer does besides training; every part may be left out."""

    updates: ParamUpdates | None = None
    blend: ResidualScale | None = None
    warmup: Warmup = field(default_factory=Warmup)
    phases: list[Phase] = field(default_factory=list)
    after: AfterGrowth = field(default_factory=AfterGrowth)
    penalty: Penalty | None = None
    distiller: Distiller | None = None
    aux_loss: float | None = None
    """Coefficient of the router loss of a mixture; None for a dense model."""
    monitor: Monitor = field(default_factory=lambda: Monitor(MonitorOptions()))
    events: EventLog = field(default_factory=lambda: EventLog(None))
    old_set: str | None = None
    """The named set that forgetting is measured on."""
    flops_per_token: float | None = None
    """Forward and backward; None leaves it to Trainer, which counts every expert."""
    given: frozenset[str] = frozenset()
    """Arguments of the optimizer that hold whatever a checkpoint says: those that a recipe names."""
    record: Callable[[int], Mapping[str, Any] | None] = lambda step: None
    """growth.json of a model saved after so many steps, or None where there is none."""
    kl: Callable[[Any], float] | None = None
    """KL(source || model), nats a token, taken at evaluations."""
    start_losses: dict[str, float] = field(default_factory=dict)
    """Losses of the named sets at their first evaluation."""
    source_losses: dict[str, float] = field(default_factory=dict)
    """Those of the source of the growth, where they are the measure of forgetting."""
    grown_at: int = 0
    """Global step of the last growth."""
    last_losses: dict[str, float] = field(default_factory=dict)
    evaluated_at: int = -1
    contributed_at: int = -1
    trains: list[str] = field(default_factory=lambda: ["everything"])
    """What trains after the phases, for the log."""
    told: Callable[[Any, dict[str, float]], None] = lambda state, metrics: None
    """Hears of every evaluation of all sets."""
    announce: str = ""
    """The event that opens the log, start or resume; written once the first step is known."""
    start_facts: Mapping[str, Any] = field(default_factory=dict)
    stored: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    """A state dict as it is stored; None as it is. Set for the result alone."""
    save_extra: Callable[[Path], None] = lambda folder: None
    """Writes what `save_pretrained` leaves out (see adapters)."""
    load_extra: Callable[[Path], None] = lambda folder: None

    def baseline(self, name: str) -> float:
        """What the loss of a named set is compared with: the source's, else that at the start."""
        return self.source_losses.get(name, self.start_losses[name])

    def acts_inside_a_step(self) -> bool:
        """Whether anything needs the gradients or the weights between backward and step."""
        w, a = self.warmup, self.after
        rows = self.updates is not None and any(not isinstance(m, bool) for m in self.updates.trains.values())
        return bool(self.penalty or self.phases or rows or w.steps or w.lr != 1.0 or a.settle_steps)
