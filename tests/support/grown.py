"""Growing tiny models in the tests of width growth: plans, grown models, and gradients by their names on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_grow.api import find_method, plan
from hf_grow.checkpoint.reader import open_folder
from hf_grow.checkpoint.writer import DEFAULT_SHARD_SIZE, layout
from hf_grow.convert.execute import execute
from hf_grow.convert.in_memory import describe_model, disk_names, grow_model
from hf_grow.growth.evaluate import Evaluator
from hf_grow.growth.growth import Growth, compose
from hf_grow.growth.plan import GrowthPlan, make_plan
from hf_grow.growth.tensormap import Quantity
from hf_grow.growth.tensors import InMemoryTensors
from hf_grow.model.architecture import Architecture
from hf_grow.options import parse
from hf_grow.training.param_updates.masks import Mask, RowMask

SMOLLM2_135M = {
    "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True, "rms_norm_eps": 1e-5,
}  # fmt: skip
"""134.5 million parameters, which is called 135M."""


def growth_of(config: Any, method: str, **options: Any) -> Growth:
    """Options as a recipe gives them."""
    found = find_method(method)
    return found.build(Architecture(config), parse(found.options, options, where="test", strict=False))


def plan_of(model: PreTrainedModel, method: str, /, *, deeper: str = "", **options: Any) -> GrowthPlan:
    """A width plan; ``deeper`` composes it with two identity blocks, 'after' or 'before' the width."""
    info = describe_model(model)
    if deeper == "before":
        first = growth_of(info.config, "identity", layers_to=model.config.num_hidden_layers + 2)
        return make_plan(info, compose(first, growth_of(first.config, method, **options)))
    growth = growth_of(info.config, method, **options)
    if deeper == "after":
        growth = compose(growth, growth_of(growth.config, "identity", layers_to=model.config.num_hidden_layers + 2))
    return make_plan(info, growth)


def grown_by(model: PreTrainedModel, method: str, /, **options: Any) -> PreTrainedModel:
    return grow_model(model, plan_of(model, method, **options))


def write(
    source: Path, out: Path, method: str, options: dict[str, Any], *, max_shard_size: int = DEFAULT_SHARD_SIZE, **settings: Any
) -> None:
    """A growth written with settings that a user may not give, such as a memory budget of one byte."""
    made = plan(source, method, **options)
    execute(made, open_folder(source), out, layout(made.targets, max_shard_size), **settings)


def through(plan: GrowthPlan, tensors: dict[str, Tensor], quantity: Quantity) -> dict[str, Tensor]:
    """Every target tensor as the map makes it of source tensors, which may be weights, gradients or squared gradients."""
    evaluator = Evaluator(plan, InMemoryTensors(tensors), quantity)
    return {name: evaluator.whole(expr, plan.targets[name]) for name, expr in plan.growth.tensors.items()}


def gradients(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """The gradients of the loss by their names on disk; zero for experts that no token reached."""
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    return disk_names(model, {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()})


def dense_mask(mask: Mask, shape: Sequence[int]) -> Tensor:
    """A mask as a bool tensor."""
    return mask.dense() if isinstance(mask, RowMask) else torch.full(tuple(shape), mask)
