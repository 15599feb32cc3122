"""Importances from AdamW's exp_avg_sq, against the sums of a plain loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import BY_NAME, make, save
from penalties import random_importance

from hf_grow.cli import main
from hf_grow.convert.in_memory import disk_names
from hf_grow.model.meta_model import trainer_param_groups
from hf_grow.training.config.regularizer_options import PenaltyOptions
from hf_grow.training.growth_state.resume import by_name
from hf_grow.training.regularizers.build import make_penalty
from hf_grow.training.regularizers.importance_file import open_importance

STEPS, BETAS, TOKENS = 5, (0.9, 0.95), 4 * 12


def trained(folder: Path, name: str = "llama-tied", frozen: str = "") -> tuple[Any, dict[str, torch.Tensor], dict[str, Any]]:
    """A model trained by a plain loop, the bias-corrected mean of its squared gradients, and AdamW's state in Trainer's groups."""
    model = make(BY_NAME[name], num_hidden_layers=2)
    for n, p in model.named_parameters():
        p.requires_grad_(not frozen or frozen not in n)
    named = dict(model.named_parameters())
    groups = [[n for n in g if named[n].requires_grad] for g in trainer_param_groups(model)]
    optimizer = torch.optim.AdamW([{"params": [named[n] for n in g]} for g in groups], lr=1e-2, betas=BETAS)
    sums = {n: torch.zeros_like(p) for n, p in named.items()}
    for step in range(STEPS):
        ids = torch.randint(0, model.config.vocab_size, (4, 12), generator=torch.Generator().manual_seed(step))
        model(ids, labels=ids, use_cache=False).loss.backward()
        for n, p in named.items():
            if p.grad is not None:
                sums[n] += (1 - BETAS[1]) * BETAS[1] ** (STEPS - 1 - step) * p.grad**2
        optimizer.step()
        optimizer.zero_grad()
    save(model, folder / "model")
    means = {n: s / (1 - BETAS[1] ** STEPS) for n, s in sums.items()}
    return model, disk_names(model, means), {"whole": optimizer.state_dict(), "groups": groups}


def write(folder: Path, state: Any, form: str = "optimizer.pt", **trainer_state: Any) -> Path:
    checkpoint = folder / "checkpoint-5"
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": STEPS, **trainer_state}))
    whole = state["whole"]
    if form == "optimizer.bin":
        groups, by_parameter = by_name(whole["param_groups"], whole["state"], state["groups"])
        whole = {"state": by_parameter, "param_groups": groups}
    torch.save(whole, checkpoint / form)
    return checkpoint


def fisher(folder: Path, checkpoint: Path, *words: object) -> int:
    return main(["fisher", *map(str, (folder / "model", "--from-optimizer", checkpoint, "-o", folder / "f.safetensors", *words))])


@pytest.mark.parametrize("form", ["optimizer.pt", "optimizer.bin"])
@pytest.mark.parametrize("name", ["llama-tied", "mixtral"])
def test_importance_is_the_bias_corrected_mean_times_tokens(name: str, form: str, tmp_path: Path, capsys: Any) -> None:
    model, means, state = trained(tmp_path, name)
    checkpoint = write(tmp_path, state, form, num_input_tokens_seen=STEPS * TOKENS)
    assert fisher(tmp_path, checkpoint, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["kind"], said["tokens_per_step"], said["steps"]) == ("exp_avg_sq", TOKENS, STEPS)
    file = open_importance(tmp_path / "f.safetensors")
    assert file.shapes.keys() == means.keys()
    for n, mean in means.items():
        torch.testing.assert_close(file.read(n), TOKENS * mean, rtol=1e-4, atol=1e-12, msg=lambda m, n=n: f"{n}: {m}")
    assert make_penalty(PenaltyOptions(kind="ewc", fisher=(tmp_path / "f.safetensors",)), model) is not None
    random_importance(model, tmp_path / "earlier.safetensors")
    words = ("--tokens-per-step", 2 * TOKENS, "--merge", tmp_path / "earlier.safetensors", "--decay", "0.5", "--overwrite")
    assert fisher(tmp_path, checkpoint, *words) == 0
    both, earlier = open_importance(tmp_path / "f.safetensors"), open_importance(tmp_path / "earlier.safetensors")
    for n, mean in means.items():
        torch.testing.assert_close(both.read(n), 0.5 * earlier.read(n) + 2 * TOKENS * mean, rtol=1e-4, atol=1e-7)


def test_what_is_not_known_is_refused(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(checkpoint: Path, message: str, *words: object) -> None:
        assert fisher(tmp_path, checkpoint, *words) == 2
        assert message in capsys.readouterr().err
        assert not list(tmp_path.glob("f.safetensors*"))

    _, _, state = trained(tmp_path)
    checkpoint = write(tmp_path, state)
    refused(checkpoint, "does not record how many tokens")
    refused(tmp_path, "no optimizer state that can be read")
    refused(checkpoint, "has 3 mistakes", "--from-growth", "x")
    refused(checkpoint, "give either --text", "--text", "old.txt")
    refused(checkpoint, "--utility needs --text", "--utility", "u.json")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(checkpoint, "start it without a launcher")
    monkeypatch.delenv("WORLD_SIZE")
    some = state["whole"]["state"][3]
    state["whole"]["state"][3] = {"step": some["step"], "exp_avg": some["exp_avg"], "state2": torch.zeros(3, dtype=torch.uint8)}
    refused(write(tmp_path, state), "keeps no exp_avg_sq of", "--tokens-per-step", TOKENS)
    del state["whole"]["state"][3]
    refused(write(tmp_path, state), "was it frozen?", "--tokens-per-step", TOKENS)
