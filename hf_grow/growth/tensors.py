"""Access to source tensors by rows, from files or from memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from hf_grow.errors import SourceError
from hf_grow.growth.source_info import DTYPE_NAMES


def torch_dtype(dtype: str) -> torch.dtype:
    """'BF16' -> torch.bfloat16, for the names of safetensors."""
    result = getattr(torch, DTYPE_NAMES[dtype])
    assert isinstance(result, torch.dtype)
    return result


class TensorRows(Protocol):
    """Source tensors by `Source.key`: rows [start, stop) of dimension 0 in the stored dtype."""

    writable: bool
    """Whether the returned tensors may be modified in place."""

    def rows(self, key: str, start: int, stop: int) -> Tensor: ...


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


class InMemoryTensors:
    """Source tensors in memory."""

    writable = False

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        return self.tensors[key][start:stop]


def raw_bytes(block: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return block.view(torch.uint8).numpy().reshape(-1).data


def overflow_error(name: str, dtype: torch.dtype) -> SourceError:
    """The error for a tensor that a dtype cannot hold."""
    return SourceError(f"{name} has values that {str(dtype).removeprefix('torch.')} cannot hold: they would be infinite.",
                       hint="Choose --dtype bfloat16, float32 or auto.")  # fmt: skip
