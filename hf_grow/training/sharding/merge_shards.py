"""A checkpoint of a sharded training (FSDP2) as a plain model, in one process, row block by row block."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_grow.checkpoint.partial_folder import PartialFolder
from hf_grow.checkpoint.provenance import format_growth_json
from hf_grow.checkpoint.reader import GROWTH, INDEX, hash_weight_files
from hf_grow.checkpoint.source import companions
from hf_grow.checkpoint.writer import DEFAULT_SHARD_SIZE, Slot, build_index, check_disk_space, layout
from hf_grow.common.safe_files import read_json
from hf_grow.convert.execute import translate_os_errors
from hf_grow.convert.in_memory import disk_tensors
from hf_grow.errors import SourceError
from hf_grow.growth.source_info import DTYPE_NAMES, TensorInfo
from hf_grow.growth.tensors import overflow_error, raw_bytes, torch_dtype
from hf_grow.model.config_compat import portable_config
from hf_grow.model.meta_model import meta_model
from hf_grow.training.param_updates.parameter_map import ParameterRows, bare, parameter_map
from hf_grow.training.sharding.local_rows import read_rows, whole_parameters
from hf_grow.training.sharding.row_source import row_step
from hf_grow.training.sharding.shard_files import ShardRows, sharded_weights

if TYPE_CHECKING:
    from torch import Tensor


def merge_shards(folder: Path, out: Path, *, dtype: str = "auto", overwrite: bool = False, max_shard_size: int = DEFAULT_SHARD_SIZE) -> int:
    """Writes to ``out`` the plain model of checkpoint ``folder``; returns its number of layers. Memory: a block of rows.

    ``dtype``: of parameters, by torch's name; auto keeps the dtypes of the training, as buffers always do. Raises SourceError for a folder
    without shards, where they are not those of its config.json, and for values that overflow in `dtype`; OutputError for an output that exists.
    """
    shards_folder = sharded_weights(folder)
    if shards_folder is None:
        raise SourceError(f"{folder} holds no shards of a training.", hint="Give a checkpoint-N of a training under FSDP2.")
    config = read_json(folder / "config.json", f"{folder} has no config.json.")
    PartialFolder.check(out, resume=False, overwrite=overwrite, resumable=False)
    made, rows = meta_model(config), ShardRows(shards_folder)
    state = {bare(n): tuple(t.shape) for n, t in made.state_dict().items()}
    wrong = sorted(n for n in {bare(n) for n, _ in made.named_parameters()} | set(rows.names()) if state.get(n) != _shape(rows, n))
    if wrong:
        raise SourceError(f"{shards_folder} does not fit {folder / 'config.json'}: {wrong[0]} ({len(wrong)} such tensors).")
    expected, places = disk_tensors(made), dict(parameter_map(made))
    parameters = set(places)
    places |= whole_parameters({n: t.shape for n, t in expected.items() if n not in places})  # buffers
    short = {torch_dtype(n): n for n in DTYPE_NAMES}
    chosen = {name: n for n, name in DTYPE_NAMES.items()}.get(dtype)
    infos = {
        n: TensorInfo((chosen if n in parameters else None) or short[rows.dtype(places[n].parameter)], tuple(t.shape))
        for n, t in expected.items()
    }
    shards = layout(infos, max_shard_size)
    check_disk_space(out, sum(s.size for s in shards))
    with (
        PartialFolder(out, f"merge {folder}", resume=False, overwrite=overwrite, resumable=False) as written,
        translate_os_errors(written),
    ):
        for shard in shards:
            with (written.path / shard.file).open("wb") as file:
                file.write(shard.header)
                for slot in shard.slots:
                    for block in _blocks(slot, places[slot.name], rows):
                        file.write(raw_bytes(block))
        if index := build_index(shards):
            written.write_file(INDEX, (json.dumps(index, indent=2, sort_keys=True) + "\n").encode())
        for relative in companions(folder):
            written.copy_companion(folder, relative)
        written.write_json("config.json", portable_config(config | ({} if chosen is None else {"dtype": dtype})))
        if (folder / GROWTH).is_file():
            written.write_file(GROWTH, format_growth_json(_with_files(read_json(folder / GROWTH), written.path)).encode())
        written.finish({p.name for p in written.path.iterdir() if not p.name.startswith(".")})
    return int(config["num_hidden_layers"])


def _shape(rows: ShardRows, name: str) -> tuple[int, ...] | None:
    return tuple(rows.shape(name)) if name in rows.names() else None


def _blocks(slot: Slot, place: ParameterRows, rows: ShardRows) -> Iterator[Tensor]:
    """A tensor on disk from its parameter, in blocks of rows. Raises SourceError where a finite value overflows in the dtype on disk."""
    import torch

    shape, dtype, stored = slot.info.shape, torch_dtype(slot.info.dtype), rows.dtype(place.parameter)
    width = shape[-1] if len(shape) > 1 else 1
    step = row_step((0, width))
    for start in range(place.start, place.stop, step):
        stop = min(start + step, place.stop)
        block = torch.empty(stop - start, width, dtype=stored)
        read_rows(block, place.parameter, start, stop, range(width), rows)
        written = block.to(dtype)
        if stored != dtype and bool((block.isfinite() & ~written.isfinite()).any()):
            raise overflow_error(slot.name, dtype)
        yield written


def _with_files(record: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """growth.json with the digests of the weights in its last stage of training."""
    training = record.get("training")
    return dict(record) if not isinstance(training, dict) else {**record, "training": {**training, "files": hash_weight_files(folder)}}
