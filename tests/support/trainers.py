"""BaseGrowTrainer on fixed random rows, its first gradients, and losses computed by hand."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from trained import FAST
from transformers import TrainingArguments

from hf_grow.training.trainer.state import GrowthSettings
from hf_grow.training.trainer.trainer import BaseGrowTrainer


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Fixed random rows."""

    def __init__(self, count: int = 64, length: int = 12, seed: int = 0) -> None:
        self.rows = torch.randint(3, 64, (count, length), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def trainer(model: Any, out: Path, growth: GrowthSettings, **arguments: Any) -> BaseGrowTrainer:
    gc.freeze()  # see trained.run
    settings = {
        **FAST,
        "report_to": "none",
        "disable_tqdm": True,
        "weight_decay": 0.1,
        "train_sampling_strategy": "sequential",
        **arguments,
    }
    return BaseGrowTrainer(
        model=model,
        args=TrainingArguments(output_dir=str(out), **settings),
        train_dataset=Rows(),
        eval_dataset={"old": Rows(4)},
        growth=growth,
    )


def loss_of(model: Any, stream: list[int], rows: list[int], length: int = 16) -> float:
    ids = torch.tensor([stream[r * length : (r + 1) * length] for r in rows])
    with torch.no_grad():
        return float(model(ids, labels=ids).loss)


def gradients_of_first_step(model: Any, out: Path, growth: GrowthSettings, **arguments: Any) -> tuple[dict[str, torch.Tensor], float]:
    """What the optimizer would step along."""
    made = trainer(model, out, growth, max_steps=1, max_grad_norm=0.0, save_strategy="no", **arguments)
    caught: dict[str, torch.Tensor] = {}

    class Catch(type(made.callback_handler.callbacks[-1]).__mro__[1]):  # type: ignore[misc]
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            caught.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    made.add_callback(Catch())
    made.train()
    return caught, made.state.log_history[0]["loss"]
