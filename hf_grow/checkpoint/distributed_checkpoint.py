"""Folders that torch.distributed.checkpoint wrote, read by rows in one process, whatever number of processes wrote them.

.metadata and *.distcp    its own form (FSDP with SHARDED_STATE_DICT): pickles, of which no code is executed. Of .metadata only the classes
                          that such a file holds are accepted, and none of them is torch's: they become plain records.
*.safetensors             written by its HuggingFaceStorageWriter: every process's shards, with their places in the header
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_grow.checkpoint.torch_files import open_torch_file
from hf_grow.common.safe_files import open_regular, read_bytes
from hf_grow.errors import SourceError

METADATA = ".metadata"
MAX_METADATA = 2_000_000_000
"""Bytes: about 150 a shard of a tensor, so 13 million of them."""


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor. ``read``: its rows [start, stop) of dimension 0, counted within the part; of a scalar, its value for (0, 1)."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    read: Callable[[int, int], Tensor]


@dataclass(frozen=True)
class ChunkedTensor:
    """A tensor that is stored in parts."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of dimension 0, as a new tensor. Raises SourceError where parts are missing."""
        out, filled = torch.empty(stop - start, *self.shape[1:], dtype=self.dtype), 0
        for chunk in self.chunks:
            low, high = max(start, chunk.offsets[0]), min(stop, chunk.offsets[0] + chunk.sizes[0])
            if low >= high or 0 in chunk.sizes:
                continue
            place = out[low - start : high - start]
            for dim, (at, size) in enumerate(zip(chunk.offsets[1:], chunk.sizes[1:], strict=True), 1):
                place = place.narrow(dim, at, size)
            place.copy_(chunk.read(low - chunk.offsets[0], high - chunk.offsets[0]))
            filled += place.numel()
        if filled != out.numel():
            raise SourceError(f"Of rows {start} to {stop} of {self.name} the checkpoint has {filled} of {out.numel()} values.")
        return out

    def whole(self) -> Tensor:
        """The tensor. Raises as `rows`."""
        return self.rows(0, self.shape[0]) if self.shape else self.chunks[0].read(0, 1)


class DistributedCheckpoint:
    """The tensors and other values of such a folder, by the path of keys in the state that was saved.

    In safetensors a tensor's path is its name alone. Raises SourceError for a damaged folder, and for one that holds other classes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[tuple[str, ...], ChunkedTensor] = {}
        self._stored: dict[tuple[str, ...], _Stored] = {}
        try:
            if (folder / METADATA).is_file():
                self._open_distcp()
            else:
                self._open_safetensors()
        except (AttributeError, LookupError, TypeError, ValueError, AssertionError) as error:
            raise SourceError(f"{folder} is damaged: {' '.join(str(error).split())[:200]}.") from None

    @cached_property
    def objects(self) -> Mapping[tuple[str, ...], Any]:
        """The values that are no tensors."""
        return {path: open_torch_file(s.path, s.offset, s.length) for path, s in self._stored.items()}

    def _open_distcp(self) -> None:
        known = _read_metadata(self.folder / METADATA)
        files = {(index.fqn, index.offset): self._file(info) for index, info in known.storage_data.items()}
        paths = known.planner_data if isinstance(known.planner_data, dict) else {}
        for name, entry in known.state_dict_metadata.items():
            path = tuple(map(str, paths.get(name, (name,))))
            if isinstance(entry, _Bytes):
                self._stored[path] = files[name, None]
                continue
            dtype, shape = _dtype(entry.properties.dtype), tuple(entry.size)
            chunks = [(tuple(c.offsets), tuple(c.sizes)) for c in entry.chunks]
            if any(len(o) != len(shape) or any(i + n > whole for i, n, whole in zip(o, s, shape, strict=True)) for o, s in chunks):
                raise ValueError(f"a part of {name} lies outside it")
            self.tensors[path] = ChunkedTensor(
                name, dtype, shape, tuple(Chunk(o, s, _distcp_reader(name, files[name, o], dtype, s)) for o, s in chunks)
            )

    def _file(self, info: Any) -> _Stored:
        name = str(info.relative_path)
        if name != Path(name).name or name.startswith("."):
            raise ValueError(f"{name!r} is not the name of a file in it")
        if info.transform_descriptors:
            raise ValueError(f"{name} is compressed or encrypted")
        return _Stored(self.folder / name, int(info.offset), int(info.length))

    def _open_safetensors(self) -> None:
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

        files = sorted(self.folder.glob("*.safetensors"))
        if not files:
            raise SourceError(f"{self.folder} holds no {METADATA} and no .safetensors files.")
        for file in files:
            open_regular(file).close()
        try:
            known = HuggingFaceStorageReader(str(self.folder)).read_metadata()
        except Exception as error:  # the library's own, without a common base
            raise SourceError(f"{self.folder} cannot be read: {(str(error).splitlines() or ['?'])[0]}") from None
        files_of = {(i.fqn, tuple(i.offset or ())): Path(s.relative_path) for i, s in (known.storage_data or {}).items()}
        for name, entry in known.state_dict_metadata.items():
            chunks = [(tuple(c.offsets), tuple(c.sizes)) for c in entry.chunks]  # type: ignore[union-attr]
            self.tensors[name,] = ChunkedTensor(
                name,
                entry.properties.dtype,  # type: ignore[union-attr]
                tuple(entry.size),  # type: ignore[union-attr]
                tuple(Chunk(o, s, _safetensors_reader(name, files_of[name, o], s)) for o, s in chunks),
            )


@dataclass(frozen=True)
class _Stored:
    """Bytes of a .distcp file: one tensor or value, as torch.save writes it."""

    path: Path
    offset: int
    length: int


def _distcp_reader(name: str, stored: _Stored, dtype: torch.dtype, sizes: tuple[int, ...]) -> Callable[[int, int], Tensor]:
    def read(start: int, stop: int) -> Tensor:
        tensor = open_torch_file(stored.path, stored.offset, stored.length)
        if (getattr(tensor, "dtype", None), getattr(tensor, "shape", None)) != (dtype, sizes):
            raise SourceError(f"{stored.path} holds something else than {METADATA} says of {name}.")
        found: Tensor = tensor.rows(start, stop) if sizes else tensor.whole()
        return found

    return read


def _safetensors_reader(name: str, path: Path, sizes: tuple[int, ...]) -> Callable[[int, int], Tensor]:
    def read(start: int, stop: int) -> Tensor:
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            found: Tensor = file.get_slice(name)[start:stop] if sizes else file.get_tensor(name)
            return found

    return read


# ---- .metadata ---------------------------------------------------------------------------------------------------------------------------


class _Record:
    """Takes the place of torch's dataclasses, and holds what the file says of one."""

    transform_descriptors: Any = None
    offset: Any = None
    planner_data: Any = None

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"dtype": state[0]})

    def __hash__(self) -> int:  # a MetadataIndex is a key before its fields are known
        return id(self)


class _Bytes(_Record):
    """A value that is no tensor."""


def _size(values: Any = ()) -> tuple[int, ...]:
    if not all(type(v) is int and v >= 0 for v in values):
        raise ValueError("a size is no whole number")
    return tuple(values)


_PLACE, _SHARDED = "torch.distributed.checkpoint.metadata", "torch.distributed._shard.sharded_tensor.metadata"
_ALLOWED: Mapping[tuple[str, str], Callable[..., Any]] = {
    **{(_PLACE, n): _Record for n in ("Metadata", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "MetadataIndex")},
    **{(_PLACE, n): _Record for n in ("StorageMeta", "_MEM_FORMAT_ENCODING")},
    **{(_SHARDED, n): _Record for n in ("TensorProperties", "MEM_FORMAT_ENCODING")},  # torch before 2.3
    (_PLACE, "BytesStorageMetadata"): _Bytes,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Record,
    ("torch", "Size"): _size,
    ("torch.serialization", "_get_layout"): str,
    **{(m, n): _Record for m in ("pathlib", "pathlib._local") for n in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")},
}


@dataclass(frozen=True)
class _DtypeName:
    name: str


class _MetadataReader(pickle.Unpickler):
    """Knows the classes above and the names of dtypes."""

    def find_class(self, module: str, name: str, /) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return _DtypeName(name)
        if (module, name) not in _ALLOWED:
            raise SourceError(f"{METADATA} asks for {module}.{name}, which no such file holds; it is not loaded.")
        return _ALLOWED[module, name]


def _dtype(named: Any) -> torch.dtype:
    found = getattr(torch, named.name)
    assert isinstance(found, torch.dtype)
    return found


def _read_metadata(path: Path) -> Any:
    """Raises SourceError for anything but the metadata of a checkpoint."""
    data = read_bytes(path, max_bytes=MAX_METADATA)
    try:
        found = _MetadataReader(io.BytesIO(data)).load()
    except SourceError:
        raise
    except Exception as error:  # whatever damaged bytes raise
        raise SourceError(f"{path} is damaged: {(str(error).splitlines() or ['?'])[0]}.") from None
    if not isinstance(found, _Record) or not isinstance(getattr(found, "state_dict_metadata", None), dict):
        raise SourceError(f"{path} is not the metadata of a checkpoint.")
    return found
