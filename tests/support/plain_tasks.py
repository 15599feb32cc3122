"""Multiple choice scored plainly, one choice at a time, and the checkpoints and files to do it on: no code of any harness."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import BY_NAME, make, save
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_grow import api
from hf_grow.demo.small_model import build_tokenizer

TEXT = "the cat sat on the mat and the dog ate the bone while a bird sang in the old tree near the river " * 5
WORDS = sorted(set(TEXT.split()))
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: docs.jsonl}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 2.0}}
"""


def checkpoints(folder: Path) -> tuple[Path, Path]:
    """A tiny random model with a tokenizer, and its growth by DUS, which changes the function."""
    tokenizer = build_tokenizer([TEXT], 300)
    save(make(BY_NAME["mistral"], vocab_size=len(tokenizer), max_position_embeddings=512), folder / "old")
    tokenizer.save_pretrained(folder / "old")
    api.grow(folder / "old", folder / "new", "dus")
    return folder / "old", folder / "new"


def questions(count: int = 30) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)

    def some(number: int) -> list[str]:
        return [WORDS[i] for i in torch.randperm(len(WORDS), generator=generator)[:number].tolist()]

    # Choices of different lengths, so that acc and acc_norm differ.
    return [{"q": " ".join(some(4)), "choices": [" ".join(some(k)) for k in (1, 2, 3)], "gold": i % 3} for i in range(count)]


def task_folder(folder: Path, name: str = "sits") -> Path:
    """A folder with a task file and its data beside it; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "docs.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions()))
    (folder / f"{name}.yaml").write_text(TASK.format(name=name))
    return folder / f"{name}.yaml"


@torch.no_grad()
def plain_scores(folder: Path, docs: list[dict[str, Any]]) -> dict[str, float]:
    """acc: the likeliest choice is the right one; acc_norm: log-likelihood divided by the characters of the choice; and their standard errors."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    hits: dict[str, list[float]] = {"acc": [], "acc_norm": []}
    for doc in docs:
        sums = []
        for choice in doc["choices"]:
            asked = len(tokenizer(doc["q"])["input_ids"])
            ids = torch.tensor(tokenizer(f"{doc['q']} {choice}")["input_ids"])
            logits = model(ids[None], use_cache=False).logits[0].double()
            total = 0.0
            for at in range(asked, len(ids)):
                total += float(logits[at - 1, ids[at]] - logits[at - 1].logsumexp(-1))
            sums.append(total)
        per_character = [s / len(c) for s, c in zip(sums, doc["choices"], strict=True)]
        hits["acc"].append(float(int(np.argmax(sums)) == doc["gold"]))
        hits["acc_norm"].append(float(int(np.argmax(per_character)) == doc["gold"]))
    found = {}
    for name, values in hits.items():
        found[name] = sum(values) / len(values)
        found[f"{name}_stderr"] = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return found
