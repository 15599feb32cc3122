"""Rows of a model's tensors, by their names on disk: from a checkpoint, or from a growth that was never written.

A process that holds a shard of a parameter reads the rows of that shard and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from hf_grow.checkpoint.reader import Checkpoint
from hf_grow.errors import SourceError
from hf_grow.growth.plan import GrowthPlan
from hf_grow.growth.tensormap import Quantity
from hf_grow.training.param_updates.parameter_map import ParameterRows

if TYPE_CHECKING:
    from torch import Tensor


READ_BYTES = 16 << 20
"""About how much is read, or computed, at a time."""


class RowSource(Protocol):
    """Tensors by their names on disk, of which rows are read."""

    def names(self) -> Collection[str]: ...
    def shape(self, name: str) -> Sequence[int]: ...
    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of dimension 0 in the stored dtype; the caller may modify them."""
        ...


class StoredRows:
    """The tensors of a checkpoint folder."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        from hf_grow.checkpoint.stored_tensors import StoredTensors

        self.checkpoint = checkpoint
        self._stored = StoredTensors(checkpoint)

    def names(self) -> Collection[str]:
        return self.checkpoint.tensors.keys()

    def shape(self, name: str) -> Sequence[int]:
        return self.checkpoint.tensors[name].shape

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._stored.rows(name, start, stop)


class GrownRows:
    """The tensors of a growth, computed from its source as they are read. The values are those that `hf-grow grow` writes, bit for bit.

    ``quantity``: what goes through the map. Weights are rounded to the dtype of the target; gradients and their squares stay in the compute dtype.
    """

    def __init__(self, plan: GrowthPlan, source: Checkpoint | RowSource, quantity: Quantity = "weight") -> None:
        from hf_grow.checkpoint.stored_tensors import StoredTensors
        from hf_grow.growth.evaluate import Evaluator

        self.plan = plan
        self._evaluator = Evaluator(plan, StoredTensors(source) if isinstance(source, Checkpoint) else _SourceTensors(source), quantity)

    def names(self) -> Collection[str]:
        return self.plan.targets.keys()

    def shape(self, name: str) -> Sequence[int]:
        return self.plan.targets[name].shape

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        from hf_grow.growth.tensors import torch_dtype

        info = self.plan.targets[name]
        values = self._evaluator.rows(self.plan.growth.tensors[name], start, stop)
        if self._evaluator.quantity != "weight":
            return values
        rounded = values.to(torch_dtype(info.dtype))
        if not bool(rounded.isfinite().all()):
            raise SourceError(
                f"{name} would hold values that are not finite in {info.dtype}.",
                hint="Write the model with hf-grow grow, which says where they come from.",
            )
        return rounded


class HeldRows:
    """Tensors by name, each of them a RowTensor: anything with a dtype, a shape and rows."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self.tensors = tensors

    def names(self) -> Collection[str]:
        return self.tensors.keys()

    def shape(self, name: str) -> Sequence[int]:
        shape: Sequence[int] = self.tensors[name].shape
        return shape

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        found: Tensor = self.tensors[name].rows(start, stop)
        return found


class DiskRows:
    """Tensors by parameter name, each with `rows`, by the names of the model's tensors on disk.

    ``places``: `parameter_map` of the model; ``shapes``: of the tensors on disk.
    """

    writable = True

    def __init__(self, tensors: Mapping[str, Any], places: Mapping[str, ParameterRows], shapes: Mapping[str, Sequence[int]]) -> None:
        self._tensors, self._places = tensors, places
        self._shapes = {n: tuple(shapes[n]) for n in places}

    def names(self) -> Collection[str]:
        return self._shapes.keys()

    def shape(self, name: str) -> Sequence[int]:
        return self._shapes[name]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        place, shape = self._places[name], self._shapes[name]
        held = self._tensors[place.parameter]
        if len(shape) == 1 and len(held.shape) == 1:
            vector: Tensor = held.rows(place.start + start, place.start + stop)
            return vector
        inner = math.prod(shape[1:-1])  # rows of the matrix in one row of dimension 0, on disk and in memory
        outer = math.prod(held.shape[1:-1])
        low, high = place.start + start * inner, place.start + stop * inner
        block: Tensor = held.rows(low // outer, -(-high // outer)).reshape(-1, held.shape[-1])
        return block[low - low // outer * outer :][: high - low].reshape(stop - start, *shape[1:])


class _SourceTensors:
    """A RowSource as an evaluator reads it."""

    writable = True

    def __init__(self, source: RowSource) -> None:
        self.rows = source.rows


class ZeroedRows:
    """Another source, with some tensors set to zero."""

    def __init__(self, of: RowSource, zeroed: Collection[str]) -> None:
        self.of, self.zeroed = of, frozenset(zeroed)

    def names(self) -> Collection[str]:
        return self.of.names()

    def shape(self, name: str) -> Sequence[int]:
        return self.of.shape(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        found = self.of.rows(name, start, stop)
        return found.zero_() if name in self.zeroed else found


def row_step(shape: Sequence[int]) -> int:
    """Rows of dimension 0 that take about READ_BYTES in fp32."""
    return max(1, READ_BYTES // max(1, 4 * math.prod(shape[1:])))
