"""GrowConfig: TrainingArguments with hf-grow's settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar

from transformers import TrainingArguments

from hf_grow.errors import InputError
from hf_grow.options import raise_errors, unmet_requirements, validate
from hf_grow.training.config.regularizer_options import PenaltyOptions
from hf_grow.training.config.train_options import TrainOptions

_KEYS = tuple(k for k in TrainOptions.model_fields if k != "regularizer")  # which is an argument of GrowTrainer


@dataclass
class GrowConfig(TrainingArguments):  # type: ignore[misc]
    """TrainingArguments, and beside them the keys of a training recipe (docs/training.md). Raises InputError for what either refuses.

    ``eval_on_start`` is true by default: forgetting is measured against the first evaluation. ``load_best_model_at_end`` is true by default with
    ``early_stopping_patience``, and ``metric_for_best_model`` is the loss of the set ``new``, else of the first.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *TrainingArguments._VALID_DICT_FIELDS, "warmup", "after_growth", "distill", "lora", "moe", "monitor",
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
    chunked_loss: bool | None = field(
        default=None, metadata={"help": "Compute the loss in chunks of tokens, without the logits of a batch. Default: with distill."}
    )
    lora: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "LoRA on old layers: r, alpha, dropout, target_modules, new_in_full; {} for the defaults."}
    )
    moe: dict[str, Any] | str | None = field(default=None, metadata={"help": "Router loss of mixtures: aux_loss, aux_coefficient."})
    monitor: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Spikes and regressions, and the reaction: on_instability, threshold, ..."}
    )
    old_set: str = field(default="old", metadata={"help": "The set of eval_dataset that forgetting is measured on."})
    kl_rows: int = field(default=0, metadata={"help": "Rows of the old set on which KL(source || model) is measured at every evaluation."})
    dtype: str = field(
        default="auto", metadata={"help": "Dtype of the weights in training, as in from_pretrained; auto: float32, whatever is stored."}
    )
    save_dtype: str = field(
        default="auto", metadata={"help": "Dtype of the model that save_model writes; auto: that of the checkpoint before."}
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a model on the Hub."})
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, eager or flash_attention_2, as in from_pretrained."})
    checkpointed_layers: str | list[int] | None = field(
        default=None,
        metadata={"help": "With activation_checkpointing: the layers that it applies to, a list, new_layers or old_layers. Default: all."},
    )
    load_best_model_at_end: bool | None = field(
        default=None, metadata={"help": "Load the best model at the end. Default: true with early_stopping_patience."}
    )
    metric_for_best_model: str | None = field(
        default=None,
        metadata={"help": "Metric of the best model and of early stopping. Default: the loss of the set new, else of the first."},
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop when metric_for_best_model has not improved for this many evaluations."}
    )
    early_stopping_threshold: float = field(default=0.0, metadata={"help": "Minimum change that counts as an improvement."})
    seq_length: int = field(default=1024, metadata={"help": "Tokens per sequence, for a dataset with a text column."})
    intra_document_masking: bool = field(
        default=False, metadata={"help": "Attention within documents only, for a dataset with a text column."}
    )
    text_field: str = field(default="text", metadata={"help": "Column that holds the text, for a dataset without input_ids."})

    def __post_init__(self) -> None:
        unset = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(self)}
        left_out = [name for name, value in unset.items() if getattr(self, name) == value]
        if self.early_stopping_patience and getattr(self.eval_strategy, "value", self.eval_strategy) == "no":
            raise InputError(
                "GrowConfig: early_stopping_patience needs evaluations.", hint="Set eval_strategy='steps' and pass an eval_dataset."
            )
        if self.load_best_model_at_end is None:
            self.load_best_model_at_end = bool(self.early_stopping_patience)
        metric = self.metric_for_best_model
        try:
            super().__post_init__()
        except (ValueError, TypeError, ImportError, RuntimeError) as error:
            raise InputError(f"GrowConfig: {' '.join(str(error).split())}", hint="See TrainingArguments of transformers.") from None
        self.metric_for_best_model = metric  # GrowTrainer knows the evaluation sets
        for name in ("dtype", "save_dtype"):
            setattr(self, name, str(getattr(self, name)).removeprefix("torch."))
        self._defaults = {name: getattr(self, name) for name in left_out}
        self.train_options()

    def given_arguments(self) -> dict[str, Any]:
        """Arguments of Trainer that were given or changed since. (Other TrainingArguments, made for their defaults, would reset the processes.)"""
        names = {f.name for f in fields(TrainingArguments)} - {"output_dir", "logging_dir", "eval_on_start"}
        return {n: getattr(self, n) for n in sorted(names) if n not in self._defaults or getattr(self, n) != self._defaults[n]}

    def settings(self) -> dict[str, Any]:
        """hf-grow's settings that were given, under the keys of a recipe."""
        defaults = {f.name: f.default for f in fields(self)}
        given = {k: getattr(self, k) for k in _KEYS if getattr(self, k) != defaults[k]}
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
