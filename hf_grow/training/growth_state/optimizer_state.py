"""An optimizer's state by parameter name, whose tensors are read by rows, wherever they are stored.

    OptimizerState.groups            the settings of each group; "params" lists parameter names
    OptimizerState.state[name][key]  what the optimizer keeps of a parameter: RowTensors such as exp_avg, and numbers such as step
    MomentRows                       one such key of all parameters, by the names of the tensors on disk: what growth maps and shards read

A FileTensor, a ChunkedTensor and a tensor of a growth (`moments`) are RowTensors, so that growing, resuming and resharding read one thing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_grow.errors import SourceError
from hf_grow.training.param_updates.parameter_map import ParameterRows
from hf_grow.training.sharding.row_source import DiskRows

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from hf_grow.growth.tensors import RowTensor


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


def in_memory(tensor: Any) -> Any:
    """A tensor as a RowTensor; a tensor subclass as a SubclassTensor of such."""
    from hf_grow.checkpoint.torch_files import SubclassTensor

    held = tensor.detach().cpu()
    return SubclassTensor.of(held, MemoryTensor) if hasattr(held, "__tensor_flatten__") else MemoryTensor(held)


def materialized(value: Any) -> Tensor:
    """The inverse of `in_memory`, for any RowTensor."""
    from hf_grow.checkpoint.torch_files import SubclassTensor

    found: Tensor = value.build(lambda part: part.whole()) if isinstance(value, SubclassTensor) else value.whole()
    return found


@dataclass(frozen=True)
class OptimizerState:
    """The groups of an optimizer and the state of its parameters, by parameter names in memory. Parameters without state are missing in `state`."""

    groups: list[dict[str, Any]]
    state: Mapping[str, Mapping[str, Any]]
    """Of each parameter RowTensors and numbers; in 8 bits also SubclassTensors, and what bitsandbytes nests (`optimizer_forms`)."""

    def tensor(self, name: str, key: str) -> RowTensor:
        """One tensor of a parameter's state. Raises SourceError if there is none."""
        found: RowTensor | None = self.state.get(name, {}).get(key)
        if found is None:
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


class MomentRows(DiskRows):
    """One tensor of every parameter's state, such as exp_avg, by the names of the model's tensors on disk.

    ``places``: `parameter_map` of the model. Tensors whose parameter has no state are missing in `names()`.
    """

    def __init__(self, state: OptimizerState, key: str, places: Mapping[str, ParameterRows], shapes: Mapping[str, Sequence[int]]) -> None:
        having = {n: p for n, p in places.items() if state.state.get(p.parameter, {}).get(key) is not None}
        super().__init__({p.parameter: state.tensor(p.parameter, key) for p in having.values()}, having, shapes)
