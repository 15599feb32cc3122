"""The Trainer callback of BaseGrowTrainer: what is set before an optimizer step, done around it, and logged after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from transformers import TrainerCallback

from hf_grow.training.config.schedules import phase_at
from hf_grow.training.param_updates.residual_scale import decoder_layers
from hf_grow.training.param_updates.updates import LrFactors, unwrapped
from hf_grow.training.trainer.state import GrowthSettings, GrowthState


class StepTrainer(Protocol):
    """What the callback needs of a trainer."""

    growth: GrowthSettings
    growth_state: GrowthState
    model: Any
    optimizer: Any
    state: Any
    stream: Any
    resumed_from: Any
    opening_event: str
    last_factors: LrFactors

    @property
    def steps_since_growth(self) -> int: ...
    def lr_factors(self) -> LrFactors: ...
    def note_loss_scale(self) -> None: ...
    def step_skipped(self) -> bool: ...
    def monitor_step(self) -> None: ...
    def load_penalty(self, checkpoint: Path) -> None: ...
    def _get_learning_rate(self) -> float: ...


class GrowthCallback(TrainerCallback):  # type: ignore[misc]
    """Applies the penalty, the schedules and the monitor of a BaseGrowTrainer at each step, and logs them."""

    def __init__(self, trainer: StepTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        t, g = self.trainer, self.trainer.growth
        state.compute_steps(args, state.max_steps)  # a checkpoint's intervals are those of the run that wrote it
        if g.checkpointed_layers is not None and args.activation_checkpointing:  # Trainer has just enabled it
            layers: list[Any] = list(decoder_layers(t.model))
            for number, layer in enumerate(layers):
                layer.gradient_checkpointing = number in g.checkpointed_layers
        if g.residual_scale is not None:
            g.residual_scale.set(g.warmup.alpha(t.steps_since_growth))
        if g.penalty is not None:
            g.penalty.attach(t.model)
            if t.resumed_from:
                t.load_penalty(Path(t.resumed_from))
        facts = {"steps": state.max_steps, "grown_at": t.growth_state.grown_at}
        if t.opening_event == "start":
            g.events.write("start", state.global_step, **facts, model=g.model_ref)
        elif t.opening_event == "resume":
            g.events.write("resume", state.global_step, **facts, checkpoint=str(t.resumed_from))
        t.opening_event = ""  # a rollback starts training again without an event

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        t, g = self.trainer, self.trainer.growth
        if g.residual_scale is not None:
            g.residual_scale.set(g.warmup.alpha(t.steps_since_growth))
        self._log_schedule(t)

    def _log_schedule(self, t: StepTrainer) -> None:
        """Writes the events of schedules at the step where they take effect."""
        g, since, step = t.growth, t.steps_since_growth, t.state.global_step
        starts, end = {}, 0
        for phase in g.phases:
            starts[end] = phase.train
            end += phase.steps
        if since in starts:
            g.events.write("phase", step, train=starts[since])
        elif g.phases and since == end:
            g.events.write("phase", step, train=list(g.trained_parts))
        if g.after_growth.settle_steps and since == g.after_growth.settle_steps + g.after_growth.restore_steps:
            g.events.write("settled", step, lr_factor=t.lr_factors().all)
        if g.warmup.alpha_steps and since == g.warmup.alpha_steps:
            g.events.write("blended", step, alpha=1.0)
        if g.after_growth.consolidate_steps and since == g.after_growth.consolidate_steps:
            g.events.write("consolidated", step, steps=since)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        t, g = self.trainer, self.trainer.growth
        t.note_loss_scale()
        if g.penalty is not None:
            g.penalty.before_step()
        if g.updates is not None:
            t.last_factors = t.lr_factors()
            phase, moved = phase_at(g.phases, t.steps_since_growth), g.penalty is not None and g.penalty.moves_weights
            g.updates.before_step(t.model, unwrapped(t.optimizer), phase, t.last_factors, at_once=moved)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        t, g = self.trainer, self.trainer.growth

        def restore() -> None:
            if g.updates is not None:
                g.updates.after_step(unwrapped(t.optimizer))

        if g.penalty is None or t.step_skipped():
            restore()
        else:
            g.penalty.after_step(g.updates.step_lr if g.updates is not None else t._get_learning_rate(), restore)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.stream is not None:  # Trainer counts from the position at which a stream was resumed
            state.epoch = state.global_step / state.max_steps
        self.trainer.monitor_step()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.growth.events.write("checkpoint", state.global_step, folder=f"checkpoint-{state.global_step}")
