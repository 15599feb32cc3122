"""Headers of safetensors files that are not to be trusted.

`TensorLocation` says where each tensor's bytes lie, so that whoever needs them copies or reads just those. The rules are those of the safetensors format:
8 bytes of length, JSON, then data that the offsets tile without hole or overlap.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_grow.common.safe_files import open_regular
from hf_grow.errors import SourceError
from hf_grow.growth.source_info import DTYPE_BYTES, TensorInfo

MAX_HEADER = 100_000_000  # the format's own limit
MAX_DIMS = 8
MAX_NAME = 500


@dataclass(frozen=True)
class TensorLocation:
    """One tensor in one file: bytes [start, stop) counted from the start of the file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def info(self) -> TensorInfo:
        return TensorInfo(self.dtype, self.shape)


def read_file_header(path: Path) -> tuple[dict[str, TensorLocation], os.stat_result]:
    """The tensors of a safetensors file, and what the system says of it. Raises SourceError."""
    with open_regular(path) as handle:
        stat = os.fstat(handle.fileno())
        return read_header(handle.read(8), handle.read, stat.st_size, str(path)), stat


def header_length(prefix: bytes, size: int, where: str) -> int:
    """Length of the header from the first 8 bytes of a file of `size` bytes."""
    if len(prefix) < 8:
        raise SourceError(f"{where} is truncated: {size} bytes hold no safetensors header.", hint="Download the file again.")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER:
        raise SourceError(f"{where} announces a header of {length} bytes; it is damaged or no safetensors file.")
    if length > size - 8:
        raise SourceError(
            f"{where} is truncated: its header alone needs {length + 8} bytes, the file has {size}.", hint="Download the file again."
        )
    return length


def read_header(prefix: bytes, read: Any, size: int, where: str) -> dict[str, TensorLocation]:
    """The tensors of a safetensors file of `size` bytes, whose header `read(n)` gives after the first 8 bytes."""
    length = header_length(prefix, size, where)
    raw = read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{where} has a damaged header: {error}.") from None
    if len(raw) != length or not isinstance(header, dict):
        raise SourceError(f"{where} has a damaged header.")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise SourceError(f"{where} has metadata that are no strings.")
    for name in header:
        check_name(name, where)
    file, base = Path(where).name, 8 + length
    tensors = {name: _stored(name, entry, file, base, where) for name, entry in header.items()}
    at = base
    for name, t in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if t.start != at:
            raise SourceError(
                f"{where}: the data of {name} {'overlap other data' if t.start < at else 'follow a hole'}; the file is damaged."
            )
        at = t.stop
    if at != size:
        raise SourceError(
            f"{where} is {'truncated' if at > size else 'too long'}: its header accounts for {at} bytes, the file has {size}.",
            hint="Download the file again.",
        )
    return tensors


def check_name(name: str, where: str) -> None:
    """Names are shown to the user: what is long or speaks to the terminal is refused."""
    if not name.isprintable() or len(name) > MAX_NAME:
        raise SourceError(f"{where} is damaged: {name[:60]!r} is no tensor's name.")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a name stands twice")
    return out


def _stored(name: str, entry: Any, file: str, base: int, where: str) -> TensorLocation:
    def whole(values: Any) -> bool:
        return isinstance(values, list) and all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 2**62 for v in values)

    if (
        not isinstance(entry, dict)
        or not whole(entry.get("shape"))
        or not whole(entry.get("data_offsets"))
        or len(entry["data_offsets"]) != 2
        or len(entry["shape"]) > MAX_DIMS
        or not isinstance(entry.get("dtype"), str)
    ):
        raise SourceError(f"{where}: the header's entry for {name} is damaged.")
    dtype, shape, (start, stop) = entry.get("dtype"), entry["shape"], entry["data_offsets"]
    if dtype not in DTYPE_BYTES:
        raise SourceError(
            f"{where}: {name} is {str(dtype)[:40]!r}; hf-grow reads {', '.join(DTYPE_BYTES)}.",
            hint="Quantized weights must be dequantized first.",
        )
    if stop - start != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise SourceError(
            f"{where}: {name} of shape {shape} and dtype {dtype} needs {math.prod(shape) * DTYPE_BYTES[dtype]} bytes, its offsets span {stop - start}."
        )
    return TensorLocation(file, dtype, tuple(shape), base + start, base + stop)
