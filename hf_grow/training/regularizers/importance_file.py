"""Files of importances: a number for every weight of one model, under the names on disk, in safetensors.

The metadata say what the numbers are (kind, tokens, how) and of which model: sixteen values of every tensor, as bf16, which both an fp32 and a
bf16 copy of a checkpoint round to. A file of another model, however alike, is refused by them.
"""

from __future__ import annotations

import base64
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_grow._version import __version__
from hf_grow.checkpoint.reader import Checkpoint
from hf_grow.checkpoint.writer import build_shard
from hf_grow.common.safe_files import open_regular
from hf_grow.errors import ExecutionError, InputError, OutputError
from hf_grow.growth.plan import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

FORMAT = "hf-grow importance 1"
SAMPLES_PER_TENSOR = 16
STORAGE = {"fp32": "F32", "bf16": "BF16"}


def sample_values(tensor: Tensor) -> Tensor:
    """The values of one tensor that identify it: SAMPLES of them, evenly spread, in bf16 on the CPU (all of a smaller tensor)."""
    import torch

    flat = full_tensor(tensor.detach()).reshape(-1)
    return flat[_sample_positions(flat.numel()).to(flat.device)].to("cpu", torch.bfloat16)


def _sample_positions(count: int) -> Tensor:
    import torch

    return torch.linspace(0, count - 1, min(SAMPLES_PER_TENSOR, count), dtype=torch.float64).long()


def model_fingerprint(model: PreTrainedModel) -> str:
    """What identifies the weights of a model, as one string; see `same_model`."""
    from hf_grow.training.param_updates.parameter_map import parameter_map, parameters

    held = parameters(model)
    return encode_samples(
        {n: sample_values(place.of(full_tensor(held[place.parameter].detach()))) for n, place in parameter_map(model).items()}
    )


def checkpoint_fingerprint(checkpoint: Checkpoint) -> str:
    """The same for a checkpoint on this machine, read value by value: no model is made."""
    import torch

    from hf_grow.growth.plan import DTYPE_BYTES
    from hf_grow.growth.tensors import torch_dtype

    found: dict[str, Tensor] = {}
    for name in checkpoint.info.architecture.tensors:
        stored = checkpoint.tensors[name]
        width, count = DTYPE_BYTES[stored.dtype], math.prod(stored.shape)
        with open_regular(checkpoint.path(stored.file)) as file:
            data = b"".join(os.pread(file.fileno(), width, stored.start + width * at) for at in _sample_positions(count).tolist())
        found[name] = torch.frombuffer(bytearray(data), dtype=torch_dtype(stored.dtype)).to(torch.bfloat16)
    return encode_samples(found)


def encode_samples(tensors: Mapping[str, Tensor]) -> str:
    import torch

    values = torch.cat([tensors[n] for n in sorted(tensors)])
    return base64.b64encode(values.view(torch.uint8).numpy().tobytes()).decode()


def decode_samples(text: str) -> Tensor:
    import torch

    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.bfloat16)


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor (every process must ask for it); any other as it is."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


@dataclass(frozen=True)
class ImportanceFile:
    """An open file of importances, whose header was read and found sound."""

    path: Path
    metadata: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    _file: Any

    def read(self, name: str) -> Tensor:
        """One tensor by its name on disk, in its stored dtype. Raises InputError for what cannot be an importance."""
        import torch

        tensor: Tensor = self._file.get_tensor(name)
        if not bool(torch.isfinite(tensor).all()) or bool((tensor < 0).any()):
            raise InputError(f"{self.path}: {name} holds values that are negative or not finite.", hint="Make the file again.")
        return tensor


def open_importance(path: Path) -> ImportanceFile:
    """Raises InputError for a file that is missing, damaged, or holds something else."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise InputError(f"There is no file {path}.", hint="Make one: hf-grow fisher MODEL --text OLD_DATA -o fisher.safetensors")
    open_regular(path, error=InputError).close()  # safetensors calls a file that may not be read a missing one
    try:
        file: Any = safe_open(path, framework="pt")
        metadata = file.metadata() or {}
        kinds = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        shapes = {name: tuple(s.get_shape()) for name, s in kinds.items()}
        dtypes = {s.get_dtype() for s in kinds.values()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read: {str(error).splitlines()[0]}", hint="Make the file again.") from None
    if metadata.get("format") != FORMAT or "sample" not in metadata:
        raise InputError(f"{path} is no file of importances.", hint="They are made by hf-grow fisher MODEL --text OLD_DATA -o FILE.")
    if not dtypes <= {"F32", "BF16"}:
        raise InputError(f"{path} holds {', '.join(sorted(dtypes - {'F32', 'BF16'}))}; importances are F32 or BF16 (squares overflow F16).")
    return ImportanceFile(path, metadata, shapes, file)


def check_same_model(found: ImportanceFile, shapes: Mapping[str, tuple[int, ...]], identity: str | None, *, close: bool = False) -> None:
    """Raises InputError if the file is of another model. ``shapes``: the model's tensors by names on disk; ``identity``: its `samples`.

    ``close``: the weights were computed, so rounding may move one of a thousand values by more than it may move any.
    """
    of = found.metadata.get("model", "another model")
    hint = "Take the Fisher of the model that is trained; for a grown one: hf-grow fisher GROWN --from-growth SOURCE_FISHER."
    if shapes.keys() != found.shapes.keys():
        odd = sorted(shapes.keys() ^ found.shapes.keys())
        raise InputError(f"{found.path} is of another model ({of}): {len(odd)} tensors are in one only, such as {odd[0]}.", hint=hint)
    for name, shape in shapes.items():
        if found.shapes[name] != tuple(shape):
            raise InputError(
                f"{found.path} is of another model ({of}): {name} has shape {list(found.shapes[name])} there, {list(shape)} here.",
                hint=hint,
            )
    if identity is not None and not _same_samples(found.metadata["sample"], identity, close):
        raise InputError(f"{found.path} is of another model ({of}): the shapes agree, the weights do not.", hint=hint)


def _same_samples(one: str, other: str, close: bool) -> bool:
    if not close or len(one) != len(other):
        return one == other
    a, b = decode_samples(one).double(), decode_samples(other).double()
    near = (a - b).abs() <= 2.0**-6 * a.abs() + 1e-6
    return bool(near.double().mean() > 0.999)


def write_importance(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, Tensor]],
    facts: Mapping[str, Any],
    *,
    storage: str = "fp32",
    progress: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Writes tensors as they come, in any order, one in memory at a time; `path` appears when all are there.

    Raises OutputError if it cannot be written, ExecutionError if a value is not finite.
    """
    import torch

    from hf_grow.growth.tensors import raw_bytes, torch_dtype

    dtype = STORAGE[storage]
    metadata = {"format": FORMAT, "made_by": f"hf-grow {__version__}", **{k: str(v) for k, v in facts.items()}}
    shard = build_shard(path.name, {n: TensorInfo(dtype, s) for n, s in shapes.items()}, metadata)
    places = {slot.name: slot for slot in shard.slots}
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(shard.header)
            for name, tensor in tensors:
                if not bool(torch.isfinite(tensor).all()):
                    raise ExecutionError(f"The importance of {name} is not finite.", hint="Compute in float32 (--dtype float32).")
                block = tensor.to("cpu", torch_dtype(dtype)).contiguous()
                file.seek(places[name].start)
                file.write(raw_bytes(block))
                progress(block.nbytes)
                del places[name]
            assert not places, f"{len(places)} tensors were not given"
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}.") from None
    finally:
        partial.unlink(missing_ok=True)
