"""LoRA on a grown model (Hu et al. 2021, arXiv 2106.09685): wholly new layers train fully, the rest by low-rank updates.

peft saves adapters only, so fully trained weights are saved in a file beside them; a run resumes from both.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_grow.common.extras import require_packages
from hf_grow.errors import InputError, SourceError
from hf_grow.training.config.lora_options import LoraOptions
from hf_grow.training.param_updates.masks import Mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FULLY_TRAINED_FILE = "trained_in_full.safetensors"
"""Beside an adapter: the parameters that were trained without LoRA."""


def add_lora(model: PreTrainedModel, options: LoraOptions, new: Mapping[str, Mask]) -> Any:
    """The PeftModel of ``model``. ``new``: which entries of each parameter are new.

    Raises InputError if no linear layer gets an adapter.
    """
    require_packages("peft")
    from peft import LoraConfig, get_peft_model
    from torch.nn import Linear

    fully_trained = {n for n, mask in new.items() if mask is True} if options.new_in_full else set()
    requested = options.target_modules
    targets = [
        n
        for n, module in model.named_modules()
        if isinstance(module, Linear)
        and ".layers." in f".{n}"
        and f"{n}.weight" not in fully_trained
        and (requested is None or n.rpartition(".")[2] in requested)
    ]
    if not targets:
        named = "" if requested is None else f" named {', '.join(requested)}"
        raise InputError(f"LoRA: the model has no inherited linear layer{named}.", hint="Remove `lora`.")
    config = LoraConfig(
        r=options.r, lora_alpha=options.alpha, lora_dropout=options.dropout, target_modules="|".join(map(re.escape, targets)),
        bias="none", task_type="CAUSAL_LM",
    )  # fmt: skip
    with silence_warnings():
        wrapped = get_peft_model(model, config)
    for name, p in wrapped.named_parameters():
        if name.removeprefix("base_model.model.") in fully_trained:
            p.requires_grad_(True)
    return wrapped


@contextmanager
def silence_warnings() -> Iterator[None]:
    """Without FutureWarnings: peft calls functions of transformers by deprecated names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def fully_trained_parameters(model: Any) -> dict[str, Any]:
    """The trainable parameters that are not LoRA's, by name."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}


def save_fully_trained(model: Any, folder: Path) -> None:
    """Writes FULLY_TRAINED_FILE, if there are such parameters."""
    from safetensors.torch import save_file

    tensors = {n: p.detach().cpu().contiguous() for n, p in fully_trained_parameters(model).items()}
    if tensors:
        save_file(tensors, folder / FULLY_TRAINED_FILE)


def load_fully_trained(model: Any, folder: Path) -> None:
    """Loads FULLY_TRAINED_FILE of a run that is resumed. Raises SourceError if it is missing, damaged, or of other parameters."""
    params = fully_trained_parameters(model)
    if params:
        path = folder / FULLY_TRAINED_FILE
        saved = _read(path)
        if saved.keys() != params.keys():
            raise SourceError(f"The parameters in {path} are not those that this run trains fully.")
        _copy(saved, params, path)


def load_fully_trained_if_present(model: Any, folder: Path) -> None:
    """Loads FULLY_TRAINED_FILE beside an adapter, if it is there. Raises SourceError if it is damaged or of another model."""
    path = folder / FULLY_TRAINED_FILE
    if path.is_file():
        _copy(_read(path), dict(model.named_parameters()), path)


def _read(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (OSError, ValueError, SafetensorError) as error:
        raise SourceError(f"{path} cannot be read: {error}.") from None


def _copy(saved: Mapping[str, Any], params: Mapping[str, Any], path: Path) -> None:
    import torch

    with torch.no_grad():
        for name, value in saved.items():
            if name not in params or params[name].shape != value.shape:
                raise SourceError(f"{path}: the model has no parameter {name} of this shape.")
            params[name].copy_(value)
