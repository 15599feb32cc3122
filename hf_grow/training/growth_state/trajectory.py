"""Learning rates with which AdamW on the grown model repeats the steps of AdamW on the source model exactly.

Gradients map by G' = B_out G A_in^T and Adam is blind to scale, so the update of entry (i, j) of a grown tensor is that of its source entry; but
weights map by W' = A_out W B_in^T, so it must count a_i b_j times: the factor on the learning rate is what the *weight* map makes of ones.
In words: 1 on embeddings, norms and whatever only grew rows; 1/n on columns grown n times; 1/n on the last norm before a tied head. Decoupled
weight decay is lr * decay, so decay divides by the same factor; eps multiplies by what the gradient map makes of ones.

Exact where a tensor has one factor (whole factors, even copies); elsewhere its most common one is taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hf_grow.growth.plan import GrowthPlan
from hf_grow.growth.source_info import TensorInfo
from hf_grow.growth.tensormap import Expr, Noise, Quantity
from hf_grow.model.meta_model import meta_model, to_memory_names, trainer_param_groups

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Steps:
    """Factors of one parameter on learning rate and eps; weight decay divides by `lr`."""

    lr: float
    eps: float


def rule(plan: GrowthPlan) -> dict[str, Steps]:
    """The factors of every parameter of the grown model, by its name in memory."""
    target = meta_model(plan.growth.config)
    lr, eps = (_common(to_memory_names(target, _of_ones(plan, q))) for q in ("weight", "grad"))
    return {name: Steps(lr[name], eps[name]) for name in lr}


def _of_ones(plan: GrowthPlan, quantity: Quantity) -> dict[str, Any]:
    """The map applied to source tensors of ones; without noise."""
    import torch

    from hf_grow.growth.evaluate import Evaluator
    from hf_grow.growth.tensors import InMemoryTensors

    def quiet(expr: Expr) -> Expr:
        return replace(expr, std=0.0, like=None) if isinstance(expr, Noise) else expr.map_children(quiet)

    held = InMemoryTensors({n: torch.ones(t.shape) for n, t in plan.source.by_key.items()})
    evaluator = Evaluator(plan, held, quantity)
    return {n: evaluator.whole(quiet(e), TensorInfo("F32", plan.targets[n].shape)) for n, e in plan.growth.tensors.items()}


def _common(tensors: Mapping[str, Any]) -> dict[str, float]:
    """The most common value of each tensor that is not zero (new entries have no old step to repeat); 1 where there is none."""
    out = {}
    for name, tensor in tensors.items():
        values, counts = tensor[tensor != 0].unique(return_counts=True)
        out[name] = float(values[counts.argmax()]) if len(values) else 1.0
    return out


def by_steps(names: Iterable[str], steps: Mapping[str, Steps]) -> Iterator[tuple[Steps, list[str]]]:
    """Groups of names with equal factors, in order of first appearance."""
    found: dict[Steps, list[str]] = {}
    for name in names:
        found.setdefault(steps[name], []).append(name)
    yield from found.items()


def groups(model: PreTrainedModel, plan: GrowthPlan, *, lr: float, weight_decay: float = 0.0, eps: float = 1e-8) -> list[dict[str, Any]]:
    """Parameter groups for AdamW on the grown `model`, split by weight decay as Trainer does, each with its own factors.

    Use them as ``Trainer(model, args, optimizers=(torch.optim.AdamW(groups(...)), None))``; `carry` with ``exact_steps`` writes the state for it.
    """
    parameters, steps = dict(model.named_parameters()), rule(plan)
    return [
        {"params": [(n, parameters[n]) for n in chosen], "lr": lr * s.lr, "weight_decay": decay / s.lr, "eps": eps * s.eps}
        for members, decay in zip(trainer_param_groups(model), (weight_decay, 0.0), strict=True)
        for s, chosen in by_steps(members, steps)
    ]
