"""Trainer callbacks of BaseGrowTrainer: what is set before a step, done around it, and logged after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from transformers import TrainerCallback

from hf_grow.training.config.schedules import phase_at
from hf_grow.training.param_updates.updates import LrFactors
from hf_grow.training.trainer.state import Growing


class StepTrainer(Protocol):
    """What the callbacks need of a trainer."""

    growing: Growing
    model: Any
    optimizer: Any
    state: Any
    stream: Any
    resumed_from: Any
    used: LrFactors

    @property
    def since(self) -> int: ...
    def rates(self) -> LrFactors: ...
    def note_scale(self) -> None: ...
    def skipped(self) -> bool: ...
    def watch(self) -> None: ...
    def load_penalty(self, checkpoint: Path) -> None: ...
    def _get_learning_rate(self) -> float: ...


class GrowthCallback(TrainerCallback):  # type: ignore[misc]
    def __init__(self, trainer: StepTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        t = self.trainer
        state.compute_steps(args, state.max_steps)  # a checkpoint's intervals are those of the run that wrote it
        if t.growing.blend is not None:
            t.growing.blend.set(t.growing.warmup.alpha(t.since))
        if t.growing.penalty is not None:
            t.growing.penalty.attach(t.model)
            if t.resumed_from:
                t.load_penalty(Path(t.resumed_from))
        g = t.growing
        if g.announce == "start":
            g.events.write("start", state.global_step, steps=state.max_steps, grown_at=g.grown_at, **g.start_facts)
        elif g.announce == "resume":
            g.events.write("resume", state.global_step, steps=state.max_steps, grown_at=g.grown_at, checkpoint=str(t.resumed_from))
        g.announce = ""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        t, g = self.trainer, self.trainer.growing
        if g.blend is not None:
            g.blend.set(g.warmup.alpha(t.since))
        self._tell(t)

    def _tell(self, t: StepTrainer) -> None:
        """Events of a schedule, at the step where they begin."""
        g, since, step = t.growing, t.since, t.state.global_step
        starts, at = {}, 0
        for phase in g.phases:
            starts[at] = phase.train
            at += phase.steps
        if since in starts:
            g.events.write("phase", step, train=starts[since])
        elif g.phases and since == at:
            g.events.write("phase", step, train=g.trains)
        if g.after.settle_steps and since == g.after.settle_steps + g.after.restore_steps:
            g.events.write("settled", step, lr_factor=t.rates().every)
        if g.warmup.alpha_steps and since == g.warmup.alpha_steps:
            g.events.write("blended", step, alpha=1.0)
        if g.after.consolidate_steps and since == g.after.consolidate_steps:
            g.events.write("consolidated", step, steps=since)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        t, g = self.trainer, self.trainer.growing
        t.note_scale()
        if g.penalty is not None:
            g.penalty.before_step()
        if g.updates is not None:
            t.used = t.rates()
            g.updates.before(t.model, inner(t.optimizer), phase_at(g.phases, t.since), t.used)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        t, g = self.trainer, self.trainer.growing

        def settle() -> None:
            if g.updates is not None:
                g.updates.after(inner(t.optimizer))

        if g.penalty is None or t.skipped():  # a step that a GradScaler skipped is none
            settle()
        else:
            g.penalty.after_step(g.updates.used if g.updates is not None else t._get_learning_rate(), settle)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.stream is not None:  # Trainer counts from where a stream was taken up
            state.epoch = state.global_step / state.max_steps
        self.trainer.watch()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.growing.events.write("checkpoint", state.global_step, folder=f"checkpoint-{state.global_step}")


def inner(optimizer: Any) -> Any:
    """The optimizer that accelerate wrapped."""
    return getattr(optimizer, "optimizer", optimizer)
