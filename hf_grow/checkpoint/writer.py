"""Computes the layout of a checkpoint: shards, headers and offsets, before anything is written.

With every offset known, tensors can be written in any order and in parallel.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_grow.checkpoint.reader import SINGLE
from hf_grow.common.safe_files import error_text
from hf_grow.common.units import format_bytes
from hf_grow.errors import OutputError
from hf_grow.growth.source_info import DTYPE_BYTES, TensorInfo

DEFAULT_SHARD_SIZE = 50 * 10**9  # as save_pretrained of transformers 5
DEFAULT_MEMORY = 256 << 20  # for computed tensors
DEFAULT_SOURCE_CACHE = 2 * 10**9  # for downloaded source tensors that are needed again
WORKERS = min(4, os.cpu_count() or 1)
Progress = Callable[[int], None]
"""Called with the number of bytes written and checked since the last call."""
PT_METADATA = {"format": "pt"}  # written by save_pretrained, required by from_pretrained


@dataclass(frozen=True)
class Slot:
    """Where a tensor is written: bytes [start, stop) of its shard."""

    name: str
    info: TensorInfo
    start: int
    stop: int


@dataclass(frozen=True)
class Shard:
    """A safetensors file to write."""

    file: str
    header: bytes
    """Length prefix and JSON header."""
    slots: tuple[Slot, ...]
    """In file order."""

    @property
    def size(self) -> int:
        return self.slots[-1].stop if self.slots else len(self.header)


@dataclass(frozen=True)
class Result:
    """The outcome of a growth."""

    out: Path
    """The output folder."""
    shards: Mapping[str, str]
    """Weight file -> SHA-256 in hex, computed from the bytes read back from disk."""
    nbytes: int
    """Total size of the weight files in bytes, headers included."""
    seconds: float
    """Wall-clock time."""
    resumed: int
    """Number of tensors kept from an interrupted run."""


def layout(targets: Mapping[str, TensorInfo], max_shard_size: int = DEFAULT_SHARD_SIZE) -> list[Shard]:
    """Shards in the order of `targets`, each with at most `max_shard_size` bytes of data; a larger tensor gets its own shard."""
    groups: list[list[str]] = [[]]
    room = max_shard_size
    for name, info in targets.items():
        if groups[-1] and info.nbytes > room:
            groups.append([])
            room = max_shard_size
        groups[-1].append(name)
        room -= info.nbytes
    total = len(groups)
    names = [SINGLE] if total == 1 else [f"model-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total)]
    return [build_shard(file, {n: targets[n] for n in group}) for file, group in zip(names, groups, strict=True)]


def build_shard(file: str, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str] = PT_METADATA) -> Shard:
    """A shard with these tensors. Wider dtypes come first, as in the safetensors library, so that every tensor is aligned."""
    order = sorted(tensors, key=lambda n: -DTYPE_BYTES[tensors[n].dtype])
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offsets: dict[str, tuple[int, int]] = {}
    at = 0
    for name in order:
        info = tensors[name]
        offsets[name] = at, at + info.nbytes
        header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": list(offsets[name])}
        at += info.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    raw = len(text).to_bytes(8, "little") + text
    base = len(raw)
    return Shard(file, raw, tuple(Slot(n, tensors[n], base + offsets[n][0], base + offsets[n][1]) for n in order))


def build_index(shards: Sequence[Shard]) -> dict[str, Any] | None:
    """Content of the index file of a sharded checkpoint; None for a single shard."""
    if len(shards) == 1:
        return None
    slots = [(slot, shard.file) for shard in shards for slot in shard.slots]
    return {
        "metadata": {
            "total_parameters": sum(s.info.nbytes // DTYPE_BYTES[s.info.dtype] for s, _ in slots),
            "total_size": sum(s.info.nbytes for s, _ in slots),
        },
        "weight_map": {s.name: file for s, file in sorted(slots, key=lambda item: item[0].name)},
    }


def check_disk_space(final: Path, nbytes: int) -> None:
    """Raises OutputError if the disk of `final` has fewer than `nbytes` bytes free."""
    folder = final.absolute().parent
    try:
        while not folder.exists():
            folder = folder.parent
        usage = shutil.disk_usage(folder)
    except OSError as error:
        raise OutputError(f"Cannot write {final}: {error_text(error)}.", hint="Choose another output with -o.") from None
    free = usage.free
    if usage.total and nbytes > free:
        raise OutputError(
            f"{final} needs {format_bytes(nbytes)}, but only {format_bytes(free)} are free in {folder}.",
            hint="Free some space, or choose another disk with -o.",
        )
