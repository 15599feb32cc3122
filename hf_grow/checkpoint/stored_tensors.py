"""Reads rows of source tensors from files."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from hf_grow.checkpoint.folder_exchange import error_filename
from hf_grow.checkpoint.reader import Checkpoint
from hf_grow.common.safe_files import open_regular
from hf_grow.errors import ExecutionError
from hf_grow.growth.tensors import raw_bytes, torch_dtype


class StoredTensors:
    """Source tensors in the checkpoint's files; only the requested rows are read. Thread-safe.

    No file stays open between reads, because `TensorCache` removes files after their last use.
    """

    writable = True

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        path, stored = self.checkpoint.find(key)
        row = (stored.stop - stored.start) // stored.shape[0]
        data = torch.empty(stop - start, *stored.shape[1:], dtype=torch_dtype(stored.dtype))
        with open_regular(path) as file, error_filename(path):
            read = os.preadv(file.fileno(), [raw_bytes(data)], stored.start + start * row)
        if read != (stop - start) * row:
            raise ExecutionError(f"{key} could not be read completely from {stored.file}.", hint="The source may have changed; run again.")
        return data
