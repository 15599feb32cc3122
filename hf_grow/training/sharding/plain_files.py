"""A sharded model as plain safetensors: every process writes the rows that it holds to their places in the files. No process holds the model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_grow.checkpoint.reader import INDEX
from hf_grow.checkpoint.writer import DEFAULT_SHARD_SIZE, Slot, build_index, check_disk_space, layout
from hf_grow.convert.in_memory import disk_tensors
from hf_grow.growth.source_info import DTYPE_BYTES, DTYPE_NAMES, TensorInfo
from hf_grow.growth.tensors import raw_bytes, torch_dtype
from hf_grow.model.meta_model import meta_model
from hf_grow.training.param_updates.parameter_map import parameter_map
from hf_grow.training.param_updates.shards import local, local_window
from hf_grow.training.sharding.collective import is_first, make_shared_folder, on_every_process
from hf_grow.training.sharding.local_rows import by_parameter, local_parts, whole_parameters
from hf_grow.training.sharding.row_source import row_step
from hf_grow.training.sharding.sharded_model import held_tensors


def write_plain(model: Any, folder: Path, dtypes: Mapping[str, torch.dtype], max_shard_size: int = DEFAULT_SHARD_SIZE) -> None:
    """Writes the weights as `save_pretrained` would: model.safetensors, or several files and an index. Collective.

    ``dtypes``: by bare parameter name, where the result has another dtype. Headers are written last, when all data is on disk: until then the
    files are no safetensors files. Memory: a block of rows. Raises an error on every process where one cannot write.
    """
    made, held = meta_model(model.config.to_dict()), held_tensors(model)
    places: dict[str, Any] = dict(parameter_map(made))
    expected = disk_tensors(made)
    places |= whole_parameters({n: t.shape for n, t in held.items() if n in expected and n not in places})  # buffers
    names = {torch_dtype(n): n for n in DTYPE_NAMES}
    infos = {
        n: TensorInfo(names[dtypes.get(places[n].parameter, held[places[n].parameter].dtype)], tuple(t.shape)) for n, t in expected.items()
    }
    shards = layout(infos, max_shard_size)
    slots = {slot.name: (folder / shard.file, slot) for shard in shards for slot in shard.slots}
    make_shared_folder(folder)
    with on_every_process(folder):
        if is_first():
            for old in (*folder.glob("model*.safetensors"), folder / INDEX):
                old.unlink(missing_ok=True)
            check_disk_space(folder, sum(s.size for s in shards))
            for shard in shards:
                with (folder / shard.file).open("wb") as file:
                    file.truncate(shard.size)
    with on_every_process(folder), _Files() as files:
        of = by_parameter(places)
        for name, tensor in held.items():
            if name in of and _writes(tensor):
                _write_local(tensor, of[name], slots, files)
    with on_every_process(folder):
        if is_first():
            for shard in shards:
                with (folder / shard.file).open("r+b") as file:
                    file.write(shard.header)
                    file.flush()
                    os.fsync(file.fileno())
            if index := build_index(shards):
                (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_local(tensor: Any, places: Any, slots: Mapping[str, tuple[Path, Slot]], files: _Files) -> None:
    """Writes this process's part of a parameter."""
    values, window = local(tensor), local_window(tensor)
    if values.numel() == 0:
        return
    columns = window[-1] if len(tensor.shape) > 1 else range(1)
    width = tensor.shape[-1] if len(tensor.shape) > 1 else 1
    matrix = values.reshape(-1, len(columns))
    for at, name, start, stop in local_parts(tensor.shape, window, places):
        path, slot = slots[name]
        dtype, size = torch_dtype(slot.info.dtype), DTYPE_BYTES[slot.info.dtype]
        step = row_step(matrix.shape)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            block = matrix[at + first - start : at + last - start].to(dtype=dtype).cpu().contiguous()
            if len(columns) == width:
                files.write(path, block, slot.start + first * width * size)
            else:
                for row in range(first, last):
                    files.write(path, block[row - first], slot.start + (row * width + columns.start) * size)


class _Files:
    """Files that stay open while their parts are written, and are on disk afterwards."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._open.values():
            if error == (None, None, None):
                os.fsync(handle)
            os.close(handle)

    def write(self, path: Path, block: Tensor, at: int) -> None:
        if path not in self._open:
            self._open[path] = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        data = raw_bytes(block)
        while data:
            written = os.pwrite(self._open[path], data, at)
            data, at = data[written:], at + written


def _writes(tensor: Any) -> bool:
    """Whether this process writes its part: of replicas, the first."""
    if not hasattr(tensor, "placements"):
        return is_first()
    place = tensor.device_mesh.get_coordinate()
    return place is not None and all(c == 0 for c, p in zip(place, tensor.placements, strict=True) if p.is_replicate())
