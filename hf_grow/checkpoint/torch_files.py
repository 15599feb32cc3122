"""Files that torch.save wrote, read without executing pickled code and without reading tensors before their rows are wanted."""

from __future__ import annotations

import importlib
import io
import math
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from hf_grow.common.safe_files import MAX_FILE_BYTES, error_text, open_regular
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

    def is_contiguous(self) -> bool:
        return self.stride == _strides(self.shape)

    def reshaped(self, shape: tuple[int, ...]) -> FileTensor:
        """A contiguous tensor in another shape."""
        return replace(self, shape=shape, stride=_strides(shape))

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


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


@dataclass(frozen=True)
class SubclassTensor:
    """A tensor subclass that holds other tensors: a quantized one of torchao, say. ``parts``: FileTensors, or whatever has `rows` and `whole`."""

    kind: Any
    parts: Mapping[str, Any]
    context: Any
    """What else its class needs."""
    shape: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(tensor: Any, part: Callable[[Tensor], Any]) -> SubclassTensor:
        names, context = tensor.__tensor_flatten__()
        return SubclassTensor(type(tensor), {n: part(getattr(tensor, n)) for n in names}, context, tuple(tensor.shape), tensor.dtype)

    def build(self, part: Callable[[Any], Tensor]) -> Any:
        return self.kind.__tensor_unflatten__({n: part(v) for n, v in self.parts.items()}, self.context)


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
            try:
                found = _load(file, start, length)
            except pickle.UnpicklingError as error:
                if "GLOBAL torchao." not in str(error) or find_spec("torchao") is None:
                    raise
                importlib.import_module("torchao.optim")  # which tells torch that its classes are safe
                found = _load(file, start, length)
            return map_tensors(found, lambda t: _located(t, path, start))
        except Exception as error:  # whatever a damaged or hostile file raises under weights_only
            unknown = re.search(r"GLOBAL (\w+)(\.[\w.]+)", str(error))
            if unknown is None:
                raise SourceError(f"{path} cannot be read: {(str(error).splitlines() or ['?'])[0]}") from None
            install = "Install torchao, whose tensors it holds: pip install torchao" if unknown[1] == "torchao" else ""
            raise SourceError(
                f"{path} cannot be read: {unknown[1]}{unknown[2]} is neither a tensor nor plain data.", hint=install
            ) from None


def plain_values(path: Path) -> Any:
    """The numbers, strings, lists and dicts of a file that torch.save wrote. Whatever else it holds, tensors too, becomes an inert `Unread`.

    For files with classes of their own, which `open_torch_file` refuses: none of their code is executed. Raises SourceError for a damaged file.
    """
    with open_regular(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                inside = next(i for i in archive.infolist() if i.filename.endswith("/data.pkl"))
                if inside.file_size > MAX_FILE_BYTES:
                    raise ValueError("its data is too large")
                return _PlainReader(io.BytesIO(archive.read(inside))).load()
        except Exception as error:  # whatever damaged bytes raise
            raise SourceError(f"{path} cannot be read: {(str(error).splitlines() or ['?'])[0]}") from None


class Unread:
    """Takes the place of what is not read. Accepts whatever a pickle does to it."""

    def __init__(self, *values: Any, **named: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass


class _PlainReader(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> Any:
        return dict if (module, name) == ("collections", "OrderedDict") else Unread

    def persistent_load(self, pid: Any, /) -> Any:
        return Unread()


def _load(file: io.FileIO, start: int, length: int) -> Any:
    # On the meta device storages are not read, but know where they lie in the file.
    return torch.load(io.BufferedReader(_Part(file, start, length)), map_location="meta", weights_only=True)


def save_torch_file(data: Any, path: Path) -> None:
    """Writes nested dicts and lists as torch.save does, tensor by tensor: what has `rows` and `whole` (a FileTensor, say) is read in blocks of rows.

    Raises OSError and RuntimeError where the file cannot be written.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        empty = map_tensors(data, _empty)
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(empty, path)
    with path.open("r+b") as file:
        _fill(data, open_torch_file(path), file)
        os.fsync(file.fileno())


def _empty(like: Any) -> Tensor:
    if not isinstance(like, SubclassTensor):
        return torch.empty(tuple(like.shape), dtype=like.dtype)
    made: Tensor = like.build(_empty)
    return made


def _fill(data: Any, places: Any, file: BinaryIO) -> None:
    """Writes the tensors of `data` to their places in the file."""
    if isinstance(places, SubclassTensor):
        data, places = data.parts, places.parts
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


def map_tensors(data: Any, change: Callable[[Any], Any]) -> Any:
    """Nested dicts, lists and tuples with `change` applied to tensors and to what stands for one."""
    if isinstance(data, (Tensor, SubclassTensor)) or hasattr(data, "rows"):
        return change(data)
    if isinstance(data, dict):
        return {k: map_tensors(v, change) for k, v in data.items()}
    return type(data)(map_tensors(v, change) for v in data) if type(data) in (list, tuple) else data


def _located(tensor: Tensor, path: Path, start: int) -> FileTensor | SubclassTensor:
    if hasattr(tensor, "__tensor_flatten__"):
        return SubclassTensor.of(tensor, lambda t: _located(t, path, start))
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
