"""Dtype of the trained result, which may differ from the training dtype; and updates that are lost to rounding in 16 bits.

Weights are trained in fp32: in bf16 neighbouring numbers are up to 1/128 apart, and a step of 1e-4 is lost in every weight above 0.03. The result
is stored in the dtype of its source all the same; checkpoints to go on from are stored as they are trained.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from hf_grow.checkpoint.reader import Checkpoint, open_folder
from hf_grow.growth.tensors import torch_dtype
from hf_grow.model.meta_model import meta_model
from hf_grow.training.param_updates.parameter_map import parameter_map, parameters
from hf_grow.training.param_updates.shards import local

_PART = 1 << 22
"""Values that are compared at a time."""

if TYPE_CHECKING:
    from pathlib import Path

    from torch.nn import Module

    from hf_grow.training.trainer.trainer import BaseGrowTrainer


def result_dtypes(checkpoint: Checkpoint, wanted: str, model: Module) -> dict[str, torch.dtype]:
    """The dtype of every parameter in the result, by bare names. `wanted`: a dtype of torch by its name; auto takes that of the checkpoint's
    own tensor, unless the training had less."""
    trained = {n: p.dtype for n, p in parameters(model).items()}
    if wanted != "auto":
        return dict.fromkeys(trained, getattr(torch, wanted))
    stored: dict[str, torch.dtype] = {}
    for name, place in parameter_map(meta_model(checkpoint.info.config)).items():
        if name in checkpoint.tensors:
            stored.setdefault(place.parameter, torch_dtype(checkpoint.tensors[name].info.dtype))
    return {n: min(stored.get(n, own), own, key=lambda d: d.itemsize) for n, own in trained.items()}


def overflows_anywhere(trainer: BaseGrowTrainer, model: Module, dtypes: Mapping[str, torch.dtype]) -> bool:
    """Whether a finite weight, on any process, overflows its dtype. Collective: every process must call it."""
    with torch.no_grad():
        float16_weights = [(local(p.data), dtypes[n]) for n, p in parameters(model).items() if dtypes.get(n, p.dtype) == torch.float16]
        overflows = any(bool((torch.isfinite(w) & ~torch.isfinite(w.to(d))).any()) for w, d in float16_weights)
    return bool(trainer.accelerator.gather(torch.tensor([overflows], device=trainer.args.device)).any())


def round_weights(model: Module, dtypes: Mapping[str, torch.dtype]) -> bool:
    """Rounds weights to their stored dtype, in place, so that the evaluation measures the stored model. Returns whether any changed."""
    changed = False
    with torch.no_grad():
        for name, p in parameters(model).items():
            if dtypes.get(name, p.dtype).itemsize < p.dtype.itemsize:
                values = local(p.data)
                values.copy_(values.to(dtypes[name]))
                changed = True
    return changed


def main_dtype(folder: Path) -> str:
    """The dtype of most values of a checkpoint, by torch's name, as config.json states it."""
    sizes: Counter[str] = Counter()
    for tensor in open_folder(folder).tensors.values():
        sizes[tensor.info.dtype] += tensor.info.nbytes
    return str(torch_dtype(sizes.most_common(1)[0][0])).removeprefix("torch.")


def rounding_warning(model: Module, rate: float) -> str | None:
    """A warning about updates that a step of the size of the learning rate loses to rounding; None if all trained parameters have more than 16 bits."""
    lost = whole = total = 0
    example, dtype = "", None
    with torch.no_grad():
        for name, p in parameters(model).items():
            if not p.requires_grad or p.dtype.itemsize > 2:
                continue
            values, count = local(p.data), 0
            for part in torch.split(values.flatten(), _PART):  # compared in fp32
                unchanged = (part.float() + rate).to(p.dtype).eq(part) & (part.float() - rate).to(p.dtype).eq(part)
                count += int(unchanged.sum())
            lost, total, dtype = lost + count, total + values.numel(), p.dtype
            if values.numel() and count == values.numel():
                whole, example = whole + 1, example or name
    if not total:
        return None
    most = f", and nothing of {whole} tensors, such as {example}" if whole else ""
    return (
        f"The weights are trained in {str(dtype).removeprefix('torch.')}: a step of {rate:g} is lost to rounding in {lost / total:.0%} of them{most}. "
        "Remove dtype to train in float32; the result is stored in the dtype of the source."
    )
