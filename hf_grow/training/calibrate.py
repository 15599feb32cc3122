"""Calibration: the smallest lambda whose training raises the loss on old data by no more than is tolerated, found by short trainings.

1/2 sum F d^2 is no forecast of the rise: it holds for small moves only, and underestimates what training does many times over. So short trainings on
new text are run by BaseGrowTrainer, each from the same weights and on the same batches, and the loss on old text is evaluated after each: lambda 0,
then 1, 10, 100, ... until the rise is tolerated, then bisection on a log scale between the last two. Optimizer, learning rate, weight decay,
clipping, batch, precision and penalty are those of the training that lambda is for; its schedule is compressed to the steps of a trial. A longer
training forgets more: watch the rise there too.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from hf_grow.common.extras import require_packages
from hf_grow.errors import ExecutionError, InputError
from hf_grow.options import find_yaml, raise_errors
from hf_grow.training.config.fisher_options import FisherFileOptions, FisherOptions
from hf_grow.training.config.recipe_files import RECIPES, load_recipe
from hf_grow.training.config.regularizer_options import PenaltyOptions
from hf_grow.training.config.train_config import STEPS_ONLY, read_recipe
from hf_grow.training.data import Collator
from hf_grow.training.distributed.launch import current_launch
from hf_grow.training.regularizers.penalty import QuadraticPenalty
from hf_grow.training.setup.launch_checks import launch_mistakes
from hf_grow.training.setup.recipe_checks import arguments_for
from hf_grow.training.setup.train_setup import Notify
from hf_grow.training.trainer.evaluation import set_losses
from hf_grow.training.trainer.state import GrowthSettings
from hf_grow.training.trainer.trainer import BaseGrowTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

MAX_LAMBDA = 1e6
BISECTIONS = 3
"""Bisections after the first lambda whose rise is tolerated."""
MAX_EVAL_ROWS = 32
"""Sequences of old, and of new text, to evaluate on."""
MIN_ROWS = 8


@dataclass(frozen=True)
class TrialSettings:
    """The training that lambda is for, as short trainings of ``arguments.max_steps`` steps."""

    arguments: TrainingArguments
    penalty: PenaltyOptions
    seq_length: int

    @property
    def batch(self) -> int:
        """Sequences per step."""
        return int(self.arguments.per_device_train_batch_size * self.arguments.gradient_accumulation_steps)

    def to_json(self) -> dict[str, Any]:
        a = self.arguments
        return {
            "steps": a.max_steps, "lr": a.learning_rate, "weight_decay": a.weight_decay, "schedule": str(a.lr_scheduler_type.value),
            "batch": self.batch, "kind": self.penalty.kind, "form": self.penalty.form,
        }  # fmt: skip


def plan_trials(files: FisherFileOptions, options: FisherOptions, out: Path, notify: Notify) -> TrialSettings:
    """The short trainings of --calibrate: of --recipe, else of a recipe's defaults, with the Fisher in ``out``.

    Raises InputError for a recipe with mistakes, or whose penalty has no lambda that can be calibrated.
    """
    require_packages("accelerate")
    default = {
        "model": "", "data": {"train": "new"}, "regularizer": {"kind": "l2sp"}, "learning_rate": files.calibrate_lr or 1e-4,
        "per_device_train_batch_size": options.batch, "max_steps": files.calibrate_steps,
    }  # fmt: skip
    data = (
        load_recipe(find_yaml(files.recipe, RECIPES, "There is no training recipe"), {})
        if files.recipe is not None
        else read_recipe(default)
    )
    raise_errors(data.where, data.mistakes)
    assert data.recipe is not None
    if data.recipe.stages is not None:
        raise InputError(f"{files.recipe}: --calibrate runs one training, not stages.", hint="Remove stages from a copy of the recipe.")
    penalty = data.recipe.regularizer if files.recipe is not None else PenaltyOptions()
    if penalty.collapsed or penalty.kind in ("si", "online-ewc"):
        raise InputError(f"{files.recipe}: --calibrate supports ewc and l2sp, not {'collapsed' if penalty.collapsed else penalty.kind}.")
    if data.recipe.data.intra_document_masking:
        raise InputError(
            f"{files.recipe}: --calibrate trains on text without data.intra_document_masking, so its lambda would be that of another training.",
            hint="Calibrate with --recipe and intra_document_masking: false.",
        )
    penalty = penalty.model_copy(update={"kind": "ewc" if penalty.kind == "none" else penalty.kind, "fisher": (out,)})
    recipe = data.recipe.model_copy(update={"regularizer": penalty})
    if recipe.train != ["everything"] or recipe.freeze or recipe.phases or recipe.lora or recipe.distill:
        notify("Calibration trains all weights on the text alone; train, freeze, phases, lora and distill of the recipe are ignored.")
    given = {**data.arguments, **STEPS_ONLY, **({"use_cpu": True} if files.device == "cpu" else {})}
    arguments = arguments_for(recipe, given, out)
    raise_errors(data.where, launch_mistakes(current_launch(), recipe, arguments, resume=False))
    return TrialSettings(shortened(arguments, files.calibrate_steps), penalty, recipe.data.seq_length)


def shortened(arguments: TrainingArguments, steps: int) -> TrainingArguments:
    """The same training over ``steps`` steps: its schedule is compressed, so that warm-up keeps its share."""
    short = copy.copy(arguments)
    total = arguments.max_steps if arguments.max_steps > 0 else steps
    short.warmup_steps = min(round(arguments.get_warmup_steps(total) / total * steps), steps - 1)
    short.max_steps = steps
    return short


@dataclass(frozen=True)
class TrialResult:
    """The result of one short training; losses in nats per token."""

    strength: float
    """lambda."""
    old: float
    new: float
    rise: float
    """Loss on old text minus that before the training."""
    forecast: float
    """1/2 sum F d^2: the rise if the move d were small."""


@dataclass(frozen=True)
class Calibration:
    trials: tuple[TrialResult, ...]
    """In the order in which they were run; the first is without a penalty."""
    chosen: float
    """The smallest lambda tried whose rise is tolerated."""
    old: float
    """Loss on old text before any training, nats per token."""
    new: float

    def to_json(self) -> dict[str, Any]:
        trials = [
            {"lambda": t.strength, "old": t.old, "new": t.new, "rise": t.rise, "forecast": t.forecast}
            for t in sorted(self.trials, key=lambda t: t.strength)
        ]
        return {"lambda": self.chosen, "before": {"old": self.old, "new": self.new}, "trials": trials}


def calibrate(
    model: PreTrainedModel,
    penalty: QuadraticPenalty,
    *,
    old: Tensor,
    train: Tensor,
    new: Tensor,
    tolerated: float,
    arguments: TrainingArguments,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Calibration:
    """Runs trainings of ``arguments.max_steps`` steps and searches lambda. The weights of ``model`` are restored; ``penalty.strength`` changes.

    ``old``, ``new``: token ids to evaluate on, int64 [sequences, length]; ``train``: to train on, in this order, repeated if they are too few.
    ``tolerated``: rise of the loss on ``old``, nats per token. ``progress`` is called with the tokens of each step.
    Raises InputError if the rise is not tolerated with any lambda up to MAX_LAMBDA.
    """
    runner = _TrialRunner(model, penalty, arguments, old=old, train=train, new=new, progress=progress)
    trials = [runner.run(0.0)]

    def is_tolerated(strength: float) -> bool:
        trials.append(runner.run(strength))
        return trials[-1].rise <= tolerated  # false for a loss that is not finite

    upper = 0.0
    if not trials[0].rise <= tolerated:
        lower, upper = 0.1, 1.0
        while not is_tolerated(upper):
            lower, upper = upper, 10 * upper
            if upper > MAX_LAMBDA:
                raise InputError(
                    f"With lambda {lower:g} the old loss still rises by {trials[-1].rise:.3f} nats per token, more than {tolerated:g}.",
                    hint="Mix in old text (replay), lower the learning rate, or estimate the Fisher on more text.",
                )
        for _ in range(BISECTIONS):
            middle = math.sqrt(lower * upper)
            lower, upper = (lower, middle) if is_tolerated(middle) else (middle, upper)
    return Calibration(tuple(trials), upper, runner.start["old"], runner.start["new"])


class _TrialRunner:
    """Trainings from the same weights on the same batches, at different lambdas."""

    def __init__(
        self, model: PreTrainedModel, penalty: QuadraticPenalty, arguments: TrainingArguments, *,
        old: Tensor, train: Tensor, new: Tensor, progress: Callable[[int], None],
    ) -> None:  # fmt: skip
        self.model, self.penalty, self.progress = model, penalty, progress
        self.arguments = copy.copy(arguments)
        self.arguments.per_device_eval_batch_size = arguments.per_device_train_batch_size
        rows = arguments.max_steps * arguments.gradient_accumulation_steps * arguments.per_device_train_batch_size
        self.train = _dataset(train[torch.arange(rows) % len(train)])
        self.evals = {"old": _dataset(old), "new": _dataset(new)}
        self.weights = {n: p.detach().clone() for n, p in model.named_parameters()}
        self.start: dict[str, float] = {}
        """Losses before any training, by set."""

    def run(self, strength: float) -> TrialResult:
        self.penalty.strength = strength
        training = self.model.training
        with tempfile.TemporaryDirectory(prefix="hf-grow-") as folder:
            self.arguments.output_dir = folder
            trainer = self._trainer()
            self.start = self.start or set_losses(trainer.evaluate())
            losses = self._train(trainer)
            trainer.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)  # the next trainer wraps the model again
        self.penalty.strength = 1.0
        forecast = self.penalty.value()
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(self.weights[name])
        self.model.train(training)
        return TrialResult(strength, losses["old"], losses["new"], losses["old"] - self.start["old"], forecast)

    def _trainer(self) -> BaseGrowTrainer:
        trainer = BaseGrowTrainer(
            model=self.model, args=self.arguments, train_dataset=self.train, eval_dataset=self.evals, data_collator=Collator(0),
            growth=GrowthSettings(penalty=self.penalty), callbacks=[_TokenCounter(self.progress, self.train, self.arguments.max_steps)],
        )  # fmt: skip
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        return trainer

    def _train(self, trainer: BaseGrowTrainer) -> dict[str, float]:
        """Losses after training, by set; those of a training that diverged are not finite."""
        try:
            trainer.train()
        except ExecutionError:
            losses = set_losses(trainer.evaluate())
            if all(map(math.isfinite, losses.values())):
                raise
            return losses
        return set_losses(trainer.evaluate())


class _TokenCounter(TrainerCallback):  # type: ignore[misc]
    def __init__(self, progress: Callable[[int], None], rows: list[dict[str, Any]], steps: int) -> None:
        self.progress, self.tokens = progress, sum(len(r["input_ids"]) for r in rows) // steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress(self.tokens)


def _dataset(rows: Tensor) -> list[dict[str, Any]]:
    return [{"input_ids": row} for row in rows.numpy()]
