"""Where source tensors are: in files, of which only the rows asked for are read, or in memory."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from hf_grow.checkpoint.folder_exchange import naming
from hf_grow.checkpoint.reader import Checkpoint
from hf_grow.common.safe_files import open_regular
from hf_grow.errors import ExecutionError
from hf_grow.growth.plan import DTYPE_NAMES


def torch_dtype(dtype: str) -> torch.dtype:
    found = getattr(torch, DTYPE_NAMES[dtype])
    assert isinstance(found, torch.dtype)
    return found


class Tensors(Protocol):
    """Where source tensors come from: rows [start, stop) of dimension 0, in their own dtype."""

    fresh: bool
    """Whether what it gives may be changed in place."""

    def rows(self, key: str, start: int, stop: int) -> Tensor: ...


class StoredTensors:
    """Source tensors read from the checkpoint's files, only the rows asked for. Threads may share it."""

    fresh = True

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._handles: dict[Path, int] = {}
        self._lock = threading.Lock()

    def _handle(self, path: Path) -> int:
        with self._lock:
            if path not in self._handles:
                with open_regular(path) as file:
                    self._handles[path] = os.dup(file.fileno())
            return self._handles[path]

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        path, stored = self.checkpoint.find(key)
        row = (stored.stop - stored.start) // stored.shape[0]
        data = torch.empty(stop - start, *stored.shape[1:], dtype=torch_dtype(stored.dtype))
        with naming(path):
            read = os.preadv(self._handle(path), [raw_bytes(data)], stored.start + start * row)
        if read != (stop - start) * row:
            raise ExecutionError(f"{key} could not be read whole from {stored.file}.", hint="Did the source change? Run again.")
        return data

    def forget(self, path: Path) -> None:
        """A file is about to go."""
        with self._lock:
            if path in self._handles:
                os.close(self._handles.pop(path))

    def close(self) -> None:
        with self._lock:
            while self._handles:
                os.close(self._handles.popitem()[1])


class HeldTensors:
    """Source tensors that are in memory already."""

    fresh = False

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        return self.tensors[key][start:stop]


def raw_bytes(block: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, of any dtype, without a copy."""
    return block.view(torch.uint8).numpy().reshape(-1).data
