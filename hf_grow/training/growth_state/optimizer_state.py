"""An optimizer's state by parameter name, whose tensors are read by rows, wherever they are stored.

    OptimizerState.groups            the settings of each group; "params" lists parameter names
    OptimizerState.state[name][key]  what the optimizer keeps of a parameter: RowTensors such as exp_avg, and numbers such as step
    MomentRows                       one such key of all parameters, by the names of the tensors on disk: what growth maps and shards read

A FileTensor, a ChunkedTensor and a tensor of a growth (`moments`) are RowTensors, so that growing, resuming and resharding read one thing.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from hf_grow.errors import SourceError
from hf_grow.training.param_updates.parameter_map import ParameterRows

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class RowTensor(Protocol):
    """A tensor that may be stored anywhere."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    def rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of dimension 0, as a new tensor that the caller may modify."""
        ...

    def whole(self) -> Tensor:
        """The tensor; also of a scalar, which has no rows."""
        ...


@dataclass(frozen=True)
class MemoryTensor:
    """A tensor in memory as a RowTensor."""

    tensor: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def rows(self, start: int, stop: int) -> Tensor:
        return self.tensor[start:stop].clone()

    def whole(self) -> Tensor:
        return self.tensor.clone()


def materialized(value: RowTensor | int | float | None) -> Any:
    """A RowTensor as a tensor in memory; anything else as it is."""
    return value if value is None or isinstance(value, (int, float)) else value.whole()


@dataclass(frozen=True)
class OptimizerState:
    """The groups of an optimizer and the state of its parameters, by parameter names in memory. Parameters without state are missing in `state`."""

    groups: list[dict[str, Any]]
    state: Mapping[str, Mapping[str, RowTensor | int | float | None]]

    def keys(self) -> list[str]:
        """The names of the tensors that parameters have, such as exp_avg."""
        return sorted({k for s in self.state.values() for k, v in s.items() if not isinstance(v, (int, float, type(None))) and v.shape})

    def tensor(self, name: str, key: str) -> RowTensor:
        """One tensor of a parameter's state. Raises SourceError if there is none."""
        found = self.state.get(name, {}).get(key)
        if found is None or isinstance(found, (int, float)):
            raise SourceError(f"The optimizer state has no {key} of {name}.")
        return found

    def rows(self, name: str, key: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of dimension 0 of such a tensor. Raises SourceError."""
        return self.tensor(name, key).rows(start, stop)

    def number(self, name: str, key: str = "step") -> float:
        """A number of a parameter's state, stored as one or as a tensor of one value. Raises SourceError if there is none."""
        found = self.state.get(name, {}).get(key)
        if found is None:
            raise SourceError(f"The optimizer state has no {key} of {name}.")
        return float(found) if isinstance(found, (int, float)) else float(found.whole())


class MomentRows:
    """One tensor of every parameter's state, such as exp_avg, by the names of the model's tensors on disk.

    ``places``: `parameter_map` of the model. Tensors whose parameter has no state are missing in `names()`.
    """

    writable = True

    def __init__(self, state: OptimizerState, key: str, places: Mapping[str, ParameterRows], shapes: Mapping[str, Sequence[int]]) -> None:
        self._state, self._key, self._places = state, key, places
        self._shapes = {n: tuple(shapes[n]) for n, p in places.items() if state.state.get(p.parameter, {}).get(key) is not None}

    def names(self) -> Collection[str]:
        return self._shapes.keys()

    def shape(self, name: str) -> Sequence[int]:
        return self._shapes[name]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of dimension 0 of a tensor on disk, as a new tensor."""
        place, shape = self._places[name], self._shapes[name]
        held = self._state.tensor(place.parameter, self._key)
        if len(shape) == 1 and len(held.shape) == 1:
            return held.rows(place.start + start, place.start + stop)
        inner = math.prod(shape[1:-1])  # rows of the matrix in one row of dimension 0, on disk and in memory
        outer = math.prod(held.shape[1:-1])
        low, high = place.start + start * inner, place.start + stop * inner
        block = held.rows(low // outer, -(-high // outer)).reshape(-1, held.shape[-1])
        return block[low - low // outer * outer :][: high - low].reshape(stop - start, *shape[1:])
