"""What a plan makes of a tensor, by matrices: every axis map as a dense matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_grow.growth.axes import AxisMap
from hf_grow.growth.plan import GrowthPlan
from hf_grow.growth.tensormap import Expr, Generated, Share, Source, Sum, Take, Vary


def matrix(axis: AxisMap, of: str) -> Tensor:
    """A (of activations) or B (of gradients), in fp64."""
    out = torch.zeros(axis.target_size, axis.source_size, dtype=torch.float64)
    for i, (source, a, b) in enumerate(axis.rows()):
        if source is not None:
            out[i, source] = a if of == "a" else b
    return out


def mapped(plan: GrowthPlan, expr: Expr, tensors: dict[str, Tensor], quantity: str) -> Tensor:
    """W' = A_out W B_in^T, G' = B_out G A_in^T, V' = B_out^2 V (A_in^2)^T."""
    power = 2 if quantity == "grad2" else 1
    match expr:
        case Source():
            return tensors[expr.key].double()
        case Take():
            inner = mapped(plan, expr.of, tensors, quantity)
            grows_as_weight = (expr.role == "out") == (quantity == "weight")
            dense = matrix(plan.growth.axes[expr.axis], "a" if grows_as_weight else "b") ** power
            return torch.tensordot(dense, inner, ([1], [expr.dim])).movedim(0, expr.dim)
        case Share():
            inner = mapped(plan, expr.of, tensors, quantity)
            return inner if quantity == "weight" else inner * expr.share**power
        case Sum():
            terms = [mapped(plan, t, tensors, quantity) * w**power for t, w in zip(expr.terms, expr.weights, strict=True)]
            return torch.stack(terms).sum(0)
        case Generated() if quantity != "weight":
            return torch.zeros(expr.size, dtype=torch.float64)
        case Vary() if quantity != "weight":
            return mapped(plan, expr.of, tensors, quantity)
    raise AssertionError(f"{type(expr).__name__} is not of matrices")
