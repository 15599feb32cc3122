"""Tensors on disk as the processes of a training hold them: each writes its own shards, and any number of processes reads rows of them.

torch.distributed.checkpoint writes them as safetensors, without pickles; a file's metadata says where in the whole tensors its shards lie.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hf_grow.checkpoint.reader import SHARDED_WEIGHTS
from hf_grow.errors import ExecutionError
from hf_grow.training.sharding.collective import make_shared_folder
from hf_grow.training.sharding.row_source import HeldRows

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FILE_BYTES = 128 << 20
"""About how much one process writes to a file. torch copies a file's tensors into memory to write it."""


def can_write_shards() -> bool:
    """Whether torch has the writer that `write_shards` uses."""
    try:
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    except ImportError:
        return False
    return "save_distributed" in inspect.signature(HuggingFaceStorageWriter).parameters


def write_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors with at least one dimension, sharded (DTensor) or not, into a folder without safetensors files. Collective.

    Returns when this process's files are on disk. Memory beyond the tensors: about twice FILE_BYTES, or the largest local shard.
    Raises ExecutionError where a process cannot write.
    """
    from torch import distributed
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    alone = not distributed.is_initialized()
    processes = 1 if alone else distributed.get_world_size()
    files: dict[str, int] = {}
    number, room = 1, FILE_BYTES
    for name, tensor in tensors.items():
        held = tensor.numel() * tensor.element_size() // (processes if hasattr(tensor, "placements") else 1)
        if held > room and room < FILE_BYTES:
            number, room = number + 1, FILE_BYTES
        files[name] = number
        room -= held
    make_shared_folder(folder)
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=files, save_distributed=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.distributed is", category=UserWarning)  # one process needs no group
            save(dict(tensors), storage_writer=writer, no_dist=alone)
    except (CheckpointException, OSError) as error:
        failed = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        raise ExecutionError(
            f"The checkpoint could not be written to {folder}: {' '.join(str(failed).split())[:200]}.",
            hint="Free some disk space, then go on from the last complete checkpoint with --resume.",
        ) from None


def sharded_weights(folder: Path) -> Path | None:
    """The subfolder with the shards of a checkpoint's weights, by parameter names; None for a plain model."""
    if any(folder.glob("model*.safetensors")):
        return None
    return next((folder / name for name in SHARDED_WEIGHTS if (folder / name).is_dir()), None)


class ShardRows(HeldRows):
    """The tensors of such a folder, as a RowSource. Also of one that accelerate wrote (FSDP with SHARDED_STATE_DICT).

    Raises SourceError for damaged files.
    """

    def __init__(self, folder: Path) -> None:
        from hf_grow.checkpoint.distributed_checkpoint import DistributedCheckpoint

        super().__init__({path[-1]: tensor for path, tensor in DistributedCheckpoint(folder).tensors.items()})

    def dtype(self, name: str) -> torch.dtype:
        found: torch.dtype = self.tensors[name].dtype
        return found
