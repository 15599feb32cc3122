"""The optimizer state of a grown model, computed from the old state as its rows are read."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_grow.errors import SourceError
from hf_grow.growth.evaluate import Evaluator
from hf_grow.growth.finite_check import NOT_FINITE_HINT
from hf_grow.growth.tensormap import Expr
from hf_grow.training.sharding.local_rows import Places, read_local
from hf_grow.training.sharding.row_source import RowSource


@dataclass(frozen=True)
class GrownMoment:
    """One tensor of every parameter's state, such as exp_avg, by names on disk. A RowSource."""

    shapes: Mapping[str, Sequence[int]]
    mapped: Mapping[str, Expr]
    """What is not zero."""
    evaluator: Evaluator

    def names(self) -> Collection[str]:
        return self.shapes.keys()

    def shape(self, name: str) -> Sequence[int]:
        return self.shapes[name]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of dimension 0, in the compute dtype. Raises SourceError for values that are not finite."""
        if name not in self.mapped:
            return torch.zeros(stop - start, *self.shapes[name][1:])
        values = self.evaluator.rows(self.mapped[name], start, stop)
        if not bool(values.isfinite().all()):
            raise SourceError(f"The optimizer state of {name} would have NaN or infinite values.", hint=NOT_FINITE_HINT)
        return values


@dataclass(frozen=True)
class ParameterTensor:
    """The RowTensor of one parameter, read from a RowSource by the names of its parts on disk."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    places: Places
    source: RowSource

    def rows(self, start: int, stop: int) -> Tensor:
        out = torch.empty(stop - start, *self.shape[1:], dtype=self.dtype)
        return read_local(out, self.shape, (range(start, stop), *map(range, self.shape[1:])), self.places, self.source)

    def whole(self) -> Tensor:
        return self.rows(0, self.shape[0])
