"""GrowConfig: TrainingArguments with hf-grow's settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from transformers import TrainingArguments

from hf_grow.errors import InputError
from hf_grow.options import raise_errors, unmet_requirements, validate
from hf_grow.training.config.regularizer_options import PenaltyOptions
from hf_grow.training.config.train_options import TrainOptions


@dataclass
class GrowConfig(TrainingArguments):  # type: ignore[misc]
    """TrainingArguments, and beside them the keys of a training recipe (docs/training.md). Raises InputError for what either refuses.

    ``eval_on_start`` is true by default: forgetting is measured against the first evaluation.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *TrainingArguments._VALID_DICT_FIELDS, "warmup", "after_growth", "distill", "moe", "monitor",
    ]  # fmt: skip

    eval_on_start: bool = field(default=True, metadata={"help": "Evaluate before the first step, where there is an eval_dataset."})
    train: list[str] | str = field(
        default="everything",
        metadata={
            "help": "Parts that train: everything, new, old, new_layers, routers, new_experts, old_experts, embeddings, norms, head."
        },
    )
    freeze: list[str] | str | None = field(default=None, metadata={"help": "Parts that do not train, even where `train` names them."})
    new_lr: float | None = field(
        default=None, metadata={"help": "Learning rate of new parameters as a multiple of the schedule's; short for warmup={'lr': ...}."}
    )
    warmup: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Start of new parameters: zero_init, lr, steps, alpha_steps, alpha_start, shape."}
    )
    phases: list[dict[str, Any]] | None = field(
        default=None, metadata={"help": "First steps in which only some parts train: [{'steps': 100, 'train': 'new'}]."}
    )
    after_growth: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "settle_steps, settle_lr, restore_steps, consolidate_steps."}
    )
    distill: dict[str, Any] | str | None = field(default=None, metadata={"help": "Teachers; {} for the source of the growth."})
    moe: dict[str, Any] | str | None = field(default=None, metadata={"help": "Router loss of mixtures: aux_loss, aux_coefficient."})
    monitor: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Spikes and regressions, and the reaction: on_instability, threshold, ..."}
    )
    old_set: str = field(default="old", metadata={"help": "The set of eval_dataset that forgetting is measured on."})
    kl_rows: int = field(default=0, metadata={"help": "Rows of the old set on which KL(source || model) is measured at every evaluation."})
    save_dtype: str = field(
        default="auto", metadata={"help": "Dtype of the model that save_model writes; auto: that of the checkpoint before."}
    )
    seq_length: int = field(default=1024, metadata={"help": "Tokens per sequence, for a dataset with a text column."})
    text_field: str = field(default="text", metadata={"help": "Column that holds the text, for a dataset without input_ids."})

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except (ValueError, TypeError, ImportError, RuntimeError) as error:
            raise InputError(f"GrowConfig: {' '.join(str(error).split())}", hint="See TrainingArguments of transformers.") from None
        self.train_options()

    def settings(self) -> dict[str, Any]:
        """hf-grow's settings that were given, under the keys of a recipe."""
        keys = ("train", "freeze", "warmup", "phases", "after_growth", "distill", "moe", "monitor", "old_set", "kl_rows", "save_dtype")
        defaults = {f.name: f.default for f in fields(self)}
        given = {k: getattr(self, k) for k in keys if getattr(self, k) != defaults[k]}
        if self.new_lr is not None:
            given["warmup"] = {**given.get("warmup", {}), "lr": self.new_lr}
        return given

    def train_options(self, regularizer: PenaltyOptions | None = None) -> TrainOptions:
        """The settings, checked. Raises InputError that lists every mistake."""
        if self.new_lr is not None and isinstance(self.warmup, Mapping) and "lr" in self.warmup:
            raise InputError("GrowConfig: new_lr and warmup['lr'] are the same setting.", hint="Remove one of them.")
        options, errors = validate(TrainOptions, self.settings(), strict=False)
        errors += unmet_requirements(options) if options else []
        if self.seq_length < 2:
            errors.append(f"seq_length: should be at least 2, got {self.seq_length}.")
        raise_errors("GrowConfig", errors)
        assert options is not None
        return options if regularizer is None else options.model_copy(update={"regularizer": regularizer})
