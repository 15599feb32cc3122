"""A source's importances mapped to the grown model, for where there is no text to estimate them anew.

The true diagonal would map by squared gains (B_out^2 F A_in^2), but it punishes moves that change nothing as much as moves that do, and moves
of all copies together too little. This is the form that keeps the penalty: for any move d of the source and its image d' on the grown model,
sum F' d'^2 = sum F d^2. With c_e the factor with which source entry k arrives at target entry e,

    F'_e = F_k / sum of c^2 over the entries that k went to          (for even copies F' = F * c_in / c_out)

which among all that keep it has the smallest largest value. Entries that pass nothing back (pads, identity blocks) have F' = 0 and do not
count. Where a target entry mixes several sources (averaged layers) no diagonal can keep the penalty; there it is the mean of what each asks for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hf_grow.checkpoint.reader import Checkpoint
from hf_grow.checkpoint.stored_tensors import StoredTensors
from hf_grow.errors import InputError
from hf_grow.growth.entry_provenance import Piece, gather, outer, scatter_add, trace
from hf_grow.growth.evaluate import Evaluator
from hf_grow.growth.plan import GrowthPlan
from hf_grow.growth.tensors import InMemoryTensors
from hf_grow.training.regularizers.importance_file import SAMPLES_PER_TENSOR, ImportanceFile, check_same_model, decode_samples


def grow_importance(plan: GrowthPlan, read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """F' of every target tensor (fp64), as `read` gives F of source tensors by name. In the order in which they are complete."""
    evaluator = Evaluator(plan, InMemoryTensors({}))
    pieces = {name: _pieces(plan, name) for name in plan.targets}
    readers: dict[str, list[tuple[str, int]]] = {}
    for name, found in pieces.items():
        for at, piece in enumerate(found):
            readers.setdefault(piece.source, []).append((name, at))
    waiting: dict[str, _WeightedMean] = {}
    for source, members in readers.items():
        shape = plan.source.by_key[source].shape
        # Only the main source's importances are known; weights of further checkpoints are held by none.
        share = (
            read(source).double() / _squared_coefficient_sum(plan, evaluator, members, pieces, shape)
            if source in plan.source.tensors
            else torch.zeros(shape)
        )
        share = share.nan_to_num(0.0, 0.0, 0.0)  # what went nowhere alive
        for name, at in members:
            total = waiting.setdefault(name, _WeightedMean(len(pieces[name])))
            total.add(share, pieces[name][at], evaluator)
            if total.left == 0:
                yield name, waiting.pop(name).result()
    for name, found in pieces.items():
        if not found:
            yield name, torch.zeros(plan.targets[name].shape, dtype=torch.float64)


def _pieces(plan: GrowthPlan, name: str) -> list[Piece]:
    layer = plan.architecture.tensors[name].layer
    if layer >= 0 and plan.growth.layers[layer].identity:
        return []
    return [p for p in trace(plan, name) if bool(outer(p.alive()).any())]


def _squared_coefficient_sum(
    plan: GrowthPlan, evaluator: Evaluator, members: list[tuple[str, int]], pieces: dict[str, list[Piece]], shape: tuple[int, ...]
) -> Tensor:
    """Sum of c^2 over all entries that each entry of a source went to."""
    total = torch.zeros(shape, dtype=torch.float64)
    for name, at in members:
        total += scatter_add(_squared_coefficients(pieces[name][at], evaluator), pieces[name][at].index, tuple(shape))
    return total


def _squared_coefficients(piece: Piece, evaluator: Evaluator) -> Tensor:
    return piece.coefficients(evaluator).square_() * outer(piece.alive())


class _WeightedMean:
    """The mean over the pieces of one target tensor, each counting by its c^2; where there is one piece, what it asks for."""

    def __init__(self, left: int) -> None:
        self.left, self.several = left, left > 1
        self.top: Tensor | None = None
        self.bottom: Tensor | None = None

    def add(self, share: Tensor, piece: Piece, evaluator: Evaluator) -> None:
        self.left -= 1
        if not self.several:
            self.top = gather(share, piece.index) * outer(piece.alive())
            return
        weight = _squared_coefficients(piece, evaluator)
        asked = gather(share, piece.index) * weight
        self.top = asked if self.top is None else self.top.add_(asked)
        self.bottom = weight if self.bottom is None else self.bottom.add_(weight)

    def result(self) -> Tensor:
        assert self.top is not None
        return self.top if self.bottom is None else (self.top / self.bottom).nan_to_num_(0.0, 0.0, 0.0)


def check_importance_of_source(found: ImportanceFile, plan: GrowthPlan, grown: Checkpoint) -> None:
    """Raises InputError if the importances are not those of the source that `grown` was grown from.

    The source need not be there: its sampled values are looked up where growth put them, in tensors that were not varied.
    """
    shapes = {n: t.shape for n, t in plan.source.tensors.items() if n in plan.source.architecture.tensors}
    check_same_model(found, shapes, None)
    saved = decode_samples(found.metadata["sample"])
    stored = StoredTensors(grown)
    wrong = compared = at = 0
    places = {n: (at, at := at + min(SAMPLES_PER_TENSOR, math.prod(shapes[n]))) for n in sorted(shapes)}
    for name in plan.targets:
        pieces = trace(plan, name)
        if len(pieces) != 1 or pieces[0].vary or pieces[0].source not in places:
            continue
        piece, shape = pieces[0], shapes[pieces[0].source]
        start, stop = places.pop(piece.source)
        spots = torch.linspace(0, math.prod(shape) - 1, stop - start, dtype=torch.float64).long()
        for spot, value in zip(spots.tolist(), saved[start:stop].tolist(), strict=True):
            target = [_target_index(i, a, c) for i, a, c in zip(piece.index, piece.alive(), _unravel_index(spot, shape), strict=True)]
            if any(t is None for t in target):
                continue
            row = stored.rows(name, int(target[0] or 0), int(target[0] or 0) + 1)[0].double()
            here = float(row if row.dim() == 0 else row[int(target[1] or 0)])
            gain = piece.scale * math.prod(float(g[t]) for g, t in zip(piece.gain, target, strict=True) if t is not None)
            compared += 1
            wrong += abs(here / gain - value) > 2.0**-6 * abs(value) + 1e-6
    if not compared or wrong > compared / 1000:
        raise InputError(
            f"{found.path} is not of the model that {grown.ref} was grown from ({plan.source.ref}): the weights differ.",
            hint="Take the Fisher of the source itself.",
        )


def _target_index(index: Tensor, alive: Tensor, coordinate: int) -> int | None:
    found = torch.nonzero((index == coordinate) & alive)
    return int(found[0]) if len(found) else None


def _unravel_index(spot: int, shape: tuple[int, ...]) -> list[int]:
    out = []
    for size in reversed(shape):
        spot, rest = divmod(spot, size)
        out.append(rest)
    return out[::-1]
