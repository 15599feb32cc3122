"""A checkpoint that a sharded training wrote, opened like a plain one: config, tensors by their names on disk, growth.json; its weights by rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hf_grow.checkpoint.reader import GROWTH, Checkpoint
from hf_grow.checkpoint.safetensors_header import TensorLocation
from hf_grow.checkpoint.source import open_source
from hf_grow.common.safe_files import read_json
from hf_grow.errors import SourceError
from hf_grow.growth.source_info import DTYPE_NAMES
from hf_grow.model.meta_model import meta_model
from hf_grow.training.param_updates.parameter_map import parameter_map, shapes_on_disk
from hf_grow.training.sharding.row_source import DiskRows, RowSource, StoredRows
from hf_grow.training.sharding.shard_files import ShardRows, sharded_weights


def open_checkpoint(
    ref: str, *, revision: str | None = None, weights: bool, notify: Callable[[str], None] = lambda message: None
) -> Checkpoint:
    """As `open_source`; also the folder of a checkpoint whose weights are in shards, which then has no `files`."""
    folder = Path(ref)
    shards = sharded_weights(folder) if folder.is_dir() else None
    if shards is None:
        return open_source(ref, revision=revision, weights=weights, notify=notify)
    config = read_json(folder / "config.json", f"{ref} is not a checkpoint: it has no config.json.")
    model = meta_model(config)
    places, held = parameter_map(model), ShardRows(shards)
    dtypes = {str(name): short for short, name in DTYPE_NAMES.items()}
    tensors = {}
    for name, shape in shapes_on_disk(model, places).items():
        parameter = places[name].parameter
        if parameter not in held.names():
            raise SourceError(f"{shards} lacks {parameter}.", hint="Resume from an earlier checkpoint.")
        tensors[name] = TensorLocation("", dtypes[str(held.dtype(parameter)).removeprefix("torch.")], tuple(shape), 0, 0)
    growth = folder / GROWTH
    return Checkpoint(ref, "", config, tensors, {}, folder, read_json(growth) if growth.is_file() else None)


def rows_of(checkpoint: Checkpoint) -> RowSource:
    """The weights of an opened checkpoint on this machine, by their names on disk."""
    shards = sharded_weights(checkpoint.folder) if checkpoint.folder is not None and not checkpoint.files else None
    if shards is None:
        return StoredRows(checkpoint)
    model = meta_model(checkpoint.config)
    places = parameter_map(model)
    return DiskRows(ShardRows(shards).tensors, places, shapes_on_disk(model, places))
