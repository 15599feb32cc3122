"""Loads the weights of a checkpoint into a model in training, strictly.

Trainer loads by the names on disk and not strictly, so the fused experts of an MoE model would keep their old weights, and a checkpoint of another
model would be loaded in part. Here names and shapes are compared first, and transformers renames the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_grow.checkpoint.reader import open_folder
from hf_grow.convert.in_memory import disk_tensors
from hf_grow.errors import InputError
from hf_grow.model.loading import transformers_errors
from hf_grow.model.meta_model import meta_model
from hf_grow.training.param_updates.parameter_map import bare

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ADAPTER_WEIGHTS = "adapter_model.safetensors"


def check_weights(model: Any, folder: Path) -> None:
    """Raises InputError if the tensors in `folder` are not those of `model` (of its adapter, for a peft model): by name and shape."""
    if hasattr(model, "peft_config"):
        from peft import get_peft_model_state_dict
        from safetensors import safe_open

        expected = {n: tuple(t.shape) for n, t in get_peft_model_state_dict(model).items()}
        try:
            with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
                saved = {n: tuple(file.get_slice(n).get_shape()) for n in list(file.keys())}
        except Exception as error:  # a damaged file may raise anything
            raise InputError(f"{folder / ADAPTER_WEIGHTS} cannot be read: {' '.join(str(error).split())[:200]}.") from None
    else:
        expected = {n: tuple(t.shape) for n, t in disk_tensors(meta_model(model.config.to_dict())).items()}
        # Some checkpoints store a tied head.
        saved = {n: t.shape for n, t in open_folder(folder).tensors.items() if n in expected or n != "lm_head.weight"}
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
    """The weights in `folder` into `model`, whose parameters may be sharded (DTensor). Raises as `check_weights` does."""
    import torch
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.tensor import DTensor
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    check_weights(model, folder)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(model.config)]
    with transformers_errors(f"the weights in {folder}"):
        state = model_class.from_pretrained(folder, dtype=next(model.parameters()).dtype, trust_remote_code=False).state_dict()
    if any(isinstance(p, DTensor) for p in model.parameters()):
        set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, strict=True))
        return
    with torch.no_grad():
        model.load_state_dict(state, strict=True)


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
