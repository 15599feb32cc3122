"""The model of a training: its weights, which parameters are new and train when, LoRA, and its FLOPs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hf_grow.checkpoint.reader import Checkpoint
from hf_grow.checkpoint.source import open_source
from hf_grow.convert.in_memory import untie_config
from hf_grow.errors import InputError, SourceError
from hf_grow.growth.plan import GrowthPlan
from hf_grow.model.flops import ModelFlops, count_flops
from hf_grow.model.loading import reset_output_flags, transformers_errors
from hf_grow.model.meta_model import check_runs, meta_model
from hf_grow.training.config.lora_options import LoraOptions
from hf_grow.training.config.train_options import TrainOptions
from hf_grow.training.param_updates import param_provenance
from hf_grow.training.param_updates.masks import EVERYTHING, Mask, select
from hf_grow.training.param_updates.param_flops import training_of
from hf_grow.training.param_updates.parameter_map import parameter_map
from hf_grow.training.param_updates.residual_scale import ResidualScale
from hf_grow.training.param_updates.updates import ParamUpdates
from hf_grow.training.peft import lora
from hf_grow.training.setup.activation_checkpointing import checkpointed_layers, new_layers
from hf_grow.training.setup.train_setup import Notify, TrainSetup
from hf_grow.training.sharding.row_source import RowSource, StoredRows
from hf_grow.training.sharding.sharded_model import empty_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ModelUpdates:
    """Which entries of which parameters are new, and which train."""

    updates: ParamUpdates
    new: Mapping[str, Mask]
    new_blocks: tuple[int, ...]
    """Decoder layers that the growth added."""


def weights_dtype(dtype: str, checkpoint: Checkpoint) -> str:
    """The dtype to load weights in. ``auto`` is float32, whatever the checkpoint is stored in and autocast computes in (float64 stays float64).

    In bf16 most steps are lost to rounding; in fp16 Adam's epsilon is zero and squared gradients underflow.
    """
    if dtype != "auto":
        return dtype
    return "float64" if any(t.dtype == "F64" for t in checkpoint.info.tensors.values()) else "float32"


def load_model(ref: str, revision: str | None, dtype: str, attention: str | None, notify: Notify) -> PreTrainedModel:
    """The model of a checkpoint, its weights downloaded if need be. Raises SourceError for what cannot be loaded whole."""
    from transformers import AutoModelForCausalLM

    checkpoint = open_source(ref, revision=revision, weights=True, notify=notify)
    assert checkpoint.folder is not None
    options = {} if attention is None else {"attn_implementation": attention}
    with transformers_errors(f"the model of {ref}"):
        model, loading_info = AutoModelForCausalLM.from_pretrained(
            checkpoint.folder, dtype=dtype, trust_remote_code=False, output_loading_info=True, **options
        )
    missing = sorted(loading_info["missing_keys"])
    if missing:
        raise SourceError(f"The weights of {ref} lack {len(missing)} tensors, such as {missing[0]}, which would be initialized at random.")
    loaded: PreTrainedModel = model
    untie_config(loaded)
    reset_output_flags(loaded.config)
    return loaded


def stored_dtype(checkpoint: Checkpoint) -> str:
    """What `from_pretrained` takes for ``auto``: the dtype that config.json names, else that of the first floating weights."""
    named = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    floating = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
    return str(named or next(floating[t.dtype] for t in checkpoint.info.tensors.values() if t.dtype in floating))


def frozen_model(
    ref: str, revision: str | None, dtype: str, attention: str | None, notify: Notify, *, sharded: bool
) -> tuple[PreTrainedModel, RowSource | None]:
    """A model that only computes forward: with its weights and None, or, where it will be ``sharded``, on the meta device and what fills it."""
    if not sharded:
        return load_model(ref, revision, dtype, attention, notify), None
    import torch

    checkpoint = open_source(ref, revision=revision, weights=True, notify=notify)
    found = getattr(torch, stored_dtype(checkpoint) if dtype == "auto" else dtype)
    return empty_model(checkpoint.config, found, checkpoint.folder, attention), StoredRows(checkpoint)


def plan_updates(model: PreTrainedModel, plan: GrowthPlan | None, options: TrainOptions) -> ModelUpdates:
    """Masks of what is new and what trains. Raises InputError where the options name a part that this model does not have."""
    names = [n for n, _ in model.named_parameters()]
    new = param_provenance.new_masks(model, plan)
    wanted = {p for p in (*options.train, *options.freeze, *(q for phase in options.phases for q in phase.train)) if p != EVERYTHING}
    parts = param_provenance.parts(model, plan) if wanted else {}
    trains = select(names, parts, options.train, excluded=options.freeze)
    phases = [select(names, parts, phase.train) for phase in options.phases]
    return ModelUpdates(ParamUpdates(trains, new, phases), new, new_layers(plan))


def zero_new_blocks(model: PreTrainedModel, plan: GrowthPlan) -> None:
    """Sets to zero what new blocks write to the residual stream, so that they start as identity blocks."""
    import torch

    rows, parameters = parameter_map(model), dict(model.named_parameters())
    with torch.no_grad():
        for name in residual_writers_of_new_blocks(plan):
            rows[name].of(parameters[rows[name].parameter]).zero_()


def residual_writers_of_new_blocks(plan: GrowthPlan) -> list[str]:
    """Names on disk of the tensors with which new blocks write to the residual stream."""
    return [n for n, e in plan.architecture.tensors.items() if e.writes_residual and plan.growth.layers[e.layer].new]


def make_residual_scale(model: Any, new_blocks: Sequence[int], options: TrainOptions) -> ResidualScale | None:
    """For new blocks that are blended in or measured; None where there are none. Raises InputError if the options need them all the same."""
    if new_blocks:
        return ResidualScale(model, new_blocks)
    if options.warmup.alpha_steps or options.monitor.contribution_steps:
        raise InputError("warmup.alpha_steps and monitor.contribution_steps need new blocks, and this model has none.")
    return None


def with_lora(model: PreTrainedModel, new: Mapping[str, Mask], options: LoraOptions) -> tuple[Any, ParamUpdates]:
    """The peft model, and what trains in it under its names."""
    wrapped = lora.add_lora(model, options, new)
    full = set(lora.fully_trained_parameters(wrapped))
    names = {n: bool(p.requires_grad) for n, p in wrapped.named_parameters()}
    return wrapped, ParamUpdates(names, {n: n in full for n in names})


def step_flops(setup: TrainSetup, model: Any = None) -> ModelFlops:
    """The matrix products of a training, with what the options freeze, add or compute again. Raises SourceError for a model that cannot be run.

    ``model``: as it trains, on the meta device; default: made here.
    """
    config, arguments = setup.checkpoint.info.config, setup.arguments
    if model is None:
        model = meta_model(config)
        planned = plan_updates(model, setup.plan, setup.options)
        planned.updates.freeze(model)
        if setup.options.lora is not None:
            model, _ = with_lora(model, planned.new, setup.options.lora)
    check_runs(model)
    training = replace(
        training_of(model, attention=attention_of(model, setup.options)),
        checkpointed=checkpointed_layers(setup.options, arguments, setup.plan, setup.checkpoint.info.architecture.layers),
        embeddings_require_grad=bool(arguments.activation_checkpointing),
        reentrant=bool((arguments.activation_checkpointing_kwargs or {}).get("use_reentrant")),
    )
    return count_flops(config, training)


def attention_of(model: Any, options: TrainOptions) -> str:
    """The attention implementation: the options', else the model's own."""
    return str(options.attn_implementation or model.config._attn_implementation)
