"""Where source tensors are: in files, of which only the rows asked for are read, or in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from hf_grow.growth.plan import DTYPE_NAMES


def torch_dtype(dtype: str) -> torch.dtype:
    found = getattr(torch, DTYPE_NAMES[dtype])
    assert isinstance(found, torch.dtype)
    return found


class TensorRows(Protocol):
    """Where source tensors come from: rows [start, stop) of dimension 0, in their own dtype."""

    writable: bool
    """Whether what it gives may be changed in place."""

    def rows(self, key: str, start: int, stop: int) -> Tensor: ...


class InMemoryTensors:
    """Source tensors that are in memory already."""

    writable = False

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        return self.tensors[key][start:stop]


def raw_bytes(block: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, of any dtype, without a copy."""
    return block.view(torch.uint8).numpy().reshape(-1).data
