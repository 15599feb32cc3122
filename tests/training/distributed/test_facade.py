"""GrowTrainer in two processes (DDP, gloo): the losses and weights of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from facade_process import train, train_in_two_processes
from safetensors.torch import load_file
from trained import logged, recipe
from two_processes import model

from hf_grow.training.trainer.events import read_events

OPTIONS: dict[str, dict[str, Any]] = {
    "distilled": {"new_lr": 2.0, "phases": [{"steps": 2, "train": ["new"]}], "distill": {"alpha": 0.3}, "kl_rows": 2},
    "lora": {"lora": {"r": 4}, "early_stopping_patience": 3},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_two_processes_train_what_one_trains(name: str, tmp_path: Path) -> None:
    recipe(tmp_path, model(tmp_path))
    train(tmp_path, tmp_path / "one", 2, **OPTIONS[name])
    train_in_two_processes(tmp_path, tmp_path / "two", **OPTIONS[name])
    losses = [logged(tmp_path / out) for out in ("one", "two")]
    assert len(losses[0]) == 6 and losses[1] == pytest.approx(losses[0], abs=1e-6)
    one, two = ([e for e in read_events(tmp_path / out / "events.jsonl") if e["event"] == "evaluation"] for out in ("one", "two"))
    assert len(one) == len(two) == 3
    for a, b in zip(one, two, strict=True):
        assert b["losses"] == pytest.approx(a["losses"], abs=1e-6)
        assert b.get("kl") == pytest.approx(a["kl"], abs=1e-6) if "kl_rows" in OPTIONS[name] else "kl" not in b
    weights = [load_file(tmp_path / out / "saved" / "model.safetensors") for out in ("one", "two")]
    assert weights[0].keys() == weights[1].keys()
    for key, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][key], tensor, rtol=0, atol=1e-6)
