"""Growing a `PreTrainedModel` in memory.

The plan is evaluated on tensors under their checkpoint names, so the result has the same tensors as the files that the command writes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, cast

from hf_grow.errors import SourceError
from hf_grow.growth.evaluate import Evaluator
from hf_grow.growth.plan import HEAD, GrowthPlan
from hf_grow.growth.source_info import DTYPE_NAMES, SourceInfo, TensorInfo
from hf_grow.growth.tensormap import Source
from hf_grow.growth.tensors import InMemoryTensors
from hf_grow.model.loading import transformers_errors

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

_DTYPES = {name: short for short, name in DTYPE_NAMES.items()}


def disk_names(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Converts tensors keyed by the model's parameter names (weights, gradients, moments) to the names and layout on disk."""
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, dict(tensors)))


def disk_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The model's weights by checkpoint name: experts separate, although transformers fuses them in memory; a tied head stored once."""
    state = disk_names(model, model.state_dict())
    if has_tied_head(model):
        state.pop(HEAD, None)
    return state


def has_tied_head(model: PreTrainedModel) -> bool:
    """Whether head and embedding are tied. `tie_word_embeddings` alone does not tell: transformers 5 does not tie weights that are stored
    with different values."""
    import torch

    head, embedding = (layer.weight for layer in (model.get_output_embeddings(), model.get_input_embeddings()))
    if not model.config.tie_word_embeddings or head is embedding:
        return bool(model.config.tie_word_embeddings)
    return head.dtype == embedding.dtype and torch.equal(head, embedding)


def untie_config(model: PreTrainedModel) -> None:
    """Sets `tie_word_embeddings` to False if the loaded head differs from the embedding, so that the model is saved and loaded that way."""
    if model.config.tie_word_embeddings and not has_tied_head(model):
        model.config.tie_word_embeddings = False


def describe_model(model: PreTrainedModel) -> SourceInfo:
    """The `SourceInfo` of a model in memory, for planning. Raises SourceError for an unsupported dtype."""
    tensors = {}
    for name, tensor in disk_tensors(model).items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in _DTYPES:
            raise SourceError(f"{name} has dtype {dtype}, which is not supported; supported: {', '.join(_DTYPES)}.")
        tensors[name] = TensorInfo(_DTYPES[dtype], tuple(tensor.shape))
    config = model.config.to_diff_dict() | {"model_type": model.config.model_type, "dtype": str(model.dtype).removeprefix("torch.")}
    own = model.config.tie_word_embeddings and not has_tied_head(model)
    if own:
        config["tie_word_embeddings"] = False
    return SourceInfo(model.config.name_or_path or "(in memory)", "", config, tensors, head="own" if own else "")


def grow_model(model: PreTrainedModel, plan: GrowthPlan, others: Mapping[str, PreTrainedModel] = MappingProxyType({})) -> PreTrainedModel:
    """The grown model, on the CPU, in the same dtype and mode (train or eval) as `model`, which is not changed.

    ``plan`` comes from ``hf_grow.plan(model, ...)``, or from the checkpoint that the model was loaded from in its own dtype. ``others``: the
    further source models, by the labels of the plan.
    Raises SourceError if the model is not the one that was planned for.
    """
    held = {name: tensor.detach().cpu() for name, tensor in disk_tensors(model).items()}
    for label, other in others.items():
        held |= {Source(name, label).key: tensor.detach().cpu() for name, tensor in disk_tensors(other).items()}
    wrong = [
        n for n, t in plan.source.by_key.items() if n not in plan.growth.dropped and (n not in held or tuple(held[n].shape) != t.shape)
    ]
    # An untied head, which a plan made from file headers alone assumes to be tied.
    infos = {"": plan.source, **plan.source.donors}
    wrong += [key for label, info in infos.items() if info.architecture.tied and (key := Source(HEAD, label).key) in held]
    if wrong:
        raise SourceError(
            f"The plan is for another model: {wrong[0]} has another shape here, or is missing, or is tied ({len(wrong)} such tensors).",
            hint="Plan with hf_grow.plan(model, ...).",
        )
    evaluator = Evaluator(plan, InMemoryTensors(held))
    copies = plan.copies()
    state = {
        name: held[copies[name]].clone() if name in copies else evaluator.whole(plan.growth.tensors[name], info)
        for name, info in plan.targets.items()
    }
    kept = {f"{part}_implementation": getattr(model.config, f"_{part}_implementation", None) for part in ("attn", "experts")}
    grown = build_model(plan, state, model.dtype, **{k: v for k, v in kept.items() if v})
    # One derived from the config would lack sampling settings and further EOS tokens.
    grown.generation_config = copy.deepcopy(model.generation_config)
    grown.train(model.training)
    return grown


def build_model(plan: GrowthPlan, state: Mapping[str, Tensor], dtype: torch.dtype, **implementations: str) -> PreTrainedModel:
    """The plan's target model from its tensors by checkpoint name."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    config = dict(plan.growth.config)
    with transformers_errors("the grown model"):
        target = AutoConfig.for_model(config.pop("model_type"), **config)
        made = MODEL_FOR_CAUSAL_LM_MAPPING[type(target)].from_pretrained(
            None, config=target, state_dict=dict(state), dtype=dtype, **implementations
        )
    return cast("PreTrainedModel", made)
