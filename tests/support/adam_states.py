"""Tiny models trained with AdamW for a few steps, and growths that their state is carried through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from models import Case, make, save, tokens
from transformers import PreTrainedModel

from hf_grow.model.meta_model import trainer_param_groups

CASES = ["llama", "llama-tied", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe-mixed"]
GROWTHS: dict[str, dict[str, Any]] = {
    "width": {"method": "tile", "factor": 2, "symmetry": "none"},
    "odd": {"method": "tile", "hidden": 60, "intermediate": 50},
    "identity": {"method": "identity", "at": "1,3"},
    "stack": {"method": "stack"},
    "aki": {"method": "aki", "factor": 2},
    "lossless aki": {"method": "aki", "hidden": 60, "heads": 12, "kv_heads": 4, "intermediate": 50, "lossless": True},
}


def adamw(
    model: PreTrainedModel, *, fused: bool = False, betas: tuple[float, float] = (0.9, 0.95), groups: Any = None
) -> torch.optim.AdamW:
    if groups is None:
        parameters = dict(model.named_parameters())
        groups = [
            {"params": [parameters[n] for n in g], "weight_decay": w} for g, w in zip(trainer_param_groups(model), (0.1, 0.0), strict=True)
        ]
    return torch.optim.AdamW(groups, lr=1e-3, betas=betas, fused=fused)


def train(model: PreTrainedModel, optimizer: torch.optim.Optimizer, steps: int) -> None:
    ids = tokens(model)
    for _ in range(steps):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()


def trained(case: Case, folder: Path, **options: Any) -> tuple[PreTrainedModel, torch.optim.AdamW]:
    model = make(case)
    optimizer = adamw(model, **options)
    train(model, optimizer, 3)
    save(model, folder)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    (folder / "trainer_state.json").write_text('{"global_step": 3}')
    return model, optimizer
