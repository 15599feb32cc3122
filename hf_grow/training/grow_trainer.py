"""GrowTrainer: Trainer for grown models in Python. It builds its training as `hf-grow train` does (training/setup/build.py)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from transformers import PreTrainedModel

from hf_grow.checkpoint.reader import Checkpoint
from hf_grow.checkpoint.source import open_source
from hf_grow.convert.in_memory import describe_model
from hf_grow.errors import InputError
from hf_grow.growth.plan import GrowthPlan
from hf_grow.options import raise_errors
from hf_grow.training.config.regularizer_options import PenaltyOptions
from hf_grow.training.config.train_config import collect_mistakes
from hf_grow.training.config.train_options import contradictions, default_best_metric, missing_eval_set
from hf_grow.training.data import TrainData
from hf_grow.training.data.assemble import DataPart
from hf_grow.training.data.document_masking import LENGTHS, position_ids, split_lengths, with_documents
from hf_grow.training.data.packing import BATCH, IGNORED, DocumentEncoder, check_token_ids, split_sequences
from hf_grow.training.distributed.launch import current_launch
from hf_grow.training.grow_config import GrowConfig
from hf_grow.training.param_updates.parameter_map import bare, parameters
from hf_grow.training.setup.activation_checkpointing import checkpointed_layers
from hf_grow.training.setup.build import ModelParts, SetupHooks, add_early_stopping, make_parts, make_settings, merge_adapters
from hf_grow.training.setup.launch_checks import launch_mistakes, parallelism_mistakes
from hf_grow.training.setup.option_checks import check_options, load_tokenizer, plan_of
from hf_grow.training.setup.train_setup import TrainSetup
from hf_grow.training.setup.warnings import warn
from hf_grow.training.trainer.trainer import BaseGrowTrainer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from hf_grow.training.data import Collator

_MODEL_COLUMNS = ("input_ids", "labels", "attention_mask", "position_ids", LENGTHS)


class GrowTrainer(BaseGrowTrainer):
    """Trainer that takes from a model's growth.json (or ``plan``) what is new, and trains it by the settings of a GrowConfig.

    ``model``: checkpoint folder or Hub id, loaded in ``args.dtype``, or a PreTrainedModel; then ``plan`` is the growth that it came from.
    ``regularizer``: EWC(...), OnlineEWC(...), SI(...) or L2SP(...). ``train_dataset``: rows with input_ids, or a datasets.Dataset with a text
    column, which is tokenised and packed to seq_length. ``eval_dataset``: one, or a dict of named sets; forgetting is measured on ``old``.
    Everything else is Trainer's; ``optimizers`` must hold all parameters that train. Checkpoints and what `save_model` writes hold growth.json.
    With ``args.lora`` they are adapters: `merge_and_unload` first for a whole model. Raises InputError for what does not fit.
    """

    _merged = False

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        args: GrowConfig,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        plan: GrowthPlan | None = None,
        regularizer: PenaltyOptions | None = None,
        **options: Any,
    ) -> None:
        notify = logging.getLogger("hf_grow").warning
        if options.get("model_init") is not None:
            raise InputError("GrowTrainer takes no model_init.", hint="Pass a checkpoint folder, a Hub id, or a model.")
        args = copy(args)  # what depends on the datasets is filled in below
        setup = _check(model, args, plan, regularizer, processing_class, eval_dataset, notify)
        tokenizer = processing_class or _own_tokenizer(setup, train_dataset, eval_dataset)
        train = prepare_dataset(train_dataset, args, tokenizer, setup.vocabulary, remainder="drop")
        if train is None:
            raise InputError("GrowTrainer needs a train_dataset.", hint="To evaluate a model only, use transformers' Trainer.")
        named = eval_dataset if isinstance(eval_dataset, Mapping) else {} if eval_dataset is None else {"eval": eval_dataset}
        sets = {str(n): prepare_dataset(d, args, tokenizer, setup.vocabulary, remainder="keep") for n, d in named.items()}
        setup = _with_seq_length(setup, train)
        collator = data_collator or PaddingCollator(_pad_token_id(tokenizer))
        data = TrainData(train, sets, tuple(_parts(train, sets)), cast("Collator", collator), setup.seq_length)
        if not sets:
            args.eval_on_start = False
        parts = make_parts(setup, str(model) if isinstance(model, Path) else model, args.revision, notify)
        _check_optimizer(parts, *options.get("optimizers", (None, None)))
        if args.should_save:
            setup.out.mkdir(parents=True, exist_ok=True)
        super().__init__(
            model=parts.model,
            args=args,
            data_collator=collator,
            train_dataset=train,
            eval_dataset=(sets if isinstance(eval_dataset, Mapping) else sets["eval"]) if sets else None,
            processing_class=processing_class,
            growth=make_settings(setup, parts, data, notify),
            hooks=SetupHooks(setup, parts.model, data, notify),
            **options,
        )
        add_early_stopping(self, setup.options)

    def merge_and_unload(self) -> Any:
        """Merges the adapters of LoRA into the weights and returns the plain model, which `save_model` then writes. Training is over with this."""
        if not hasattr(self.model, "peft_config"):
            raise InputError("There are no adapters to merge.", hint="Set lora in GrowConfig, or call save_model directly.")
        merge_adapters(self)
        self._merged = True
        return self.model

    def train(self, resume_from_checkpoint: Any = None, **options: Any) -> Any:
        if self._merged:
            raise InputError(
                "The adapters are merged; this model cannot be trained further.",
                hint="Save it, and create a new GrowTrainer from the result.",
            )
        return super().train(resume_from_checkpoint, **options)


def _check(
    model: Any, args: Any, plan: GrowthPlan | None, regularizer: Any, processing_class: Any, eval_dataset: Any, notify: Any
) -> TrainSetup:
    if not isinstance(args, GrowConfig):
        raise InputError(
            f"args is {type(args).__name__}; GrowTrainer needs a GrowConfig.", hint="GrowConfig accepts all of TrainingArguments."
        )
    if regularizer is not None and not isinstance(regularizer, PenaltyOptions):
        raise InputError(f"regularizer is {type(regularizer).__name__}.", hint="Pass EWC(...), OnlineEWC(...), SI(...) or L2SP(...).")
    if isinstance(model, str | Path):
        if plan is not None:
            raise InputError("plan is for a model in memory; a folder has its plan in growth.json.", hint="Remove plan.")
        checkpoint = open_source(str(model), revision=args.revision, weights=False, notify=notify)
        plan = plan_of(checkpoint)
    elif isinstance(model, PreTrainedModel) and not hasattr(model, "peft_config"):
        loading = [k for k in ("revision", "attn_implementation") if getattr(args, k) is not None] + ["dtype"] * (args.dtype != "auto")
        if loading:
            raise InputError(
                f"{', '.join(loading)}: would have no effect, because the model is in memory already.",
                hint="Leave them out and set them in from_pretrained, or pass the checkpoint folder or Hub id.",
            )
        info = describe_model(model)
        record = None if plan is None else plan.to_json()
        checkpoint = Checkpoint(info.ref, info.revision, info.config, {}, {}, growth=record)
    else:
        raise InputError(
            f"model is {type(model).__name__}.", hint="Pass a checkpoint folder, a Hub id, or a PreTrainedModel without adapters."
        )
    options = args.train_options(regularizer)
    given = args.given_arguments()
    names = list(eval_dataset) if isinstance(eval_dataset, Mapping) else []
    errors = contradictions(options, given, names)
    if not eval_dataset:
        errors += missing_eval_set(options, given, "eval_dataset")
    elif args.metric_for_best_model is None and _compares_models(args):
        args.metric_for_best_model = default_best_metric(names) if names else "eval_loss"
        args.greater_is_better = bool(args.greater_is_better)
    if options.monitor.on_instability == "rollback" and str(getattr(args.train_sampling_strategy, "value", "")) != "sequential":
        errors.append(
            "monitor.on_instability: rollback needs a fixed row order. Shuffle the dataset beforehand, and set train_sampling_strategy='sequential'."
        )
    check_options(options, checkpoint, plan, processing_class, errors, notify)
    layers = checkpoint.info.architecture.layers
    collect_mistakes(errors, "activation_checkpointing", lambda: checkpointed_layers(options, args, plan, layers))
    errors += launch_mistakes(current_launch(), options, args, resume=False)
    errors += parallelism_mistakes(
        current_launch(), options, args, checkpoint, seq_length=args.seq_length, intra_document_masking=args.intra_document_masking,
        streaming=False,
    )  # fmt: skip
    raise_errors("GrowTrainer", errors)
    recorded = {
        **args.settings(),
        **({} if args.revision is None else {"revision": args.revision}),
        **({} if regularizer is None else {"regularizer": regularizer.non_defaults()}),
        **_as_json(given),
    }
    setup = TrainSetup(
        options, args, checkpoint, plan, processing_class, Path(args.output_dir), args.seq_length, recorded, given,
        save_tokenizer=processing_class is not None,
    )  # fmt: skip
    warn(setup, notify)
    return setup


def _compares_models(args: GrowConfig) -> bool:
    """Whether metric_for_best_model has a use."""
    return (
        bool(args.load_best_model_at_end or args.early_stopping_patience)
        or args.save_strategy == "best"
        or "plateau" in args.lr_scheduler_type
    )


def _check_optimizer(parts: ModelParts, optimizer: Any, scheduler: Any) -> None:
    """Raises InputError if an optimizer or scheduler that was passed does not train what the GrowConfig says."""
    if optimizer is None and scheduler is None:
        return
    hint = "Make it of the model that you pass, or pass optimizer_cls_and_kwargs=(torch.optim.AdamW, {'lr': 1e-4}) instead."
    if optimizer is None or getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise InputError(
            "The scheduler that was passed belongs to another optimizer.", hint="Pass both: optimizers=(optimizer, scheduler)."
        )
    names = {id(p): n for n, p in parts.model.named_parameters()}
    trains = {n for n, p in parameters(parts.model).items() if p.requires_grad and parts.updates.trains.get(n, True) is not False}
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if foreign := len(held - names.keys()):
        raise InputError(f"The optimizer that was passed holds {foreign} parameters that the model does not have.", hint=hint)
    lacking = [n for i, n in names.items() if bare(n) in trains and i not in held]
    if lacking:
        lora = " Adapters are added by GrowTrainer, so no optimizer made before holds them." if hasattr(parts.model, "peft_config") else ""
        raise InputError(
            f"The optimizer that was passed lacks {len(lacking)} parameters that train, such as {lacking[0]}.{lora}",
            hint=hint if lora else "Add them, or set train and freeze to match.",
        )


def _as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values that JSON has, enums by their value; others are left out."""
    plain = {k: getattr(v, "value", v) for k, v in values.items()}
    return {k: v for k, v in plain.items() if isinstance(v, str | int | float | bool)}


def _own_tokenizer(setup: TrainSetup, train: Any, evals: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the model's folder, where a dataset must be tokenised."""
    sets = [train, *(evals.values() if isinstance(evals, Mapping) else [evals])]
    if all("input_ids" in (getattr(d, "column_names", None) or ["input_ids"]) for d in sets):
        return None
    if setup.checkpoint.folder is None and setup.checkpoint.tensors == {}:
        raise InputError("The dataset has no input_ids, and there is no tokenizer.", hint="Pass processing_class=tokenizer.")
    return load_tokenizer(str(setup.checkpoint.folder or setup.checkpoint.ref), setup.checkpoint.revision or None)


def prepare_dataset(dataset: Any, args: GrowConfig, tokenizer: Any, vocabulary: int, *, remainder: str) -> Any:
    """A dataset of what the model takes: its columns, or its text tokenised and packed as `hf-grow train` does. None stays None."""
    columns = getattr(dataset, "column_names", None)
    if dataset is None or columns is None:
        return dataset
    if "input_ids" in columns:
        if "attention_mask" in columns and {"position_ids", LENGTHS} & set(columns):
            raise InputError(
                "The dataset has an attention_mask beside the positions of packed documents, and attention would cross them.",
                hint="Remove attention_mask: padding needs none at the end of a row (give it no labels).",
            )
        return dataset.select_columns([c for c in _MODEL_COLUMNS if c in columns])
    if args.text_field not in columns:
        raise InputError(
            f"The dataset has neither input_ids nor a column {args.text_field!r}; its columns are {', '.join(columns)}.",
            hint="Set text_field in GrowConfig.",
        )
    encoder = DocumentEncoder(tokenizer, "tokenizer")

    def rows() -> Iterator[dict[str, Any]]:
        import numpy as np

        carry, carried = np.empty(0, np.int32), list[int]()

        def row(sequence: Any, lengths: list[int]) -> dict[str, Any]:
            return {"input_ids": sequence, **({LENGTHS: lengths} if args.intra_document_masking else {})}

        for batch in dataset.iter(batch_size=BATCH):
            encoded = encoder(batch[args.text_field])
            sequences, carry = split_sequences(carry, encoded, args.seq_length)
            lengths, carried = split_lengths(carried, map(len, encoded), args.seq_length)
            check_token_ids(int(max(sequences.max(initial=0), carry.max(initial=0))), vocabulary, "The dataset")
            yield from map(row, sequences, lengths)
        if len(carry) and remainder == "keep":
            padding = args.seq_length - len(carry)
            yield row(np.concatenate([carry, np.full(padding, IGNORED, np.int32)]), [*carried, padding])

    packed = list(rows())
    if not packed:
        raise InputError(f"The dataset has fewer than {args.seq_length} tokens.", hint="Use more text, or a smaller seq_length.")
    return type(dataset).from_list(packed)


def _with_seq_length(setup: TrainSetup, train: Any) -> TrainSetup:
    """With the length of the first row, where rows can be read without an order."""
    from dataclasses import replace

    row = train[0] if hasattr(train, "__len__") and len(train) else None
    return setup if not isinstance(row, Mapping) or "input_ids" not in row else replace(setup, seq_length=len(row["input_ids"]))


def _pad_token_id(tokenizer: Any) -> int:
    return next((i for i in (getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None)) if i is not None), 0)


def _parts(train: Any, sets: Mapping[str, Any]) -> Iterator[DataPart]:
    """What growth.json says of the data."""
    for use, data in (("train", train), *((f"eval {n}", d) for n, d in sets.items())):
        label = getattr(getattr(data, "info", None), "dataset_name", None) or "a dataset in memory"
        yield DataPart(use, label, 1.0 if use == "train" else None, sequences=len(data) if hasattr(data, "__len__") else None)


@dataclass(frozen=True)
class PaddingCollator:
    """Rows to a batch: input_ids and labels, int64 [rows, longest row]; labels are -100 where a row is padded or its attention mask is 0.

    Rows with `position_ids` or `seq_lengths` are packed documents: see `document_masking`.
    """

    pad_token_id: int
    """Token id for padding."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        import torch
        from torch.nn.utils.rnn import pad_sequence

        ids = [torch.as_tensor(row["input_ids"]).long() for row in rows]
        labels = [torch.as_tensor(row.get("labels", row["input_ids"])).long() for row in rows]
        batch = {"input_ids": pad_sequence(ids, True, self.pad_token_id), "labels": pad_sequence(labels, True, IGNORED)}
        batch["input_ids"] = batch["input_ids"].masked_fill(batch["input_ids"] == IGNORED, self.pad_token_id)
        if "attention_mask" in rows[0]:
            mask = pad_sequence([torch.as_tensor(row["attention_mask"]).long() for row in rows], True, 0)
            batch |= {"attention_mask": mask, "labels": batch["labels"].masked_fill(mask == 0, IGNORED)}
        return with_documents(batch, position_ids(rows))
