"""Learning rates with which AdamW on the grown model repeats the steps of AdamW on the source model exactly.

Gradients map by G' = B_out G A_in^T, and Adam is invariant to their scale, so the update of entry (i, j) of a grown tensor is that of its source
entry; but weights map by W' = A_out W B_in^T, so it must count a_i b_j times: the factor on the learning rate is the *weight* map of ones. It is 1
on embeddings, norms and tensors of which only rows grew; 1/n on columns grown n times; 1/n on the last norm before a tied head. Decoupled weight
decay is lr * decay, so decay is divided by the same factor; eps is multiplied by the gradient map of ones.

Exact where a tensor has one factor (integer growth factors, equal numbers of copies); elsewhere its most common one is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hf_grow.growth.plan import GrowthPlan
from hf_grow.growth.source_info import TensorInfo
from hf_grow.growth.tensormap import Expr, Noise, Quantity
from hf_grow.model.meta_model import meta_model, to_memory_names, trainer_param_groups

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class StepFactors:
    """Factors of one parameter on learning rate and eps; weight decay is divided by `lr`."""

    lr: float
    eps: float


def step_factors(plan: GrowthPlan) -> dict[str, StepFactors]:
    """The factors of every parameter of the grown model, by its name in memory."""
    target = meta_model(plan.growth.config)
    lr, eps = (_most_common_values(to_memory_names(target, _map_of_ones(plan, q))) for q in ("weight", "grad"))
    return {name: StepFactors(lr[name], eps[name]) for name in lr}


def _map_of_ones(plan: GrowthPlan, quantity: Quantity) -> dict[str, Any]:
    """The map applied to source tensors of ones; without noise."""
    import torch

    from hf_grow.growth.evaluate import Evaluator
    from hf_grow.growth.tensors import InMemoryTensors

    def without_noise(expr: Expr) -> Expr:
        return replace(expr, std=0.0, like=None) if isinstance(expr, Noise) else expr.map_children(without_noise)

    ones = InMemoryTensors({n: torch.ones(t.shape) for n, t in plan.source.by_key.items()})
    evaluator = Evaluator(plan, ones, quantity)
    return {n: evaluator.whole(without_noise(e), TensorInfo("F32", plan.targets[n].shape)) for n, e in plan.growth.tensors.items()}


def _most_common_values(tensors: Mapping[str, Any]) -> dict[str, float]:
    """The most common nonzero value of each tensor (new entries have no old step to repeat); 1 if all are zero."""
    common = {}
    for name, tensor in tensors.items():
        values, counts = tensor[tensor != 0].unique(return_counts=True)
        common[name] = float(values[counts.argmax()]) if len(values) else 1.0
    return common


def split_by_factors(names: Iterable[str], factors: Mapping[str, StepFactors]) -> dict[StepFactors, list[str]]:
    """Groups of names with equal factors, in order of first appearance."""
    split: dict[StepFactors, list[str]] = {}
    for name in names:
        split.setdefault(factors[name], []).append(name)
    return split


def param_groups(
    model: PreTrainedModel, plan: GrowthPlan, *, lr: float, weight_decay: float = 0.0, eps: float = 1e-8
) -> list[dict[str, Any]]:
    """Parameter groups for AdamW on the grown `model`, split by weight decay as Trainer does, each with its own factors.

    Use them as ``Trainer(model, args, optimizers=(torch.optim.AdamW(param_groups(...)), None))``; `grow_trainer_state` with
    ``exact_steps`` writes the state for it.
    """
    parameters, factors = dict(model.named_parameters()), step_factors(plan)
    return [
        {"params": [(n, parameters[n]) for n in group], "lr": lr * f.lr, "weight_decay": decay / f.lr, "eps": eps * f.eps}
        for members, decay in zip(trainer_param_groups(model), (weight_decay, 0.0), strict=True)
        for f, group in split_by_factors(members, factors).items()
    ]
