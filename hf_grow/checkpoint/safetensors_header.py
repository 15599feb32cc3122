"""Parses and validates the header of an untrusted safetensors file.

`TensorLocation` gives the byte range of each tensor, so that only those bytes are copied or read. The format: 8 bytes of header length (little
endian), a JSON header, and data that the offsets must cover without gap or overlap.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_grow.common.safe_files import open_regular
from hf_grow.errors import SourceError
from hf_grow.growth.source_info import DTYPE_BYTES, TensorInfo

MAX_HEADER = 100_000_000  # the limit of the safetensors library
MAX_DIMS = 8
MAX_NAME = 500


@dataclass(frozen=True)
class TensorLocation:
    """Where a tensor is stored: bytes [start, stop) of a file, counted from its beginning."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def info(self) -> TensorInfo:
        return TensorInfo(self.dtype, self.shape)


def read_file_header(path: Path) -> tuple[dict[str, TensorLocation], os.stat_result]:
    """The tensors of a safetensors file by name, and the file's stat result. Raises SourceError."""
    with open_regular(path) as handle:
        stat = os.fstat(handle.fileno())
        return read_header(handle.read(8), handle.read, stat.st_size, str(path)), stat


def header_length(prefix: bytes, size: int, where: str) -> int:
    """Length of the JSON header, from the first 8 bytes of a file of `size` bytes. Raises SourceError."""
    if len(prefix) < 8:
        raise SourceError(f"{where} is truncated: {size} bytes are too short for a safetensors header.", hint="Download the file again.")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER:
        raise SourceError(f"{where} is damaged or not a safetensors file: its header length is {length} bytes.")
    if length > size - 8:
        raise SourceError(
            f"{where} is truncated: its header needs {length + 8} bytes, the file has {size}.", hint="Download the file again."
        )
    return length


def read_header(prefix: bytes, read: Callable[[int], bytes], size: int, where: str) -> dict[str, TensorLocation]:
    """The tensors of a safetensors file by name.

    Args:
        prefix: the first 8 bytes.
        read: returns the n bytes after them.
        size: size of the whole file in bytes.
        where: name of the file in error messages; its last component becomes `TensorLocation.file`.

    Raises SourceError.
    """
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
        raise SourceError(f"{where} has metadata that is not a mapping of strings.")
    for name in header:
        check_name(name, where)
    file, base = Path(where).name, 8 + length
    tensors = {name: _stored(name, entry, file, base, where) for name, entry in header.items()}
    at = base
    for name, t in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if t.start != at:
            raise SourceError(f"{where} is damaged: the data of {name} {'overlaps other data' if t.start < at else 'follows a gap'}.")
        at = t.stop
    if at != size:
        raise SourceError(
            f"{where} is {'truncated' if at > size else 'too long'}: its header describes {at} bytes, the file has {size}.",
            hint="Download the file again.",
        )
    return tensors


def check_name(name: str, where: str) -> None:
    """Raises SourceError for a name that cannot be displayed: too long, or with control characters."""
    if not name.isprintable() or len(name) > MAX_NAME:
        raise SourceError(f"{where} is damaged: {name[:60]!r} is not a valid tensor name.")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("duplicate name")
    return out


def _stored(name: str, entry: Any, file: str, base: int, where: str) -> TensorLocation:
    def is_int_list(values: Any) -> bool:
        return isinstance(values, list) and all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 2**62 for v in values)

    if (
        not isinstance(entry, dict)
        or not is_int_list(entry.get("shape"))
        or not is_int_list(entry.get("data_offsets"))
        or len(entry["data_offsets"]) != 2
        or len(entry["shape"]) > MAX_DIMS
        or not isinstance(entry.get("dtype"), str)
    ):
        raise SourceError(f"{where}: the header entry of {name} is invalid.")
    dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in DTYPE_BYTES:
        raise SourceError(
            f"{where}: {name} has dtype {str(dtype)[:40]!r}; supported: {', '.join(DTYPE_BYTES)}.",
            hint="Dequantize quantized weights first.",
        )
    nbytes = math.prod(shape) * DTYPE_BYTES[dtype]
    if stop - start != nbytes:
        raise SourceError(f"{where}: {name} of shape {shape} and dtype {dtype} needs {nbytes} bytes, its offsets span {stop - start}.")
    return TensorLocation(file, dtype, tuple(shape), base + start, base + stop)
