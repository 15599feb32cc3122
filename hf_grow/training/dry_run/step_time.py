"""How long a step of a training takes: some real steps of it, on made-up token ids, in a folder that goes again. For `--dry-run --time`.

Model, trainer, penalty, teachers, adapters, batch, accumulation and length are the recipe's, and so is the schedule, which is cut off after the
steps that are timed. The text is not read: time does not depend on it, but for the routing of a mixture, which is more even on random tokens.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from transformers import TrainerCallback

from hf_grow.training.config.train_config import tokens_a_step
from hf_grow.training.data import Collator, TrainData
from hf_grow.training.setup.assembly import make_trainer, prepare
from hf_grow.training.setup.checks import arguments_for
from hf_grow.training.setup.train_setup import Notify, TrainSetup
from hf_grow.training.trainer.progress import Progress

STEPS = 5
"""Steps that are timed; one more goes before them, in which memory is taken and kernels are made."""
ENOUGH = 120.0
"""Seconds after which no further step is timed, once there is one."""
_QUIET = {
    "save_strategy": "no", "eval_strategy": "no", "eval_on_start": False, "load_best_model_at_end": False, "report_to": "none",
    "resume_from_checkpoint": None,
}  # fmt: skip


@dataclass(frozen=True)
class Timed:
    """Seconds of each optimizer step after the first, and tokens of one step of all processes."""

    seconds: tuple[float, ...]
    tokens: int

    def to_json(self, steps: int | None, leaves_out: list[str]) -> dict[str, Any]:
        """``steps``: of the whole training, None where that is unknown. ``leaves_out``: what it does besides steps."""
        each = median(self.seconds)
        return {
            "seconds_a_step": each,
            "tokens_a_second": self.tokens / each if each else None,
            "timed_steps": list(self.seconds),
            "seconds": steps and steps * each,
            "leaves_out": leaves_out,
        }


class Stopwatch(TrainerCallback):  # type: ignore[misc]
    """From the end of one step to the end of the next, reading and all; ends the training when enough are timed."""

    def __init__(self, clock: Callable[[], float], alone: bool) -> None:
        self.clock, self.alone = clock, alone
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        import torch

        if args.device.type != "cpu":
            torch.accelerator.synchronize()
        self.ends.append(self.clock())
        # Of several processes each would decide by its own clock, and some would wait for the others for ever.
        late = self.alone and len(self.ends) > 1 and self.ends[-1] - self.ends[0] > ENOUGH
        control.should_training_stop = len(self.ends) > STEPS or late


def time_steps(checked: TrainSetup, notify: Notify, clock: Callable[[], float] = time.perf_counter) -> Timed:
    """Loads the model and trains for a few steps; nothing of it is kept. Raises what a training raises."""
    arguments, length = checked.arguments, checked.recipe.data.seq_length
    tokens = tokens_a_step(arguments, length, arguments.world_size)
    notify(f"Timing {STEPS} steps of {tokens:,} made-up tokens, after one that is left out ...")
    with tempfile.TemporaryDirectory(prefix="hf-grow-") as folder:
        there = _elsewhere(checked, Path(folder))
        ready = prepare(there, notify, _made_up)
        trainer = make_trainer(there, ready, lambda message: None, lambda line: None, False)
        watch = Stopwatch(clock, arguments.world_size == 1)
        trainer.remove_callback(Progress)
        trainer.add_callback(watch)
        # A teacher whose logits are kept has read the rows of one batch; the same are trained on again and again.
        trainer.train_dataset = ready.data.train * ((STEPS + 1) * arguments.gradient_accumulation_steps * arguments.world_size)
        trainer.train()
    return Timed(tuple(b - a for a, b in zip(watch.ends, watch.ends[1:], strict=False)), tokens)


def _elsewhere(checked: TrainSetup, folder: Path) -> TrainSetup:
    """The same training in another folder, without what it does besides steps: evaluations, checkpoints, reports."""
    recipe = checked.recipe
    changes: dict[str, Any] = {"data": recipe.data.model_copy(update={"eval": {}}), "kl_rows": 0, "early_stopping_patience": None}
    if recipe.distill is not None:
        changes["distill"] = recipe.distill.model_copy(update={"cache": None})
    recipe = recipe.model_copy(update=changes)
    steps = checked.arguments.max_steps
    given = {**checked.read.arguments, **_QUIET, "max_steps": steps if steps > 0 else 1000}
    return replace(checked, recipe=recipe, arguments=arguments_for(recipe, given, folder), out=folder)


def _made_up(checked: TrainSetup, notify: Notify) -> TrainData:
    """The rows of one micro-batch, of random tokens."""
    rows, length = checked.arguments.per_device_train_batch_size, checked.recipe.data.seq_length
    ids = np.random.default_rng(checked.arguments.seed).integers(checked.vocabulary, size=(rows, length))
    train: Any = [{"input_ids": row} for row in ids]
    return TrainData(train, {}, (), Collator(0), length)


def leaves_out(checked: TrainSetup) -> list[str]:
    """What a training does besides its steps, in words."""
    recipe, out = checked.recipe, ["reading the texts"]
    if recipe.data.replay is not None and recipe.data.replay.self is not None:
        out.append("sampling from the source")
    if recipe.distill is not None and recipe.distill.top_k is not None:
        out.append("the teachers' reading")
    if recipe.data.eval:
        out.append("evaluations")
    if str(checked.arguments.save_strategy.value) != "no":
        out.append("checkpoints")
    return out
