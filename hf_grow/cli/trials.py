"""`hf-grow fisher --calibrate`: from flags and a recipe to short trainings, and what came of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_grow.checkpoint.reader import Checkpoint
from hf_grow.cli import render
from hf_grow.cli.fisher_options import RunOptions
from hf_grow.common.extras import require_packages
from hf_grow.errors import InputError
from hf_grow.growth.plan import GrowthPlan
from hf_grow.training.config.fisher_options import FisherOptions
from hf_grow.training.config.regularizer_options import PenaltyOptions

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, TrainingArguments

    from hf_grow.training.regularizers.calibrate import Calibration

MEASURED = 32
"""Sequences, of old and of new text, that calibration measures on."""


@dataclass(frozen=True)
class Trials:
    """How calibration trains."""

    arguments: TrainingArguments
    penalty: PenaltyOptions
    seq_length: int

    @property
    def batch(self) -> int:
        """Sequences of a step."""
        return int(self.arguments.per_device_train_batch_size * self.arguments.gradient_accumulation_steps)


def trials_for(how: RunOptions, options: FisherOptions, out: Path) -> Trials:
    """As the recipe says, else with the defaults of recipes. Raises InputError for a recipe that cannot be tried."""
    require_packages("accelerate")
    from hf_grow.cli.train import find_recipe
    from hf_grow.training.config.train_config import load_recipe, raise_mistakes, read_recipe
    from hf_grow.training.setup.checks import arguments_for

    default = {
        "model": "", "data": {"train": "new"}, "regularizer": {"kind": "l2sp"}, "learning_rate": how.calibrate_lr or 1e-4,
        "per_device_train_batch_size": options.batch, "max_steps": how.calibrate_steps,
    }  # fmt: skip
    found = load_recipe(find_recipe(how.recipe), {}) if how.recipe is not None else read_recipe(default)
    raise_mistakes(found.where, found.mistakes)
    assert found.recipe is not None
    penalty = found.recipe.regularizer if how.recipe is not None else PenaltyOptions()
    if penalty.collapsed or penalty.kind in ("si", "online-ewc"):
        raise InputError(
            f"{how.recipe}: --calibrate looks for the lambda of ewc or l2sp, not of {'collapsed' if penalty.collapsed else penalty.kind}."
        )
    kind = "ewc" if penalty.kind == "none" else penalty.kind
    penalty = penalty.model_copy(update={"kind": kind, "fisher": (out,)})
    parts = (found.recipe.train != ["everything"], found.recipe.freeze, found.recipe.phases, found.recipe.lora, found.recipe.distill)
    if any(parts):
        render.note("Calibration trains all weights on the text alone: train, freeze, phases, lora and distill of the recipe are left out.")
    recipe = found.recipe.model_copy(update={"regularizer": penalty})
    return Trials(arguments_for(recipe, found.arguments, out), penalty, found.recipe.data.seq_length)


def calibrated(
    model: PreTrainedModel, checkpoint: Checkpoint, how: RunOptions, trials: Trials, file: Path, old: Tensor, new: Tensor, *, quiet: bool
) -> dict[str, Any]:
    from hf_grow.training.regularizers.build import make_penalty
    from hf_grow.training.regularizers.calibrate import calibrate
    from hf_grow.training.regularizers.penalty import QuadraticPenalty

    plan = None if checkpoint.growth is None else GrowthPlan.from_json(checkpoint.growth)
    penalty = make_penalty(trials.penalty, model, plan)
    assert isinstance(penalty, QuadraticPenalty) and how.calibrate is not None
    penalty.attach(model)
    measured = min(MEASURED, len(new) // 2)
    with render.tokens_bar("calibrating", 6 * how.calibrate_steps * trials.batch * new.shape[1], quiet=quiet) as progress:
        found = calibrate(
            model, penalty, old=old, train=new[:-measured], new=new[-measured:], tolerated=how.calibrate,
            steps=how.calibrate_steps, how=trials.arguments, progress=progress,
        )  # fmt: skip
    return _told(found, how, trials)


def _told(found: Calibration, how: RunOptions, trials: Trials) -> dict[str, Any]:
    a = trials.arguments
    return {
        "lambda": found.chosen, "tolerated": how.calibrate, "steps": how.calibrate_steps, "lr": a.learning_rate, "weight_decay": a.weight_decay,
        "schedule": str(a.lr_scheduler_type.value), "batch": trials.batch, "kind": trials.penalty.kind, "form": trials.penalty.form,
        "before": {"old": found.old, "new": found.new},
        "trials": [{"lambda": t.strength, "old": t.old, "new": t.new, "rise": t.rise, "forecast": t.forecast} for t in sorted(found.trials, key=lambda t: t.strength)],
    }  # fmt: skip
