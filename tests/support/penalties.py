"""Files of importances for tiny models, and the penalty written down plainly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from models import on_disk, tokens
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_grow.convert.in_memory import disk_names
from hf_grow.training.regularizers.importance_file import FORMAT, model_fingerprint, write_importance

Tensors = dict[str, Tensor]


def random_importance(model: PreTrainedModel, path: Path, *, seed: int = 1, storage: str = "fp32", **facts: Any) -> Tensors:
    """A file of random importances of `model`, and its values by names on disk."""
    generator = torch.Generator().manual_seed(seed)
    values = {n: torch.rand(t.shape, generator=generator) for n, t in on_disk(model).items()}
    if storage == "bf16":
        values = {n: v.bfloat16() for n, v in values.items()}
    shapes = {n: tuple(v.shape) for n, v in values.items()}
    write_importance(path, shapes, iter(values.items()), {"sample": model_fingerprint(model), "model": "random", **facts}, storage=storage)
    return values


def shaken(model: PreTrainedModel, by: float = 0.1, seed: int = 5) -> Tensors:
    """Moves every weight; the weights before, by names on disk."""
    before = {n: t.clone() for n, t in on_disk(model).items()}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(by * torch.randn(p.shape, generator=generator))
    return before


def grads_on_disk(model: PreTrainedModel) -> Tensors:
    return disk_names(model, {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()})


def plain_penalty(strength: float, fisher: Tensors, now: Tensors, anchor: Tensors) -> float:
    return 0.5 * strength * sum(float((fisher[n].double() * (now[n].double() - anchor[n].double()) ** 2).sum()) for n in fisher)


def backward(model: PreTrainedModel, rows: Tensor | None = None, share: float = 1.0) -> None:
    ids = tokens(model) if rows is None else rows
    (model(ids, labels=ids, use_cache=False).loss * share).backward()


def fisher_of(model: Path, path: Path, *, twin: Any = None) -> Path:
    """A file of importances of a checkpoint."""
    held = AutoModelForCausalLM.from_pretrained(model) if twin is None else twin
    tensors = {n: torch.ones_like(t, dtype=torch.float32) for n, t in load_file(model / "model.safetensors").items()}
    save_file(tensors, path, metadata={"format": FORMAT, "sample": model_fingerprint(held), "model": str(model), "kind": "fisher"})
    return path


def importances(penalty: Any) -> Tensors:
    """F of a penalty of one process by parameter name."""
    return {n: h.importance.cpu() for n, h in penalty.held.items() if isinstance(h.importance, Tensor)}
