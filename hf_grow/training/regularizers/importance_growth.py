"""A source's importances mapped to the grown model, where there is no text to estimate them on.

The true diagonal maps by squared gains (B_out^2 F A_in^2), but it punishes moves that leave the function as it is like those that change it, and moves of
all copies together too little. This map keeps the penalty instead: for any move d of the source and its image d' on the grown model,
sum F' d'^2 = sum F d^2. With c_e the factor with which source entry k arrives at target entry e,

    F'_e = F_k / sum of c^2 over all entries that hold k        (for even copies F' = F * c_in / c_out)

which has the smallest maximum of all maps that keep it. Entries that pass no gradient back (padding, identity blocks) have F' = 0 and do not count.
Where a target entry mixes several sources (averaged layers) no diagonal keeps the penalty; F' is then the mean of theirs, weighted by c^2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from hf_grow.checkpoint.reader import Checkpoint
from hf_grow.checkpoint.stored_tensors import StoredTensors
from hf_grow.errors import InputError
from hf_grow.growth.entry_provenance import Piece, gather, outer, scatter_add, trace
from hf_grow.growth.evaluate import Evaluator
from hf_grow.growth.plan import GrowthPlan
from hf_grow.growth.tensors import InMemoryTensors
from hf_grow.training.regularizers.importance_file import ImportanceFile, check_same_model, close_samples, decode_samples, sample_positions
from hf_grow.training.sharding.row_source import RowSource


def grow_importance(plan: GrowthPlan, read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(name, F' in fp64) of every target tensor, each as soon as it is complete. ``read``: F of a source tensor by name."""
    evaluator = Evaluator(plan, InMemoryTensors({}))
    pieces = {name: _live_pieces(plan, name) for name in plan.targets}
    by_source: dict[str, list[tuple[str, Piece]]] = {}
    for name, target_pieces in pieces.items():
        for piece in target_pieces:
            by_source.setdefault(piece.source, []).append((name, piece))
    incomplete: dict[str, _WeightedMean] = {}
    for source, holders in by_source.items():
        shape = plan.source.by_key[source].shape
        if source in plan.source.tensors:
            squares = torch.zeros(shape, dtype=torch.float64)
            for _, piece in holders:
                squares += scatter_add(_squared_coefficients(piece, evaluator), piece.index, tuple(shape))
            importance = (read(source).double() / squares).nan_to_num(0.0, 0.0, 0.0)  # 0 / 0: no target entry holds it
        else:
            importance = torch.zeros(shape)  # weights of further donors have no penalty
        for name, piece in holders:
            mean = incomplete.setdefault(name, _WeightedMean(len(pieces[name])))
            mean.add(importance, piece, evaluator)
            if mean.missing == 0:
                yield name, incomplete.pop(name).result()
    for name, target_pieces in pieces.items():
        if not target_pieces:
            yield name, torch.zeros(plan.targets[name].shape, dtype=torch.float64)


def is_of_source(file: ImportanceFile, plan: GrowthPlan) -> bool:
    """Whether a file has the tensors of a plan's source, by name and shape."""
    return file.shapes == source_shapes(plan)


def source_shapes(plan: GrowthPlan) -> dict[str, tuple[int, ...]]:
    return {n: t.shape for n, t in plan.source.tensors.items() if n in plan.source.architecture.tensors}


class GrownImportances:
    """F' of the target of a plan, computed when its rows are read: what `grow_importance` gives, as a RowSource. Memory: a few tensors.

    ``source``: F of the source, by names on disk.
    """

    def __init__(self, plan: GrowthPlan, source: RowSource) -> None:
        self.plan, self.source = plan, source
        self._evaluator = Evaluator(plan, InMemoryTensors({}))
        self._squares = lru_cache(maxsize=4)(self._sum_of_squares)
        self._whole = lru_cache(maxsize=1)(self._grown)
        self._held: dict[str, list[Piece]] = {}
        """Live pieces of the targets by their source tensor."""
        for name in plan.targets:
            for piece in _live_pieces(plan, name):
                self._held.setdefault(piece.source, []).append(piece)

    def names(self) -> Collection[str]:
        return self.plan.targets.keys()

    def shape(self, name: str) -> Sequence[int]:
        return self.plan.targets[name].shape

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._whole(name)[start:stop].clone()

    def _grown(self, name: str) -> Tensor:
        pieces = _live_pieces(self.plan, name)
        if not pieces:
            return torch.zeros(self.plan.targets[name].shape, dtype=torch.float64)
        mean = _WeightedMean(len(pieces))
        for piece in pieces:
            mean.add(self._importance(piece.source), piece, self._evaluator)
        return mean.result()

    def _importance(self, source: str) -> Tensor:
        """F over the sum of squared coefficients."""
        shape = tuple(self.plan.source.by_key[source].shape)
        if source not in self.plan.source.tensors:
            return torch.zeros(shape)  # weights of further donors have no penalty
        return (self.source.rows(source, 0, shape[0]).double() / self._squares(source)).nan_to_num(0.0, 0.0, 0.0)  # 0 / 0: held nowhere

    def _sum_of_squares(self, source: str) -> Tensor:
        shape = tuple(self.plan.source.by_key[source].shape)
        total = torch.zeros(shape, dtype=torch.float64)
        for piece in self._held[source]:
            total += scatter_add(_squared_coefficients(piece, self._evaluator), piece.index, shape)
        return total


def _live_pieces(plan: GrowthPlan, name: str) -> list[Piece]:
    layer = plan.architecture.tensors[name].layer
    if layer >= 0 and plan.growth.layers[layer].identity:
        return []
    return [p for p in trace(plan, name) if bool(outer(p.alive()).any())]


def _squared_coefficients(piece: Piece, evaluator: Evaluator) -> Tensor:
    return piece.coefficients(evaluator).square_() * outer(piece.alive())


class _WeightedMean:
    """Mean over the pieces of one target tensor, weighted by c^2."""

    def __init__(self, pieces: int) -> None:
        self.missing, self.single = pieces, pieces == 1
        self.sum: Tensor | None = None
        self.weights: Tensor | None = None

    def add(self, importance: Tensor, piece: Piece, evaluator: Evaluator) -> None:
        self.missing -= 1
        if self.single:
            self.sum = gather(importance, piece.index) * outer(piece.alive())
            return
        weight = _squared_coefficients(piece, evaluator)
        weighted = gather(importance, piece.index) * weight
        self.sum = weighted if self.sum is None else self.sum.add_(weighted)
        self.weights = weight if self.weights is None else self.weights.add_(weight)

    def result(self) -> Tensor:
        assert self.sum is not None
        return self.sum if self.weights is None else (self.sum / self.weights).nan_to_num_(0.0, 0.0, 0.0)


def check_importance_of_source(file: ImportanceFile, plan: GrowthPlan, grown: Checkpoint) -> None:
    """Raises InputError if ``file`` does not belong to the source that ``grown`` was grown from.

    The source need not be there: its sampled values are looked up where growth put them, in tensors without symmetry breaking.
    """
    shapes = source_shapes(plan)
    check_same_model(file, shapes, None)
    positions = {n: sample_positions(math.prod(shapes[n])) for n in sorted(shapes)}
    saved = iter(decode_samples(file.metadata["sample"]).tolist())
    samples = {n: [next(saved) for _ in p] for n, p in positions.items()}
    stored = StoredTensors(grown)
    expected, actual = [], []
    for name in plan.targets:
        pieces = trace(plan, name)
        if len(pieces) != 1 or pieces[0].vary or pieces[0].source not in positions:
            continue
        piece = pieces[0]
        shape = shapes[piece.source]
        for position, value in zip(positions.pop(piece.source), samples[piece.source], strict=True):
            coordinates = [int(c) for c in torch.unravel_index(position, shape)]
            target = [_target_index(i, a, c) for i, a, c in zip(piece.index, piece.alive(), coordinates, strict=True)]
            if any(t is None for t in target):
                continue
            row = stored.rows(name, int(target[0] or 0), int(target[0] or 0) + 1)[0].double()
            gain = piece.scale * math.prod(float(g[t]) for g, t in zip(piece.gain, target, strict=True) if t is not None)
            expected.append(value)
            actual.append(float(row if row.dim() == 0 else row[int(target[1] or 0)]) / gain)
    wrong = ~close_samples(torch.tensor(expected), torch.tensor(actual))
    if not expected or int(wrong.sum()) > len(expected) / 1000:
        raise InputError(
            f"{file.path} does not belong to {plan.source.ref}, from which {grown.ref} was grown: the weights differ.",
            hint="Use the Fisher of the source.",
        )


def _target_index(index: Tensor, alive: Tensor, coordinate: int) -> int | None:
    """The first position of a dimension that holds a source coordinate, None if there is none."""
    positions = torch.nonzero((index == coordinate) & alive)
    return int(positions[0]) if len(positions) else None
