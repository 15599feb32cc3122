"""TrainSetup: a training whose options were checked, from a recipe or from GrowTrainer's arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_grow.checkpoint.reader import Checkpoint
from hf_grow.growth.plan import GrowthPlan
from hf_grow.training.config.train_config import TrainRecipe, tokens_per_step
from hf_grow.training.config.train_options import TrainOptions
from hf_grow.training.distributed.launch import data_processes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainingArguments

Notify = Callable[[str], None]


@dataclass(frozen=True)
class TrainSetup:
    """Checked options, and the config and headers of the model; no weights."""

    options: TrainOptions
    """A TrainRecipe for `hf-grow train`."""
    arguments: TrainingArguments
    checkpoint: Checkpoint
    """Of the model to be trained; without tensors for a model that was passed in memory."""
    plan: GrowthPlan | None
    """The growth that the model came from."""
    tokenizer: PreTrainedTokenizerBase | None
    out: Path
    seq_length: int
    """Tokens per sequence."""
    given: Mapping[str, Any]
    """Settings as they are recorded in growth.json, under the keys of a recipe."""
    given_arguments: Mapping[str, Any]
    """TrainingArguments that were given; they override a checkpoint's."""
    source: Checkpoint | None = None
    """With `grow`, the source that the model is grown from as it is loaded; `checkpoint` is then the target, which has no weight files."""
    save_tokenizer: bool = False
    """Whether the tokenizer is another than that of the checkpoint folder, so that it must be saved anew."""

    @property
    def recipe(self) -> TrainRecipe:
        assert isinstance(self.options, TrainRecipe)
        return self.options

    @property
    def vocabulary(self) -> int:
        return self.checkpoint.info.architecture.size("vocab")

    @property
    def tokens_per_step(self) -> int:
        """Of one optimizer step over all processes."""
        return tokens_per_step(self.arguments, self.seq_length, data_processes(self.arguments))
