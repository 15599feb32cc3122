"""A recipe that can be carried out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hf_grow.checkpoint.reader import Checkpoint
from hf_grow.errors import InputError
from hf_grow.growth.plan import GrowthPlan
from hf_grow.training.config.train_config import RecipeData, TrainRecipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainingArguments

Notify = Callable[[str], None]


@dataclass(frozen=True)
class TrainSetup:
    """A recipe that can be carried out, and what was opened on the way (config and headers; no weights)."""

    read: RecipeData
    recipe: TrainRecipe
    arguments: TrainingArguments
    checkpoint: Checkpoint
    plan: GrowthPlan | None
    tokenizer: PreTrainedTokenizerBase
    out: Path

    @property
    def vocabulary(self) -> int:
        return self.checkpoint.info.architecture.size("vocab")

    def source_of_growth(self) -> tuple[str, str | None]:
        """Reference and revision of what the model was grown from. Raises InputError if it was not grown."""
        if self.plan is None:
            raise InputError(f"{self.recipe.model} has no growth.json, so it has no source.", hint="Name a checkpoint instead.")
        return self.plan.source.ref, self.plan.source.revision or None
