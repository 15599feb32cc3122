"""EWC in the source's coordinates, after width growth: 1/2 lambda sum F (C(W') - W)^2 with C(W') = B_out^T W' A_in.

B^T A = I, so C inverts the growth: at the start C(W') = W exactly, whatever symmetry breaking added. Copies may drift apart at no cost as long as what
they compute together in the source's coordinates stays; new coordinates are free. F and W have the source's size. The gradient is the growth's own
gradient map: lambda B_out [F (C(W') - W)] A_in^T.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_grow.errors import InputError
from hf_grow.growth.entry_provenance import Piece, gather, scatter_add, trace
from hf_grow.growth.evaluate import Evaluator
from hf_grow.growth.plan import GrowthPlan
from hf_grow.growth.tensors import InMemoryTensors
from hf_grow.training.param_updates.parameter_map import ParameterRows, parameters
from hf_grow.training.param_updates.shards import is_sharded
from hf_grow.training.regularizers.importance_file import ImportanceFile
from hf_grow.training.regularizers.penalty import AnchoredPenalty, at_least_fp32

_MAP_INSTEAD = "Map the Fisher instead (hf-grow fisher GROWN --from-growth SOURCE_FISHER -o FILE), and remove collapsed."


@dataclass
class _Holder:
    """A target tensor that holds (part of) a source tensor."""

    name: str
    piece: Piece

    def collapse(self, weight: Tensor, shape: tuple[int, ...]) -> Tensor:
        """B_out^T W' A_in of this part: [source shape]."""
        return scatter_add(self._scaled(weight), self.piece.index, shape)

    def expand(self, gradient: Tensor) -> Tensor:
        """B_out G A_in^T: a gradient [source shape] as one of this tensor."""
        return self._scaled(gather(gradient, self.piece.index))

    def _scaled(self, tensor: Tensor) -> Tensor:
        for dim, gain in enumerate(self.piece.back):
            if bool((gain != 1).any()):
                tensor = tensor * gain.to(tensor).view([-1 if d == dim else 1 for d in range(tensor.dim())])
        factor = self.piece.scale * self.piece.share
        return tensor if factor == 1 else tensor * factor


class SourceCoordinatePenalty(AnchoredPenalty):
    """EWC on C(W').

    Args:
        strength: lambda.
        plan: of the growth.
        weights: the grown model's at the start, by names on disk.
        rows: where each tensor on disk lies in the model's parameters (`parameter_map`).
        fisher: of the source.
        storage: dtype of F and W.

    Raises InputError for a growth that C does not invert.
    """

    name = "ewc-collapsed"

    def __init__(
        self,
        strength: float,
        plan: GrowthPlan,
        weights: Mapping[str, Tensor],
        rows: Mapping[str, ParameterRows],
        fisher: ImportanceFile,
        *,
        storage: torch.dtype = torch.float32,
    ) -> None:
        self.strength, self.rows, self.storage = strength, rows, storage
        self.shapes = {n: t.shape for n, t in plan.source.tensors.items() if n not in plan.growth.dropped}
        self.parts = _parts(plan)
        _check_inverse(plan, self.parts, self.shapes)
        self.anchors = {n: self._collapse(n, weights).to(storage) for n in self.parts}
        self.fisher = fisher
        self.importance: dict[str, Tensor] = {}
        self.parameters: dict[str, nn.Parameter] = {}

    def attach(self, model: nn.Module) -> None:
        self.parameters = whole_parameters(model)
        for n, parts in self.parts.items():
            device = self.parameters[self.rows[parts[0].name].parameter].device
            self.anchors[n] = self.anchors[n].to(device)
            self.importance[n] = self.fisher.read(n).to(device, self.storage)

    def _collapse(self, source: str, weights: Mapping[str, Tensor]) -> Tensor:
        parts = [p.collapse(at_least_fp32(weights[p.name]), self.shapes[source]) for p in self.parts[source]]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)

    def _difference(self, source: str) -> Tensor:
        rows = {p.name: self.rows[p.name] for p in self.parts[source]}
        weights = {n: r.of(self.parameters[r.parameter].detach()) for n, r in rows.items()}
        return self._collapse(source, weights) - self.anchors[source]

    @torch.no_grad()
    def add_gradient(self, scale: float = 1.0) -> None:
        for source, parts in self.parts.items():
            gradient = self._difference(source).mul_(self.importance[source]).mul_(self.strength * scale)
            for part in parts:
                rows = self.rows[part.name]
                p = self.parameters[rows.parameter]
                if not p.requires_grad:
                    continue
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                rows.of(p.grad).add_(part.expand(gradient))

    @torch.no_grad()
    def value(self) -> float:
        total = sum(float((self._difference(n).square() * self.importance[n]).sum(dtype=torch.float64)) for n in self.parts)
        return 0.5 * self.strength * total

    def nbytes(self) -> int:
        return 2 * self.storage.itemsize * sum(a.numel() for a in self.anchors.values())


def whole_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by name. Raises InputError for a model whose parameters are sharded."""
    found = parameters(model)
    if any(is_sharded(p) or hasattr(p, "ds_id") for p in found.values()):
        raise InputError("collapsed: sharded parameters are not supported.", hint=_MAP_INSTEAD)
    return found


def _parts(plan: GrowthPlan) -> dict[str, list[_Holder]]:
    """For every source tensor, the target tensors that hold it and pass gradients back; identity blocks do not."""
    parts: dict[str, list[_Holder]] = {}
    for name in plan.targets:
        layer = plan.architecture.tensors[name].layer
        if layer >= 0 and plan.growth.layers[layer].identity:
            continue
        for piece in trace(plan, name):
            if any(bool(b.any()) for b in piece.back):
                parts.setdefault(piece.source, []).append(_Holder(name, piece))
    return parts


def _check_inverse(plan: GrowthPlan, parts: Mapping[str, list[_Holder]], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises InputError unless every source tensor lies in one target tensor and B^T A = I on it."""
    evaluator = Evaluator(plan, InMemoryTensors({}))
    hint = f"collapsed is for lossless width growth. {_MAP_INSTEAD}"
    for source, shape in shapes.items():
        if source not in parts:
            raise InputError(f"collapsed: no tensor of the grown model holds {source}.", hint=hint)
        total = torch.zeros(shape, dtype=torch.float64)
        for part in parts[source]:
            product = part.piece.coefficients(evaluator) * part.piece.gradient_coefficients()
            total += scatter_add(product, part.piece.index, tuple(shape))
        if len({p.name for p in parts[source]}) > 1 or not torch.allclose(total, torch.ones_like(total), rtol=0, atol=1e-5):
            raise InputError(f"collapsed: {source} cannot be recovered from a model grown by {plan.growth.method}.", hint=hint)
