"""The memory of growing an optimizer state, as the system counts it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import resource, sys
from pathlib import Path
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from hf_grow import api
from hf_grow.model.meta_model import meta_model, trainer_param_groups
from hf_grow.training.growth_state.grow_optimizer import grow_trainer_state

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def state(folder, layers):
    config = LlamaConfig(hidden_size=512, intermediate_size=2048, num_hidden_layers=layers, num_attention_heads=8, vocab_size=4096)
    folder.mkdir()
    LlamaForCausalLM(config).save_pretrained(folder)
    shapes = {n: p.shape for n, p in meta_model(config.to_dict()).named_parameters()}
    groups = trainer_param_groups(meta_model(config.to_dict()))
    settings = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    held = {i: {"step": torch.tensor(1.0), "exp_avg": torch.randn(shapes[n]), "exp_avg_sq": torch.rand(shapes[n])}
            for i, n in enumerate(n for g in groups for n in g)}
    cut = len(groups[0])
    torch.save({"state": held, "param_groups": [{**settings, "params": [*range(cut)]}, {**settings, "params": [*range(cut, len(held))]}]},
               folder / "optimizer.pt")

folder = Path(sys.argv[2])
if sys.argv[1] == "make":
    state(folder / "small", 1)
    state(folder / "large", 12)
else:
    for name in ("small", "large"):
        (out := folder / f"{name}-grown").mkdir()
        before = peak()
        grow_trainer_state(folder / name, out, api.plan(folder / name, "stack"))
    print(peak() - before, (out / "optimizer.pt").stat().st_size)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_state(tmp_path: Path) -> None:
    """Twelve layers take no more than one did, but for names and numbers; the state read and written is twenty times that."""
    for what in ("make", "grow"):
        done = subprocess.run([sys.executable, "-c", SCRIPT, what, str(tmp_path)], capture_output=True, text=True, check=True)
    more, written = map(int, done.stdout.split())
    assert written > 800_000_000
    assert more < 40_000_000
