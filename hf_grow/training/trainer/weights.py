"""Weights of a checkpoint: saved as this training holds them, and loaded into a model in training, strictly, from any form.

    model*.safetensors   a plain model, by the names on disk (one process, DDP)
    weights/             the shards of every process, by parameter names (FSDP2)
    pytorch_model_fsdp_0/  accelerate's, under FSDP with SHARDED_STATE_DICT

Trainer loads by the names on disk and not strictly, so the fused experts of an MoE model would keep their old weights, and a checkpoint of another
model would be loaded in part. Here names and shapes are compared first, and every process reads the rows that it holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_grow.checkpoint.reader import open_folder
from hf_grow.convert.in_memory import disk_tensors
from hf_grow.errors import InputError
from hf_grow.growth.plan import HEAD
from hf_grow.model.meta_model import meta_model
from hf_grow.training.param_updates.parameter_map import bare, parameter_map
from hf_grow.training.sharding.local_rows import fill_tensors, whole_parameters
from hf_grow.training.sharding.row_source import StoredRows
from hf_grow.training.sharding.shard_files import ShardRows, sharded_weights
from hf_grow.training.sharding.sharded_model import held_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from hf_grow.training.sharding.row_source import RowSource

ADAPTER_WEIGHTS = "adapter_model.safetensors"


def check_adapter(model: Any, folder: Path) -> None:
    """Raises InputError if the adapter in `folder` is not that of the peft model: by name and shape."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    expected = {n: tuple(t.shape) for n, t in get_peft_model_state_dict(model).items()}
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
            saved = {n: tuple(file.get_slice(n).get_shape()) for n in list(file.keys())}
    except Exception as error:  # a damaged file may raise anything
        raise InputError(f"{folder / ADAPTER_WEIGHTS} cannot be read: {' '.join(str(error).split())[:200]}.") from None
    _check_same_model(expected, saved, folder)


def check_same_tensors(tensors: Mapping[str, Tensor], source: RowSource, folder: Path) -> None:
    """Raises InputError if the tensors of `source`, which is in `folder`, have other names or shapes."""
    # Some checkpoints store a tied head.
    saved = {n: tuple(source.shape(n)) for n in source.names() if n in tensors or n != HEAD}
    _check_same_model({n: tuple(t.shape) for n, t in tensors.items()}, saved, folder)


def _check_same_model(expected: Mapping[str, Any], saved: Mapping[str, Any], folder: Path) -> None:
    mismatched = sorted(n for n in expected.keys() | saved.keys() if expected.get(n) != saved.get(n))
    if mismatched:
        name = mismatched[0]
        difference = f"is {saved.get(name)}, not {expected.get(name)}"
        if name not in saved:
            difference = "is missing from it"
        elif name not in expected:
            difference = "is not in the model"
        raise InputError(
            f"{folder} is a checkpoint of another model: {name} {difference} ({len(mismatched)} tensors differ).",
            hint="Use a separate output folder; a grown model cannot resume from a checkpoint of the model before the growth.",
        )


def load_weights(model: Any, folder: Path) -> None:
    """The weights in `folder` into `model`, sharded or not; each process reads the rows that it holds.

    Raises InputError if they are those of another model: if names or shapes differ.
    """
    held = held_tensors(model)
    shards = sharded_weights(folder)
    source: RowSource
    if shards is not None:
        source, places = ShardRows(shards), whole_parameters({n: t.shape for n, t in held.items()})
        check_same_tensors(held, source, folder)
    else:
        made = meta_model(model.config.to_dict())
        expected, source, places = disk_tensors(made), StoredRows(open_folder(folder)), parameter_map(made)
        check_same_tensors(expected, source, folder)
        places |= whole_parameters({n: t.shape for n, t in held.items() if n in expected and n not in places})  # buffers
    fill_tensors(held, places, source)


def cast_state_dict(state: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """A state dict with its tensors in other dtypes (by bare parameter name); tied tensors, which share memory, still share it."""
    done: dict[Any, Tensor] = {}
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        key = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.dtype)
        if key not in done or not key[0]:
            done[key] = tensor.to(dtypes[bare(name)]) if bare(name) in dtypes else tensor
        out[name] = done[key]
    return out
