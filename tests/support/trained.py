"""Tiny models with a tokenizer, texts and recipes, for the tests of training."""

from __future__ import annotations

import gc
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import BY_NAME, make, save
from transformers import PreTrainedTokenizerFast

from hf_grow import api
from hf_grow.cli import main
from hf_grow.common import yaml_io as yaml_text

VOCAB = 64
WORDS = [f"w{i}" for i in range(60)]
FAST = {
    "max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 3, "eval_steps": 3,
    "use_cpu": True, "lr_scheduler_type": "constant", "warmup_steps": 0, "save_total_limit": 8,
}  # fmt: skip

ROLLBACK_OPTIONS = {"window": 8, "on_instability": "rollback", "threshold": 30.0, "variance": 1e6}
"""Of the monitor: a loss that `with_spike` makes is seen as a spike, and nothing else is."""


def tokenizer(words: list[str] = WORDS) -> PreTrainedTokenizerFast:
    """One token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{w: i + 3 for i, w in enumerate(words)}}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def text(folder: Path, name: str, documents: int = 40, seed: int = 0) -> Path:
    """Documents of words that follow one another by a rule, so that there is something to learn."""
    draw = random.Random(seed)
    path = folder / f"{name}.jsonl"
    with path.open("w") as f:
        for _ in range(documents):
            at, words = draw.randrange(60), []
            for _ in range(draw.randrange(20, 60)):
                words.append(WORDS[at])
                at = (3 * at + 1 + seed + draw.randrange(2)) % 60
            f.write(json.dumps({"text": " ".join(words)}) + "\n")
    return path


def source(folder: Path, case: str = "llama", **changes: Any) -> Path:
    """A checkpoint with a tokenizer."""
    save(make(BY_NAME[case], num_hidden_layers=2, **changes), folder)
    tokenizer().save_pretrained(folder)
    return folder


def grown(folder: Path, case: str = "llama", method: str = "identity", **options: Any) -> Path:
    """A checkpoint of two layers, grown; the source lies beside it."""
    old = source(folder / "source", case)
    api.grow(old, folder / "grown", method, **(options or {"layers_to": 4}))
    return folder / "grown"


def recipe(folder: Path, model: Path, **changes: Any) -> Path:
    """A recipe that trains for a few steps on new text and measures on old and new; None takes a key out."""
    for name, seed in (("new", 5), ("old", 0)):
        if not (folder / f"{name}.jsonl").exists():
            text(folder, name, seed=seed)
    data = {
        "train": str(folder / "new.jsonl"), "seq_length": 16, "cache": str(folder / "cache"),
        "eval": {"old": {"path": str(folder / "old.jsonl"), "sequences": 4}, "new": {"path": str(folder / "new.jsonl"), "sequences": 4}},
    }  # fmt: skip
    whole = {"model": str(model), "output": str(folder / "out"), "data": data, **FAST}
    whole |= changes | ({"data": data | changes["data"]} if "data" in changes else {})
    path = folder / "recipe.yaml"
    path.write_text(yaml_text.dumps({k: v for k, v in whole.items() if v is not None}))
    return path


def override_eval_loss(monkeypatch: pytest.MonkeyPatch, name: str, new_loss: Callable[[int, float], float]) -> None:
    """Replaces the evaluation loss of a named set by a function of step and loss, so that the best step is known."""
    from hf_grow.training.trainer.trainer import BaseGrowTrainer

    loop = BaseGrowTrainer.evaluation_loop

    def evaluated(self: BaseGrowTrainer, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        found, key = loop(self, *args, metric_key_prefix=metric_key_prefix, **kwargs), f"eval_{name}_loss"
        if metric_key_prefix == f"eval_{name}":
            found.metrics[key] = new_loss(self.state.global_step, found.metrics[key])
        return found

    monkeypatch.setattr(BaseGrowTrainer, "evaluation_loop", evaluated)


def run(capsys: Any, *words: object, status: int = 0) -> dict[str, Any]:
    """`hf-grow WORDS --json`: its result, or where it fails what it said."""
    gc.freeze()  # Trainer collects garbage before it begins, and walking through all loaded modules takes longer than these trainings
    found = main([*map(str, words), "--json"])
    captured = capsys.readouterr()
    assert found == status, captured.err
    return json.loads(captured.out) if status == 0 else {"error": captured.err}


def logged(out: Path) -> dict[int, float]:
    """The loss of every step, by the last line that tells it."""
    from hf_grow.training.trainer.events import read_events

    return {e["step"]: e["loss"] for e in read_events(out / "events.jsonl") if e["event"] == "log"}


def edited(path: Path, **changes: Any) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(data))
    return data


def with_spike(monkeypatch: pytest.MonkeyPatch, at: int, times: int = 1) -> None:
    """The loss that the monitor hears of is tall at one step; the training itself is as it is."""
    from hf_grow.training.trainer.trainer import BaseGrowTrainer

    watch, left = BaseGrowTrainer.monitor_step, [times]

    def spiked(self: Any) -> None:
        if self.state.global_step == at and left[0]:
            left[0] -= 1
            self._step_loss = torch.tensor(100.0)
        watch(self)

    monkeypatch.setattr(BaseGrowTrainer, "monitor_step", spiked)
