"""Models without weights (on the meta device): their parameter names, Trainer's parameter groups, and tensors renamed for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hf_grow.model.loading import reset_output_flags, transformers_errors

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def meta_model(config: Mapping[str, Any]) -> PreTrainedModel:
    """The model of a config.json on the meta device. Raises SourceError for values that transformers does not take."""
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    settings = dict(config)
    kind = settings.pop("model_type")
    with transformers_errors(f"a model of these settings ({kind})"), torch.device("meta"):
        made = AutoConfig.for_model(kind, **settings)
        reset_output_flags(made)
        # Not by from_config: under DeepSpeed that would cut the model into pieces, which have no shape.
        model: PreTrainedModel = MODEL_FOR_CAUSAL_LM_MAPPING[type(made)](made)
    return model


def check_runs(model: Any) -> None:
    """Runs a model on the meta device (adapters too) on two tokens. Raises SourceError where transformers loads a config and cannot run it."""
    import torch

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    attention = base.config._attn_implementation
    base.set_attn_implementation("eager")
    base.set_experts_implementation("batched_mm")  # independent of the routing, which meta tensors do not have
    for module in base.modules():
        if isinstance(getattr(module, "rope_type", None), str):
            module.rope_type = "default"  # dynamic types read position values
    # An explicit mask, since transformers would read tensor values to build one.
    ids, mask = torch.zeros(1, 2, dtype=torch.int64, device="meta"), torch.zeros(1, 1, 2, 2, device="meta")
    with transformers_errors("the model", does="run"), torch.no_grad():
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    base.set_attn_implementation(attention)


def to_memory_names(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames tensors from names on disk to the model's parameter names (experts fused), by loading them as weights."""
    import torch

    own = {n for n, _ in model.named_parameters()}
    if own <= tensors.keys():
        return {n: tensors[n] for n in own}
    loaded = type(model).from_pretrained(None, config=model.config, state_dict=tensors, dtype=torch.float32)
    return {n: p.detach() for n, p in loaded.named_parameters()}


def trainer_param_groups(model: PreTrainedModel) -> list[list[str]]:
    """Parameter names of Trainer's two optimizer groups (with and without weight decay), in optimizer order."""
    from transformers import Trainer

    decayed = set(Trainer.get_decay_parameter_names(None, model))
    every = [n for n, _ in model.named_parameters()]
    return [[n for n in every if n in decayed], [n for n in every if n not in decayed]]
