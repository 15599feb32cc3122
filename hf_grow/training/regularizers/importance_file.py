"""Importance files: a non-negative number per parameter of one model (the Fisher diagonal, or SI's), by names on disk, in safetensors.

The metadata say how the numbers were made, and of which model: a fingerprint of 16 values of every tensor, in bf16, to which an fp32 and a bf16 copy
of a checkpoint round alike. A file of another model of the same shapes is refused by it.
"""

from __future__ import annotations

import base64
import math
import os
from collections.abc import Iterable, Mapping
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
from hf_grow.training.param_updates.parameter_map import parameter_map, parameters
from hf_grow.training.regularizers.sharding import full_tensor
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


def sample_values(tensor: Tensor) -> Tensor:
    """The sampled values of a tensor, bf16 on the CPU. A collective for a sharded tensor."""
    flat = full_tensor(tensor.detach()).reshape(-1)
    return flat[sample_positions(flat.numel()).to(flat.device)].to("cpu", torch.bfloat16)


def encode_samples(tensors: Mapping[str, Tensor]) -> str:
    """Sampled values by name as one string, in order of the names."""
    values = torch.cat([tensors[n] for n in sorted(tensors)])
    return base64.b64encode(values.view(torch.uint8).numpy().tobytes()).decode()


def decode_samples(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.bfloat16)


def model_fingerprint(model: PreTrainedModel) -> str:
    """Sampled values of all tensors of a model. A collective for sharded parameters."""
    params = parameters(model)
    return encode_samples(
        {n: sample_values(rows.of(full_tensor(params[rows.parameter].detach()))) for n, rows in parameter_map(model).items()}
    )


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
    """An open importance file with a valid header."""

    path: Path
    metadata: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    _file: Any

    def read(self, name: str) -> Tensor:
        """A tensor by its name on disk, in its stored dtype. Raises InputError for values that are negative or not finite."""
        tensor: Tensor = self._file.get_tensor(name)
        if not bool(torch.isfinite(tensor).all()) or bool((tensor < 0).any()):
            raise InputError(f"{self.path}: {name} contains values that are negative or not finite.", hint=_WRITE_AGAIN)
        return tensor


def open_importance(path: Path) -> ImportanceFile:
    """Raises InputError for a file that is missing, damaged, or not an importance file."""
    if not path.is_file():
        raise InputError(f"{path} does not exist.", hint=_WRITE_ONE)
    open_regular(path, error=InputError).close()  # safetensors reports a file without read permission as missing
    try:
        file: Any = safe_open(path, framework="pt")
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
    return ImportanceFile(path, metadata, shapes, file)


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
    """Writes ``tensors`` as they come, in any order, one in memory at a time; ``path`` appears when all of ``shapes`` are written.

    ``storage``: a key of STORAGE. Raises OutputError if the file cannot be written, ExecutionError if a value is not finite.
    """
    dtype = STORAGE[storage]
    header = {"format": FORMAT, "made_by": f"hf-grow {__version__}", **{k: str(v) for k, v in metadata.items()}}
    shard = build_shard(path.name, {n: TensorInfo(dtype, s) for n, s in shapes.items()}, header)
    missing = {slot.name: slot for slot in shard.slots}
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(shard.header)
            for name, tensor in tensors:
                if not bool(torch.isfinite(tensor).all()):
                    raise ExecutionError(f"The importance of {name} is not finite.", hint="Compute in float32 (--dtype float32).")
                file.seek(missing.pop(name).start)
                file.write(raw_bytes(tensor.to("cpu", torch_dtype(dtype)).contiguous()))
            assert not missing, f"{len(missing)} tensors were not given"
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}.") from None
    finally:
        partial.unlink(missing_ok=True)
