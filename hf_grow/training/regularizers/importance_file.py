"""Importance files: a non-negative number per parameter of one model (the Fisher diagonal, or SI's), by names on disk, in safetensors.

The metadata say how the numbers were made, and of which model: a fingerprint of 16 values of every tensor, in bf16, to which an fp32 and a bf16 copy
of a checkpoint round alike. A file of another model of the same shapes is refused by it.
"""

from __future__ import annotations

import base64
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hf_grow._version import __version__
from hf_grow.checkpoint.reader import Checkpoint
from hf_grow.checkpoint.writer import build_shard
from hf_grow.common.safe_files import open_regular
from hf_grow.errors import ExecutionError, InputError, OutputError
from hf_grow.growth.source_info import DTYPE_BYTES, TensorInfo
from hf_grow.growth.tensors import raw_bytes, torch_dtype
from hf_grow.training.distributed.processes import ALONE, Processes
from hf_grow.training.param_updates.parameter_map import ParameterRows, parameter_map, parameters
from hf_grow.training.param_updates.shards import local, local_window, sum_over_processes
from hf_grow.training.sharding.row_source import RowSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = "hf-grow importance 1"
SAMPLES_PER_TENSOR = 16
STORAGE = {"fp32": "F32", "bf16": "BF16"}
_WRITE_ONE = "Write one: hf-grow fisher MODEL --text OLD_DATA -o FILE."
_WRITE_AGAIN = "Write the file again with hf-grow fisher."


def sample_positions(count: int) -> Tensor:
    """Flat positions of the sampled values of a tensor of ``count`` values: SAMPLES_PER_TENSOR, evenly spaced (all of a smaller tensor)."""
    return torch.linspace(0, count - 1, min(SAMPLES_PER_TENSOR, count), dtype=torch.float64).long()


def sample_values(tensors: Mapping[str, tuple[Tensor, ParameterRows | None]]) -> dict[str, Tensor]:
    """The sampled values of tensors by name (of these rows, or of all), bf16 on the CPU.

    Of sharded tensors every process gives the values that it holds: one all-reduce for all of them, which every process must call.
    """
    held = [_held_samples(tensor.detach(), rows) for tensor, rows in tensors.values()]
    found = torch.cat(held, dim=1)
    # Every value is a bf16 number and is counted as often as it is held, so that sum and quotient are exact.
    total, count = sum_over_processes(found, (tensor for tensor, _ in tensors.values()))
    values = (total / count).to("cpu", torch.bfloat16)
    return dict(zip(tensors, values.split([h.shape[1] for h in held]), strict=True))


def _held_samples(tensor: Tensor, rows: ParameterRows | None) -> Tensor:
    """[2, samples]: the sampled values that this process holds, and 1 for each of them."""
    width = 1 if tensor.dim() == 1 else tensor.shape[-1]
    first, count = (0, tensor.numel()) if rows is None else (rows.start * width, (rows.stop - rows.start) * width)
    at = torch.unravel_index(sample_positions(count) + first, tensor.shape)
    window, part = local_window(tensor), local(tensor)
    inside = torch.stack([(a >= r.start) & (a < r.stop) for a, r in zip(at, window, strict=True)]).all(0)
    found = torch.zeros(2, len(inside), dtype=torch.float64, device=part.device)
    found[0] = -0.0  # which a sum leaves as it is, unlike 0.0 a value of -0.0
    if bool(inside.any()):
        values = part[tuple((a[inside] - r.start).to(part.device) for a, r in zip(at, window, strict=True))]
        found[:, inside.to(part.device)] = torch.stack([values.bfloat16().double(), torch.ones_like(values, dtype=torch.float64)])
    return found


def encode_samples(tensors: Mapping[str, Tensor]) -> str:
    """Sampled values by name as one string, in order of the names."""
    values = torch.cat([tensors[n] for n in sorted(tensors)])
    return base64.b64encode(values.view(torch.uint8).numpy().tobytes()).decode()


def decode_samples(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.bfloat16)


def model_fingerprint(model: PreTrainedModel) -> str:
    """Sampled values of all tensors of a model. One all-reduce for sharded parameters."""
    params = parameters(model)
    return encode_samples(sample_values({n: (params[rows.parameter], rows) for n, rows in parameter_map(model).items()}))


def checkpoint_fingerprint(checkpoint: Checkpoint) -> str:
    """`model_fingerprint` of a checkpoint on this machine, read value by value without loading a model."""
    samples: dict[str, Tensor] = {}
    for name in checkpoint.info.architecture.tensors:
        stored = checkpoint.tensors[name]
        width, count = DTYPE_BYTES[stored.dtype], math.prod(stored.shape)
        with open_regular(checkpoint.path(stored.file)) as file:
            data = b"".join(os.pread(file.fileno(), width, stored.start + width * at) for at in sample_positions(count).tolist())
        samples[name] = torch.frombuffer(bytearray(data), dtype=torch_dtype(stored.dtype)).to(torch.bfloat16)
    return encode_samples(samples)


def rows_fingerprint(source: RowSource, names: Iterable[str]) -> str:
    """The same of tensors that are read by rows."""
    samples: dict[str, Tensor] = {}
    for name in names:
        shape = source.shape(name)
        width = math.prod(shape[1:])
        at = sample_positions(math.prod(shape)).tolist()
        samples[name] = torch.stack([source.rows(name, i // width, i // width + 1).reshape(-1)[i % width] for i in at]).to(torch.bfloat16)
    return encode_samples(samples)


@dataclass(frozen=True)
class ImportanceFile:
    """An open importance file with a valid header; a RowSource."""

    path: Path
    metadata: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]

    def names(self) -> Collection[str]:
        return self.shapes.keys()

    def shape(self, name: str) -> Sequence[int]:
        return self.shapes[name]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows in their stored dtype. Raises InputError for values that are negative or not finite."""
        with safe_open(self.path, framework="pt") as file:  # opened anew: pages of a mapped file count as memory of the process
            tensor: Tensor = file.get_slice(name)[start:stop]
        if not bool(torch.isfinite(tensor).all()) or bool((tensor < 0).any()):
            raise InputError(f"{self.path}: {name} contains values that are negative or not finite.", hint=_WRITE_AGAIN)
        return tensor

    def read(self, name: str) -> Tensor:
        """A whole tensor by its name on disk."""
        return self.rows(name, 0, self.shapes[name][0])


@dataclass(frozen=True)
class DecayedImportances:
    """Several files of one model, oldest first, as a RowSource in fp32: each counts ``decay`` times as much as the next.

    Online EWC, Schwarz et al. 2018, arXiv 1805.06370.
    """

    files: Sequence[RowSource]
    decay: float = 1.0

    def names(self) -> Collection[str]:
        return self.files[-1].names()

    def shape(self, name: str) -> Sequence[int]:
        return self.files[-1].shape(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        total = torch.zeros(stop - start, *self.shape(name)[1:])
        for file in self.files:
            total.mul_(self.decay).add_(file.rows(name, start, stop))
        return total


def open_importance(path: Path) -> ImportanceFile:
    """Raises InputError for a file that is missing, damaged, or not an importance file."""
    if not path.is_file():
        raise InputError(f"{path} does not exist.", hint=_WRITE_ONE)
    open_regular(path, error=InputError).close()  # safetensors reports a file without read permission as missing
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            shapes = {name: tuple(s.get_shape()) for name, s in slices.items()}
            dtypes = {s.get_dtype() for s in slices.values()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read: {str(error).splitlines()[0]}", hint=_WRITE_AGAIN) from None
    if metadata.get("format") != FORMAT or "sample" not in metadata:
        raise InputError(f"{path} is not an importance file.", hint=_WRITE_ONE)
    if not dtypes <= {"F32", "BF16"}:
        others = " and ".join(sorted(dtypes - {"F32", "BF16"}))
        raise InputError(f"{path} has dtype {others}; importances must be F32 or BF16 (squares overflow F16).")
    return ImportanceFile(path, metadata, shapes)


def check_same_model(
    file: ImportanceFile, shapes: Mapping[str, tuple[int, ...]], fingerprint: str | None, *, computed: bool = False
) -> None:
    """Raises InputError if the file belongs to another model.

    Args:
        file: the importance file.
        shapes: of the model's tensors, by names on disk.
        fingerprint: of the model; None compares the shapes alone.
        computed: the fingerprint is of weights that were computed, so that rounding moves values: 99.9 % must agree to within 2^-6.
    """
    model = file.metadata.get("model", "another model")
    hint = "Use the Fisher of the model that is trained; after growth: hf-grow fisher GROWN --from-growth SOURCE_FISHER."
    wrong_model = f"{file.path} belongs to another model ({model})"
    if differing := sorted(shapes.keys() ^ file.shapes.keys()):
        raise InputError(f"{wrong_model}: {len(differing)} tensors are in only one of the two, such as {differing[0]}.", hint=hint)
    for name, shape in shapes.items():
        if file.shapes[name] != tuple(shape):
            raise InputError(f"{wrong_model}: {name} has shape {list(file.shapes[name])} instead of {list(shape)}.", hint=hint)
    if fingerprint is not None and not _same_samples(file.metadata["sample"], fingerprint, computed):
        raise InputError(f"{wrong_model}: the shapes agree, but the weights differ.", hint=hint)


def _same_samples(one: str, other: str, computed: bool) -> bool:
    if not computed or len(one) != len(other):
        return one == other
    return float(close_samples(decode_samples(one), decode_samples(other)).double().mean()) > 0.999


def close_samples(a: Tensor, b: Tensor) -> Tensor:
    """Whether sampled values agree up to rounding: bool, of their shape."""
    a, b = a.double(), b.double()
    return (a - b).abs() <= 2.0**-6 * a.abs() + 1e-6


def write_importance(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, Any],
    *,
    storage: str = "fp32",
) -> None:
    """`write_importance_rows` of whole tensors, by one process."""
    write_importance_rows(path, shapes, ((name, 0, tensor) for name, tensor in tensors), metadata, storage=storage)


def write_importance_rows(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    parts: Iterable[tuple[str, int, Tensor]],
    metadata: Mapping[str, Any],
    *,
    storage: str = "fp32",
    processes: Processes = ALONE,
) -> None:
    """Writes ``parts`` (name, first row, rows) as they come, in any order, one in memory at a time; ``path`` appears when all of ``shapes`` are written.

    Several processes each write their own parts into one file, whose place is known from ``shapes``. ``storage``: a key of STORAGE.
    Raises OutputError, in all processes, if the file cannot be written, ExecutionError if a value is not finite.
    """
    dtype = STORAGE[storage]
    header = {"format": FORMAT, "made_by": f"hf-grow {__version__}", **{k: str(v) for k, v in metadata.items()}}
    shard = build_shard(path.name, {n: TensorInfo(dtype, s) for n, s in shapes.items()}, header)
    starts = {slot.name: slot.start for slot in shard.slots}
    partial, first, written = path.with_name(path.name + ".partial"), processes.index == 0, 0
    try:
        with processes.all_or_none(), _write_errors(path):
            if first:
                partial.write_bytes(shard.header)
                os.truncate(partial, shard.size)
        with processes.all_or_none(), _write_errors(path), partial.open("r+b") as file:
            for name, row, rows in parts:
                if not bool(torch.isfinite(rows).all()):
                    raise ExecutionError(f"The importance of {name} is not finite.", hint="Compute in float32 (--dtype float32).")
                data = raw_bytes(rows.to("cpu", torch_dtype(dtype)).contiguous())
                file.seek(starts[name] + row * math.prod(shapes[name][1:]) * DTYPE_BYTES[dtype])
                written += file.write(data)
            file.flush()
            os.fsync(file.fileno())
        missing = shard.size - len(shard.header) - sum(processes.gather(written))
        assert not missing, f"{missing} bytes were not given"
        with processes.all_or_none(), _write_errors(path):
            if first:
                partial.replace(path)
    finally:
        if first:
            partial.unlink(missing_ok=True)


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}.") from None
