"""Penalties on two processes, sharded (FSDP2) and replicated (DDP), against one process: gradients, weights, value, state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from models import BY_NAME, make
from penalties import random_importance
from sharded import free_port, train, worker

from hf_grow.training.config.regularizer_options import PenaltyOptions

KINDS: dict[str, dict[str, Any]] = {
    "ewc": {"kind": "ewc"},
    "proximal": {"kind": "ewc", "form": "proximal", "storage": "bf16"},
    "si": {"kind": "si", "consolidate_every": 3, "xi": 0.01},
    "l2sp": {"kind": "l2sp"},
}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp", "fsdp, made before"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_one(kind: str, how: str, tmp_path: Path) -> None:
    model = make(BY_NAME["llama"], num_hidden_layers=2)
    options: dict[str, Any] = {"lambda": 3.0, **KINDS[kind]}
    if kind in ("ewc", "proximal"):
        random_importance(model, tmp_path / "f.safetensors")
        options["fisher"] = [tmp_path / "f.safetensors"]
    train(model, model, PenaltyOptions.model_validate(options), 0, 1, tmp_path / "one.pt", False)
    mp.spawn(worker, args=(2, free_port(), how, options, str(tmp_path / "two.pt")), nprocs=2)
    one, two = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in ("one", "two"))
    assert one["value"] == pytest.approx(two["value"], rel=1e-4) and one["value"] > 0
    for part in ("grads", "weights"):
        for n, value in one[part].items():
            torch.testing.assert_close(two[part][n], value, rtol=1e-4, atol=1e-6, msg=f"{part} of {n}")
    if kind == "si":
        for n, value in one["state"]["importance"].items():
            torch.testing.assert_close(two["state"]["importance"][n], value, rtol=1e-3, atol=1e-5)
            assert torch.equal(two["state"]["anchor"][n], two["state"]["path"][n]["start"])
    else:
        assert one["state"] == two["state"]
