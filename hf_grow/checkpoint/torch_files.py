"""Files that torch.save wrote, read without executing pickled code and without reading tensors before their rows are wanted."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from hf_grow.common.safe_files import error_text, open_regular
from hf_grow.errors import SourceError
from hf_grow.growth.tensors import raw_bytes

PIECE = 1 << 30
"""Bytes of one read at most; the system's own limit is 2 GiB."""


BLOCK = 16 << 20
"""Bytes of a block of rows that is written."""


@dataclass(frozen=True)
class FileTensor:
    """A tensor in a file: its values begin at byte `offset`."""

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of dimension 0, as a new tensor. Raises SourceError where the file ends before."""
        shape = (stop - start, *self.shape[1:])
        span = 1 + sum((n - 1) * s for n, s in zip(shape, self.stride, strict=True)) if math.prod(shape) else 0
        flat = torch.empty(span, dtype=self.dtype)
        self._read(flat, self.offset + start * self.stride[0] * self.dtype.itemsize)
        return flat.as_strided(shape, self.stride).contiguous() if span else flat.view(shape)

    def whole(self) -> Tensor:
        """The tensor. Raises as `rows`."""
        if self.shape:
            return self.rows(0, self.shape[0])
        value = torch.empty(1, dtype=self.dtype)
        self._read(value, self.offset)
        return value[0]

    def _read(self, flat: Tensor, at: int) -> None:
        if not flat.numel():
            return
        data = raw_bytes(flat)
        with open_regular(self.path) as file:
            try:
                done = 0
                while done < len(data) and (got := os.preadv(file.fileno(), [data[done : done + PIECE]], at + done)):
                    done += got
            except OSError as error:
                raise SourceError(f"Cannot read {self.path}: {error_text(error)}.") from None
        if done < len(data):
            raise SourceError(f"{self.path} is truncated: a tensor of shape {list(self.shape)} ends after the file.")


def open_torch_file(path: Path, start: int = 0, length: int | None = None) -> Any:
    """What torch.save wrote to a file, or to `length` bytes of it from `start` on, with a FileTensor for every tensor.

    Raises SourceError for a damaged file and for one that holds anything but tensors and plain data.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = size - start if length is None else length
        if not 0 <= start <= start + length <= size:
            raise SourceError(f"{path} is truncated: it has {size} bytes, its contents need {start + length}.")
        try:
            # On the meta device storages are not read, but know where they lie in the file.
            found = torch.load(io.BufferedReader(_Part(file, start, length)), map_location="meta", weights_only=True)
            return _map(found, lambda t: _located(t, path, start), _is_tensor)
        except Exception as error:  # whatever a damaged or hostile file raises under weights_only
            raise SourceError(f"{path} cannot be read: {(str(error).splitlines() or ['?'])[0]}") from None


def save_torch_file(data: Any, path: Path) -> None:
    """Writes nested dicts and lists as torch.save does, tensor by tensor: what has `rows` and `whole` (a FileTensor, say) is read in blocks of rows.

    Raises OSError and RuntimeError where the file cannot be written.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        empty = _map(data, lambda v: torch.empty(tuple(v.shape), dtype=v.dtype), _is_tensor)
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(empty, path)
    with path.open("r+b") as file:
        _fill(data, open_torch_file(path), file)
        os.fsync(file.fileno())


def _fill(data: Any, places: Any, file: BinaryIO) -> None:
    """Writes the tensors of `data` to their places in the file."""
    if isinstance(places, FileTensor):
        file.seek(places.offset)
        for block in _blocks(data):
            file.write(raw_bytes(block.contiguous().view(-1)))
    elif isinstance(places, dict):
        for key, place in places.items():
            _fill(data[key], place, file)
    elif isinstance(places, (list, tuple)):
        for value, place in zip(data, places, strict=True):
            _fill(value, place, file)


def _blocks(tensor: Any) -> Iterator[Tensor]:
    if isinstance(tensor, Tensor) or not tensor.shape:
        yield tensor if isinstance(tensor, Tensor) else tensor.whole()
        return
    step = max(1, BLOCK // max(1, tensor.dtype.itemsize * math.prod(tensor.shape[1:])))
    for start in range(0, tensor.shape[0], step):
        yield tensor.rows(start, min(start + step, tensor.shape[0]))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or hasattr(value, "rows")


def _map(data: Any, change: Callable[[Any], Any], chosen: Callable[[Any], bool]) -> Any:
    """Nested dicts, lists and tuples with `change` applied to the values that are `chosen`."""
    if chosen(data):
        return change(data)
    if isinstance(data, dict):
        return {k: _map(v, change, chosen) for k, v in data.items()}
    return type(data)(_map(v, change, chosen) for v in data) if type(data) in (list, tuple) else data


def _located(tensor: Tensor, path: Path, start: int) -> FileTensor:
    at = tensor.untyped_storage()._checkpoint_offset
    if at is None:
        raise ValueError("it has the format of torch before 1.6; load it and save it again with a newer torch")
    offset = start + at + int(tensor.storage_offset()) * tensor.dtype.itemsize
    return FileTensor(path, offset, tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()))


class _Part(io.RawIOBase):
    """Bytes [start, start + length) of an open file, as a file."""

    def __init__(self, file: io.FileIO, start: int, length: int) -> None:
        self.file, self.start, self.length, self.at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self.at = max(0, offset + (0, self.at, self.length)[whence])
        return self.at

    def readinto(self, buffer: Any, /) -> int:
        wanted = memoryview(buffer).cast("B")[: max(0, self.length - self.at)]
        got = os.preadv(self.file.fileno(), [wanted], self.start + self.at) if len(wanted) else 0
        self.at += got
        return got
