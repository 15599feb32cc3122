"""Source tensors in files, of which only the rows asked for are read."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import torch
from torch import Tensor

from hf_grow.checkpoint.folder_exchange import naming
from hf_grow.checkpoint.reader import Checkpoint
from hf_grow.common.safe_files import open_regular
from hf_grow.errors import ExecutionError
from hf_grow.growth.tensors import raw_bytes, torch_dtype


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
