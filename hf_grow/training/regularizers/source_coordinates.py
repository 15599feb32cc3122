"""EWC after width growth in the source's own coordinates: 1/2 lambda sum F (C(W') - W)^2 with C(W') = B_out^T W' A_in.

B^T A = I, so C undoes the growth: at first C(W') = W exactly, whatever symmetry breaking added. Copies that drift apart cost nothing as long as
what they compute together for the source's coordinates stays; new coordinates are free. F and W are as large as the source. The gradient is
the growth's own map of gradients: lambda B_out [F (C(W') - W)] A_in^T.
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
from hf_grow.training.regularizers.importance_file import ImportanceFile
from hf_grow.training.regularizers.penalty import AnchoredPenalty


@dataclass
class _CopyOfSource:
    """A target tensor that holds (part of) a source tensor."""

    name: str
    piece: Piece

    def collapse(self, weight: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Its share of C: entries of the source's shape."""
        return scatter_add(_scaled(weight, self.piece), self.piece.index, shape)

    def spread(self, gradient: Tensor) -> Tensor:
        """A gradient of the source's coordinates as one of this tensor's entries."""
        return _scaled(gather(gradient, self.piece.index), self.piece)


def _scaled(tensor: Tensor, piece: Piece) -> Tensor:
    for dim, back in enumerate(piece.back):
        if bool((back != 1).any()):
            tensor = tensor * back.to(tensor).view([-1 if d == dim else 1 for d in range(tensor.dim())])
    factor = piece.scale * piece.share
    return tensor if factor == 1 else tensor * factor


class SourceCoordinatePenalty(AnchoredPenalty):
    """``weights``: the grown model's at the start, by names on disk. Raises InputError for a growth that C does not undo."""

    name = "ewc-collapsed"

    def __init__(
        self,
        strength: float,
        plan: GrowthPlan,
        weights: Mapping[str, Tensor],
        places: Mapping[str, ParameterRows],
        fisher: ImportanceFile,
        *,
        storage: torch.dtype = torch.float32,
    ) -> None:
        self.strength, self.places, self.storage = strength, places, storage
        self.shapes = {n: t.shape for n, t in plan.source.tensors.items() if n not in plan.growth.dropped}
        self.readers = _copies_of_sources(plan)
        _check_inverse(plan, self.readers, self.shapes)
        self.anchors = {n: self._collapsed(n, weights).to(storage) for n in self.readers}
        self.fisher = fisher
        self.importance: dict[str, Tensor] = {}
        self.parameters: dict[str, nn.Parameter] = {}

    def attach(self, model: nn.Module) -> None:
        self.parameters = parameters(model)
        if any(hasattr(p, "placements") or hasattr(p, "ds_id") for p in self.parameters.values()):
            raise InputError(
                "The penalty on collapsed coordinates needs whole parameters; these are sharded.",
                hint="Map the Fisher instead: hf-grow fisher GROWN --from-growth SOURCE_FISHER -o FILE, and leave collapsed out.",
            )
        for n in self.readers:
            device = self.parameters[self.places[self.readers[n][0].name].parameter].device
            self.anchors[n] = self.anchors[n].to(device)
            self.importance[n] = self.fisher.read(n).to(device, self.storage)

    def _own(self, name: str, of: Mapping[str, Tensor]) -> Tensor:
        place = self.places[name]
        return place.of(of[place.parameter].detach())

    def _collapsed(self, source: str, weights: Mapping[str, Tensor]) -> Tensor:
        parts = [r.collapse(_at_least_fp32(weights[r.name]), self.shapes[source]) for r in self.readers[source]]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)

    def _away(self, source: str) -> Tensor:
        weights = {r.name: self._own(r.name, self.parameters) for r in self.readers[source]}
        return self._collapsed(source, weights) - self.anchors[source]

    @torch.no_grad()
    def add_gradient(self, scale: float = 1.0) -> None:
        for source, readers in self.readers.items():
            gradient = self._away(source).mul_(self.importance[source]).mul_(self.strength * scale)
            for reader in readers:
                place = self.places[reader.name]
                p = self.parameters[place.parameter]
                if not p.requires_grad:
                    continue
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                place.of(p.grad).add_(reader.spread(gradient))

    @torch.no_grad()
    def value(self) -> float:
        total = sum(float((self._away(n).square() * self.importance[n]).sum(dtype=torch.float64)) for n in self.readers)
        return 0.5 * self.strength * total

    def nbytes(self) -> int:
        return 2 * self.storage.itemsize * sum(a.numel() for a in self.anchors.values())


def _at_least_fp32(tensor: Tensor) -> Tensor:
    return tensor if tensor.element_size() >= 4 else tensor.float()


def _copies_of_sources(plan: GrowthPlan) -> dict[str, list[_CopyOfSource]]:
    """Of every source tensor, the tensors it went to; identity blocks pass nothing back and are free."""
    found: dict[str, list[_CopyOfSource]] = {}
    for name in plan.targets:
        layer = plan.architecture.tensors[name].layer
        if layer >= 0 and plan.growth.layers[layer].identity:
            continue
        for piece in trace(plan, name):
            if any(bool(b.any()) for b in piece.back):
                found.setdefault(piece.source, []).append(_CopyOfSource(name, piece))
    return found


def _check_inverse(plan: GrowthPlan, readers: Mapping[str, list[_CopyOfSource]], shapes: Mapping[str, tuple[int, ...]]) -> None:
    evaluator = Evaluator(plan, InMemoryTensors({}))
    for source, shape in shapes.items():
        if source not in readers:
            raise InputError(
                f"Collapsed coordinates: nothing is left of {source}.", hint="They are for width growth; map the Fisher instead."
            )
        total = torch.zeros(shape, dtype=torch.float64)
        for reader in readers[source]:
            reached = reader.piece.coefficients(evaluator) * reader.piece.gradient_coefficients()
            total += scatter_add(reached, reader.piece.index, tuple(shape))
        if len({r.name for r in readers[source]}) > 1 or not torch.allclose(total, torch.ones_like(total), rtol=0, atol=1e-5):
            raise InputError(
                f"Collapsed coordinates do not undo this growth ({plan.growth.method}): {source} is not where it was.",
                hint="They are for lossless width growth; map the Fisher instead: hf-grow fisher GROWN --from-growth SOURCE_FISHER.",
            )
