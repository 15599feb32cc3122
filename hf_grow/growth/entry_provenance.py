"""Provenance of single entries: which source entry each entry of a grown tensor comes from, and with which gains.

An expression is decomposed into pieces. In a piece, target entry (i, j, ...) is source entry (index0[i], index1[j], ...) times
gain0[i] * gain1[j] * ... * scale, varied elementwise by `vary`. Most tensors are one piece; sums (AKI, averages) have several; noise and
constants have none. A new node registers its decomposition: ``@pieces.register`` on ``(node, plan) -> list[Piece]``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, singledispatch

import torch
from torch import Tensor

from hf_grow.growth.axes import AxisMap
from hf_grow.growth.evaluate import Evaluator
from hf_grow.growth.noise import random_subset
from hf_grow.growth.plan import GrowthPlan
from hf_grow.growth.tensormap import Concat, Expr, Replace, Scope, Share, Source, Subset, Sum, Take, Vary

Indices = tuple[Tensor, ...]
"""Per dimension, the source coordinate of every target coordinate (int64), -1 if it reads none."""


@dataclass(frozen=True)
class Piece:
    """The contribution of one source tensor to a target tensor; one vector per dimension of the target."""

    source: str
    """Its `Source.key`."""
    index: Indices
    gain: tuple[Tensor, ...]
    """Factor on weights (fp64); 0 where nothing is read."""
    back: tuple[Tensor, ...]
    """Factor on gradients (fp64), from the dual map."""
    scale: float = 1.0
    """Additional factor on both."""
    share: float = 1.0
    """Additional factor on gradients."""
    vary: tuple[tuple[Expr, Indices], ...] = ()
    """Weights are multiplied by 1 + each expression, read through the indices."""

    def coefficients(self, evaluator: Evaluator) -> Tensor:
        """Factor on the source weight of each target entry (fp64, target shape)."""
        out = outer(self.gain) * self.scale
        for by, index in self.vary:
            out = out * (1 + gather(evaluator.rows(by, 0, by.shape(evaluator.scope)[0]).double(), index))
        return out

    def gradient_coefficients(self) -> Tensor:
        """Factor on gradients, which ignore `vary` (fp64, target shape)."""
        return outer(self.back) * (self.scale * self.share)

    def alive(self) -> Indices:
        """Per dimension, the coordinates that read the source and also pass gradients back (bool)."""
        return tuple((i >= 0) & (g != 0) & (b != 0) for i, g, b in zip(self.index, self.gain, self.back, strict=True))

    def first(self) -> Indices:
        """Per dimension, the first `alive` copy of each source coordinate (bool)."""
        return tuple(_first(index, alive) for index, alive in zip(self.index, self.alive(), strict=True))


def _first(index: Tensor, alive: Tensor) -> Tensor:
    places = torch.nonzero(alive).flatten()
    values, order = torch.sort(index[places], stable=True)
    starts = torch.ones_like(values, dtype=torch.bool)
    starts[1:] = values[1:] != values[:-1]
    mask = torch.zeros_like(alive)
    mask[places[order[starts]]] = True
    return mask


def outer(vectors: tuple[Tensor, ...]) -> Tensor:
    """Outer product of one vector per dimension (logical and for bools)."""
    out = vectors[0]
    for vector in vectors[1:]:
        out = out.unsqueeze(-1) & vector if vector.dtype == torch.bool else out.unsqueeze(-1) * vector
    return out


def gather(tensor: Tensor, index: Indices) -> Tensor:
    """Source entries at the target's indices; entries that read nothing get an arbitrary value, to be multiplied by a gain of zero."""
    for dim, at in enumerate(index):
        if len(at) != tensor.shape[dim] or not torch.equal(at.cpu(), torch.arange(len(at))):
            tensor = tensor.index_select(dim, at.clamp(min=0).to(tensor.device))
    return tensor


def scatter_add(tensor: Tensor, index: Indices, shape: tuple[int, ...]) -> Tensor:
    """Adjoint of `gather`: each source entry is the sum of the target entries that read it; those that read nothing must be zero."""
    for dim, at in enumerate(index):
        if len(at) != shape[dim] or not torch.equal(at.cpu(), torch.arange(len(at))):
            whole = tensor.new_zeros(*tensor.shape[:dim], shape[dim], *tensor.shape[dim + 1 :])
            tensor = whole.index_add_(dim, at.clamp(min=0).to(tensor.device), tensor)
    return tensor


def trace(plan: GrowthPlan, name: str) -> list[Piece]:
    """The pieces of one target tensor. Raises TypeError for a node without a registered decomposition."""
    return pieces(plan.growth.tensors[name], plan)


@singledispatch
def pieces(expr: Expr, plan: GrowthPlan) -> list[Piece]:
    if next(expr.children(), None) is not None and getattr(expr, "like", None) is None:
        raise TypeError(f"no decomposition is registered for {type(expr).__name__}")
    return []  # constants and noise, including noise scaled by a source


@pieces.register
def _(expr: Source, plan: GrowthPlan) -> list[Piece]:
    shape = plan.source.scope_shapes[expr.key]
    ones = tuple(torch.ones(n, dtype=torch.float64) for n in shape)
    return [Piece(expr.key, tuple(torch.arange(n) for n in shape), ones, ones)]


@pieces.register
def _(expr: Take, plan: GrowthPlan) -> list[Piece]:
    inner = pieces(expr.of, plan)
    if not inner:
        return []
    dim, (index, gain, back) = expr.dim, _vectors(plan.growth.axes[expr.axis], expr.role)

    def taken(vectors: tuple[Tensor, ...], factor: Tensor | None = None) -> tuple[Tensor, ...]:
        values = vectors[dim][index.clamp(min=0)]
        values = torch.where(index < 0, -1, values) if factor is None else values * factor
        return (*vectors[:dim], values, *vectors[dim + 1 :])

    return [
        replace(
            p,
            index=taken(p.index),
            gain=taken(p.gain, gain),
            back=taken(p.back, back),
            vary=tuple((by, taken(at)) for by, at in p.vary),
        )
        for p in inner
    ]


@lru_cache(maxsize=32)
def _vectors(axis: AxisMap, role: str) -> tuple[Tensor, Tensor, Tensor]:
    """Source coordinate, weight gain and gradient gain of every target coordinate."""
    lengths = torch.tensor([r.length for r in axis.runs])
    begins = torch.cumsum(lengths, 0) - lengths
    start = torch.tensor([-1 if r.start is None else r.start for r in axis.runs]).repeat_interleave(lengths)
    inside = torch.arange(len(start)) - begins.repeat_interleave(lengths)

    def gains(quantity: str) -> Tensor:
        values = [0.0 if r.start is None else r.gain(role, quantity) for r in axis.runs]  # type: ignore[arg-type]
        return torch.tensor(values, dtype=torch.float64).repeat_interleave(lengths)

    return torch.where(start < 0, -1, start + inside), gains("weight"), gains("grad")


@pieces.register
def _(expr: Subset, plan: GrowthPlan) -> list[Piece]:
    scope = Scope(plan.source.scope_shapes, plan.growth.axes)
    chosen = torch.from_numpy(random_subset(plan.growth.seed, expr.key, expr.of.shape(scope)[expr.dim], expr.count).copy())
    return [_moved(p, expr.dim, lambda vector, nothing: vector[chosen]) for p in pieces(expr.of, plan)]


@pieces.register
def _(expr: Replace, plan: GrowthPlan) -> list[Piece]:
    scope = Scope(plan.source.scope_shapes, plan.growth.axes)
    size, count = (e.shape(scope)[expr.dim] for e in (expr.of, expr.by))
    chosen = torch.from_numpy(random_subset(plan.growth.seed, expr.key, size, count).copy())

    def placed(vector: Tensor, nothing: float) -> Tensor:
        return vector.new_full((size,), nothing).index_copy(0, chosen, vector)

    kept = [_moved(p, expr.dim, lambda vector, nothing: vector.index_fill(0, chosen, nothing)) for p in pieces(expr.of, plan)]
    return kept + [_moved(p, expr.dim, placed) for p in pieces(expr.by, plan)]


def _moved(piece: Piece, dim: int, move: Callable[[Tensor, float], Tensor]) -> Piece:
    """The piece with `move` applied to the vectors of one dimension; its second argument is the value for coordinates that read nothing."""

    def moved(vectors: tuple[Tensor, ...], nothing: float) -> tuple[Tensor, ...]:
        return (*vectors[:dim], move(vectors[dim], nothing), *vectors[dim + 1 :])

    return replace(
        piece,
        index=moved(piece.index, -1),
        gain=moved(piece.gain, 0.0),
        back=moved(piece.back, 0.0),
        vary=tuple((by, moved(index, -1)) for by, index in piece.vary),
    )


@pieces.register
def _(expr: Sum, plan: GrowthPlan) -> list[Piece]:
    terms = zip(expr.terms, expr.weights, strict=True)
    return [replace(p, scale=p.scale * weight) for term, weight in terms for p in pieces(term, plan)]


@pieces.register
def _(expr: Vary, plan: GrowthPlan) -> list[Piece]:
    whole = tuple(torch.arange(n) for n in expr.by.shape(Scope(plan.source.scope_shapes, plan.growth.axes)))
    return [replace(p, vary=(*p.vary, (expr.by, whole))) for p in pieces(expr.of, plan)]


@pieces.register
def _(expr: Share, plan: GrowthPlan) -> list[Piece]:
    return [replace(p, share=p.share * expr.share) for p in pieces(expr.of, plan)]


@pieces.register
def _(expr: Concat, plan: GrowthPlan) -> list[Piece]:
    scope = Scope(plan.source.scope_shapes, plan.growth.axes)
    lengths = [part.shape(scope)[expr.dim] for part in expr.parts]
    result: list[Piece] = []
    at = 0
    for part, length in zip(expr.parts, lengths, strict=True):

        def padded(vector: Tensor, nothing: float, pad: tuple[int, int] = (at, sum(lengths) - at - length)) -> Tensor:
            return torch.nn.functional.pad(vector, pad, value=nothing)

        result += [_moved(p, expr.dim, padded) for p in pieces(part, plan)]
        at += length
    return result
