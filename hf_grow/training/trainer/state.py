"""GrowthSettings, GrowthState and TrainingHooks: settings, state and overridable hooks of a BaseGrowTrainer."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hf_grow.growth.plan import GrowthPlan
from hf_grow.training.config.monitor_options import MonitorOptions
from hf_grow.training.config.schedules import AfterGrowth, Phase, Warmup
from hf_grow.training.distillation.distill import Distiller
from hf_grow.training.growth_state.moments import Policy
from hf_grow.training.param_updates.residual_scale import ResidualScale
from hf_grow.training.param_updates.updates import ParamUpdates
from hf_grow.training.trainer.events import EventLog
from hf_grow.training.trainer.ledger import Ledger, TrainerFlops
from hf_grow.training.trainer.monitor import Monitor

if TYPE_CHECKING:
    import torch

    from hf_grow.training.regularizers.penalty import Penalty
    from hf_grow.training.sharding.row_source import RowSource


class StopCondition(Protocol):
    """Ends a training before its last step."""

    reason: str
    """Why it ends; empty until then."""
    uses_flops: bool
    """Whether it needs the FLOPs after every step; they are summed over the processes for it."""

    def observe(self, *, step: int, flops: float, loss: float, grad_norm: float | None, evaluation: Mapping[str, float]) -> bool:
        """Called after every optimizer step, with its evaluation if there was one. Whether training ends here: the same in every process."""
        ...

    def tokens(self, step: int) -> int:
        """Trained on after a step, over all processes."""
        ...

    def state(self) -> dict[str, Any]: ...
    def load(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class GrowthAtResume:
    """The checkpoint of a smaller model, whose training state is grown with its weights."""

    checkpoint: Path
    plan: GrowthPlan
    policy: Policy


@dataclass(frozen=True)
class GrowthSettings:
    """What BaseGrowTrainer does besides Trainer's own work; every part may be left out."""

    updates: ParamUpdates | None = None
    residual_scale: ResidualScale | None = None
    warmup: Warmup = field(default_factory=Warmup)
    phases: Sequence[Phase] = ()
    after_growth: AfterGrowth = field(default_factory=AfterGrowth)
    penalty: Penalty | None = None
    distiller: Distiller | None = None
    chunked_loss: bool = False
    """Whether the loss of training is computed in chunks of tokens, without the logits of a batch (`distillation.chunked_loss`)."""
    aux_loss: float | None = None
    """Coefficient of the router's load-balancing loss; None for a dense model."""
    monitor: MonitorOptions = field(default_factory=MonitorOptions)
    events: EventLog = field(default_factory=lambda: EventLog(None))
    old_set: str | None = None
    """The named evaluation set that forgetting is measured on."""
    flops: TrainerFlops | None = None
    """What the passes cost; None for Trainer's estimate, which counts every expert and no attention."""
    ledger: Ledger = field(default_factory=Ledger)
    """What was spent, before the training too (self-replay, logits of teachers)."""
    given_arguments: frozenset[str] = frozenset()
    """Optimizer arguments that override a checkpoint's: those that the user named."""
    checkpointed_layers: Collection[int] | None = None
    """Decoder layers whose activations are computed again in the backward pass; None for what Trainer's arguments say."""
    trained_parts: Sequence[str] = ("everything",)
    """What trains after the phases, for the event log."""
    stop: StopCondition | None = None
    growth_at_resume: GrowthAtResume | None = None
    weights: RowSource | None = None
    """Where the weights of a model on the meta device are read from (FSDP2)."""
    model_ref: str = ""
    """Folder or Hub id of the model, for the event log."""

    def new_parameters_have_own_lr(self) -> bool:
        """Whether the learning rate of new parameters may differ from the schedule's at some step."""
        return bool(self.warmup.lr != 1.0 or self.warmup.steps or self.monitor.on_instability == "longer_warmup")

    def modifies_steps(self) -> bool:
        """Whether gradients or weights are changed between the backward pass and the end of a step."""
        w = self.warmup
        rows = self.updates is not None and any(not isinstance(m, bool) for m in self.updates.trains.values())
        return bool(self.penalty or self.phases or rows or w.steps or w.lr != 1.0 or self.after_growth.settle_steps)


@dataclass
class GrowthState:
    """State of a training since the last growth; saved in every checkpoint as growth_state.json."""

    monitor: Monitor
    grown_at: int = 0
    """Global step of the last growth."""
    start_losses: dict[str, float] = field(default_factory=dict)
    """Losses of the named sets at their first evaluation, in nats per token."""
    source_losses: dict[str, float] = field(default_factory=dict)
    """Those of the growth's source, where they are the baseline of forgetting."""
    last_losses: dict[str, float] = field(default_factory=dict)
    evaluated_at: int = -1
    contributed_at: int = -1

    def baseline(self, name: str) -> float:
        """What the loss of a named set is compared with: the source's, else that at the start."""
        return self.source_losses.get(name, self.start_losses[name])

    def to_json(self, step: int, consolidate_steps: int) -> dict[str, Any]:
        """``step``: global step; ``consolidate_steps``: steps after the growth before the model should be grown again."""
        until = self.grown_at + consolidate_steps
        return {"grown_at": self.grown_at, "consolidate_until": until, "consolidation_left": max(0, until - step),
                "start_losses": self.start_losses, "source_losses": self.source_losses, "monitor": self.monitor.state()}  # fmt: skip

    def load(self, saved: Mapping[str, Any]) -> None:
        """Restores what `to_json` returned."""
        self.grown_at, self.start_losses = saved["grown_at"], saved["start_losses"]
        self.source_losses = saved.get("source_losses", {})
        self.monitor.load(saved["monitor"])

    def begin(self, step: int, log_history: Sequence[Mapping[str, Any]]) -> None:
        """Initial state after a checkpoint without one: it was just grown, or written by a plain Trainer."""
        self.grown_at = step
        losses = [entry["loss"] for entry in log_history if "loss" in entry]
        self.monitor.before = losses[-1] if losses else None


class TrainingHooks:
    """Called by BaseGrowTrainer; each method may be overridden."""

    def weights_loaded(self, trainer: Any) -> None:
        """After a model on the meta device got its weights, before a checkpoint is loaded."""

    def before_training(self, trainer: Any, resumed: bool) -> None:
        """Before the first step. ``resumed``: from a checkpoint of the same run."""

    def after_evaluation(self, state: Any, metrics: Mapping[str, float]) -> None:
        """After an evaluation of all named sets."""

    def source_kl(self, model: Any) -> float | None:
        """KL(source || model) in nats per token; None where it is not measured."""
        return None

    def kl_inputs(self) -> Sequence[Mapping[str, Any]]:
        """The batches that `source_kl` runs the model on."""
        return ()

    def growth_record(self, trainer: Any) -> Mapping[str, Any] | None:
        """growth.json of the model as it is now; None for a model that was not grown."""
        return None

    def save_files(self, folder: Path) -> None:
        """Files that `save_pretrained` does not write."""

    def load_files(self, folder: Path) -> None:
        """What `save_files` wrote, back into the model."""

    def result_dtypes(self, trainer: Any) -> Mapping[str, torch.dtype]:
        """Parameter -> dtype in which the result (not a checkpoint) stores it, where that is not the dtype of the training."""
        return {}

    def finish_result(self, folder: Path) -> None:
        """After the result is saved; called on the main process."""
