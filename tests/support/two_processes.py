"""Grown checkpoints in fp64, and their training by two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from launched import start
from models import BY_NAME, make
from penalties import random_importance
from safetensors.torch import load_file
from trained import tokenizer
from transformers import AutoModelForCausalLM

from hf_grow import api

GROWN: dict[str, tuple[str, str, dict[str, Any]]] = {
    "deeper": ("llama", "identity", {"layers_to": 4}),
    "wider": ("llama", "fpi", {"intermediate": 61}),
    "experts": ("llama", "experts", {"experts": 3}),
}


def model(folder: Path, kind: str = "deeper") -> Path:
    """A grown checkpoint in fp64, so that only what is wrong can differ, and a Fisher of it."""
    case, method, options = GROWN[kind]
    old = folder / "source"
    made = make(BY_NAME[case], num_hidden_layers=2)
    if kind != "experts":  # torch's grouped multiplication knows no fp64
        made.double().config.dtype = torch.float64
    made.save_pretrained(old)
    tokenizer().save_pretrained(old)
    api.grow(old, folder / "grown", method, **options)
    random_importance(AutoModelForCausalLM.from_pretrained(folder / "grown", dtype="auto"), folder / "fisher.safetensors")
    return folder / "grown"


def together(file: str, path: Path, out: Path, *words: object, folders: list[Path] | None = None, **options: Any) -> list[dict[str, Any]]:
    """Two processes with half of the rows each."""
    sharded = ("--use_cpu", "false") if file == "fsdp2" else ()
    return start(
        file, ["train", path, "-o", out, "--per_device_train_batch_size", "1", *sharded, *words], folders or [path.parent] * 2, **options
    )


def assert_same_weights(one: Path, two: Path, tolerance: float = 1e-6) -> None:
    a, b = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        torch.testing.assert_close(b[name], tensor, rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")
