"""Step time for `--dry-run --time`: a few real optimizer steps on random token ids, in a temporary folder.

Model, trainer, penalty, teachers, adapters, batch, accumulation and sequence length are the recipe's, and so is the schedule, cut off after the timed
steps. No text is read: step time does not depend on it, except through the routing of a mixture, which is more even on random tokens.
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

from hf_grow.training.config.train_config import STEPS_ONLY, tokens_per_step
from hf_grow.training.data import Collator, TrainData
from hf_grow.training.distributed.launch import data_processes
from hf_grow.training.setup.build import make_parts, make_recipe_trainer
from hf_grow.training.setup.recipe_checks import arguments_for
from hf_grow.training.setup.train_setup import Notify, TrainSetup
from hf_grow.training.trainer.progress import Progress

TIMED_STEPS = 5
"""Timed steps, after one untimed step that allocates memory and compiles kernels."""
MAX_SECONDS = 120.0
"""No further step is timed after this many seconds, once one is."""


@dataclass(frozen=True)
class StepTimes:
    """Seconds of each optimizer step after the first, and tokens of one step over all processes."""

    seconds: tuple[float, ...]
    tokens: int

    def to_json(self, steps: int | None, leaves_out: list[str]) -> dict[str, Any]:
        """``steps``: steps of the whole training, None if unknown. ``leaves_out``: what the training does besides steps."""
        per_step = median(self.seconds)
        return {
            "seconds_a_step": per_step,
            "tokens_a_second": self.tokens / per_step if per_step else None,
            "timed_steps": list(self.seconds),
            "seconds": steps and steps * per_step,
            "leaves_out": leaves_out,
        }


class StepTimer(TrainerCallback):  # type: ignore[misc]
    """Records the time at the end of each step, and stops the training after TIMED_STEPS + 1 steps."""

    def __init__(self, clock: Callable[[], float], single_process: bool) -> None:
        self.clock, self.single_process = clock, single_process
        self.step_ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        import torch

        if args.device.type != "cpu":
            torch.accelerator.synchronize()
        self.step_ends.append(self.clock())
        # Several processes would decide by different clocks, and then wait for each other forever.
        timed_out = self.single_process and len(self.step_ends) > 1 and self.step_ends[-1] - self.step_ends[0] > MAX_SECONDS
        control.should_training_stop = len(self.step_ends) > TIMED_STEPS or timed_out


def time_steps(setup: TrainSetup, notify: Notify, clock: Callable[[], float] = time.perf_counter) -> StepTimes:
    """Loads the model and trains for a few steps; nothing is kept. Raises what a training raises."""
    arguments, length = setup.arguments, setup.recipe.data.seq_length
    tokens = tokens_per_step(arguments, length, data_processes(arguments))
    notify(f"Timing {TIMED_STEPS} steps of {tokens:,} random tokens, after one warm-up step ...")
    with tempfile.TemporaryDirectory(prefix="hf-grow-") as folder:
        short = _steps_only(setup, Path(folder))
        parts, data = make_parts(short, short.recipe.model, short.recipe.revision, notify), _random_rows(short)
        trainer = make_recipe_trainer(short, parts, data, lambda message: None, lambda line: None)
        timer = StepTimer(clock, arguments.world_size == 1)
        trainer.remove_callback(Progress)
        trainer.add_callback(timer)
        # A logit cache holds the rows of one micro-batch; every step trains on them.
        rows: Any = data.train
        trainer.train_dataset = rows * ((TIMED_STEPS + 1) * arguments.gradient_accumulation_steps * arguments.world_size)
        trainer.train()
    return StepTimes(tuple(b - a for a, b in zip(timer.step_ends, timer.step_ends[1:], strict=False)), tokens)


def _steps_only(setup: TrainSetup, folder: Path) -> TrainSetup:
    """The same training in another folder, without evaluations, checkpoints and reports."""
    recipe = setup.recipe
    changes: dict[str, Any] = {"data": recipe.data.model_copy(update={"eval": {}}), "kl_rows": 0, "early_stopping_patience": None}
    if recipe.distill is not None:
        changes["distill"] = recipe.distill.model_copy(update={"cache": None})
    recipe = recipe.model_copy(update=changes)
    steps = setup.arguments.max_steps
    given = {**setup.given_arguments, **STEPS_ONLY, "max_steps": steps if steps > 0 else 1000}
    return replace(setup, options=recipe, arguments=arguments_for(recipe, given, folder), out=folder)


def _random_rows(setup: TrainSetup) -> TrainData:
    """The rows of one micro-batch, of random token ids."""
    rows, length = setup.arguments.per_device_train_batch_size, setup.recipe.data.seq_length
    ids = np.random.default_rng(setup.arguments.seed).integers(setup.vocabulary, size=(rows, length))
    train: Any = [{"input_ids": row} for row in ids]
    return TrainData(train, {}, (), Collator(0), length)


def not_timed(setup: TrainSetup) -> list[str]:
    """What a training does besides its steps, for display."""
    recipe = setup.recipe
    activities = {
        "reading the texts": True,
        "sampling from the source": recipe.data.replay is not None and recipe.data.replay.self is not None,
        "computing the teachers' logits": recipe.distill is not None and recipe.distill.cached is not None,
        "evaluations": bool(recipe.data.eval),
        "checkpoints": setup.arguments.save_strategy.value != "no",
    }
    return [name for name, enabled in activities.items() if enabled]
