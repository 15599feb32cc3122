"""What is mutated: a source, what was grown from it and half of another growth, an adapter, importances, recipes, a card; and the commands that read them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from models import BY_NAME, make, save
from trained import FAST, text, tokenizer

from hf_grow.cli import main


def build(root: Path) -> None:
    """Everything, in `root`; all of it together is less than a megabyte."""
    source = save(make(BY_NAME["mistral"], dtype=torch.bfloat16), root / "source", sharded=True)
    tokenizer().save_pretrained(source)
    save(make(BY_NAME["mixtral"], dtype=torch.bfloat16), root / "mixture")
    words = text(root, "text", documents=12)
    run("dus", source, "-o", root / "grown")
    run("verify", source, root / "grown", "--tokens", 64)
    run("card", root / "grown", "--offline")
    run("fisher", source, "--text", words, "-o", root / "fisher.safetensors", "--tokens", 64, "--seq-length", 16)
    (root / "recipe.yaml").write_text(
        "source: source\nmethod: identity\nlayers_to: 6\nnoise: 0.1\nseed: 3\noutput: out\nmax_shard_size: 50KB\n"
    )
    (root / "steps.yaml").write_text(
        "source: source\noutput: out\nsteps:\n  - method: tile\n    factor: 2\n  - method: identity\n    layers_to: 6\n"
    )
    (root / "train.yaml").write_text(
        "model: grown\noutput: out\ndata:\n  train: text.jsonl\n  seq_length: 16\n  eval:\n    old: text.jsonl\nregularizer:\n  kind: l2sp\n  lambda: 3\n"
        "warmup:\n  lr: 0.5\n  steps: 2\n" + "".join(f"{k}: {json.dumps(v)}\n" for k, v in {**FAST, "max_steps": 2}.items())
    )
    (root / "prompts.yaml").write_text("experts:\n" + "".join(f"  - positive: [w{i}, w{i + 1}]\n    negative: [w9]\n" for i in range(4)))
    _adapter(source, root / "adapter")
    _half(source, root)


def _adapter(base: Path, folder: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    model.save_pretrained(folder)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "source"}))


def _half(source: Path, root: Path) -> None:
    """A growth as an interruption leaves it: nothing is finished but what its journal says."""
    from hf_grow.convert import execute

    def interrupted(*arguments: object, **named: object) -> None:
        raise KeyboardInterrupt

    before, execute.write_rest = execute.write_rest, interrupted  # type: ignore[assignment]
    try:
        main(["dus", str(source), "-o", str(root / "half"), "--json"])
    finally:
        execute.write_rest = before
    assert (root / "half.partial").is_dir()


def run(*words: object) -> None:
    assert main([str(w) for w in words]) == 0, words


READ_SOURCE = (
    ("inspect source --json", 4), ("plan source --to 70K --json", 4), ("dus source -o out --json", 4), ("width source --factor 2 -o out", 2),
    ("depth source --method identity -o out", 2), ("experts source --experts 4 -o out --json", 2), ("hybrid source --to 80K --dry-run", 2),
    ("verify source grown --structure-only --json", 3), ("verify source grown --tokens 32", 1), ("replay source -o texts --tokens 64 --batch-size 4 --max-length 16 --json", 1),
    ("fisher source --text text.jsonl -o f.safetensors --tokens 32 --seq-length 16 --json", 1), ("train train.yaml --model source --dry-run --json", 1),
    ("merge adapter -o out --json", 1), ("push source you/model --dry-run --json", 1), ("experts mixture --add 1 --experts-from source -o out", 1),
)  # fmt: skip
READ_GROWN = (
    ("inspect grown --json", 4), ("inspect grown", 3), ("card grown --offline --json", 4), ("card grown --offline --overwrite", 2),
    ("verify source grown --structure-only --json", 3), ("verify source grown --tokens 32 --json", 1), ("push grown you/model --dry-run --json", 2),
    ("dus grown -o out", 2), ("fisher grown --from-growth fisher.safetensors -o f.safetensors --json", 2), ("train train.yaml --dry-run --json", 2),
    ("train train.yaml --json", 1), ("inspect grown --picture map.svg", 1),
)  # fmt: skip
TARGETS: dict[str, tuple[int, tuple[tuple[str, int], ...]]] = {
    "source/config.json": (6, READ_SOURCE),
    "source/model.safetensors.index.json": (4, READ_SOURCE),
    "source/model-00002-of-00004.safetensors": (5, READ_SOURCE),
    "source/tokenizer.json": (3, (("verify source grown --tokens 32 --json", 2), ("replay source -o texts --tokens 64 --batch-size 4 --max-length 16 --json", 2),
                                  ("fisher source --text text.jsonl -o f.safetensors --tokens 32 --seq-length 16", 1), ("train train.yaml --model source --dry-run --json", 2),
                                  ("dus source -o out", 1))),
    "source/tokenizer_config.json": (3, (("verify source grown --tokens 32 --json", 1), ("replay source -o texts --tokens 64 --batch-size 4 --max-length 16", 1),
                                         ("train train.yaml --model source --dry-run", 1), ("dus source -o out --json", 1))),
    "source/generation_config.json": (2, (("dus source -o out", 2), ("verify source grown --tokens 32", 1), ("replay source -o texts --tokens 64 --batch-size 4 --max-length 16", 1))),
    "mixture/config.json": (3, (("inspect mixture --json", 2), ("experts mixture --add 2 -o out", 2), ("width mixture --factor 2 --dry-run", 1), ("plan mixture --to 200K", 1))),
    "grown/growth.json": (10, READ_GROWN),
    "grown/config.json": (3, READ_GROWN),
    "grown/model.safetensors": (2, READ_GROWN),
    "grown/README.md": (1, (("card grown --offline", 1), ("card grown --offline --overwrite --json", 1), ("push grown you/model --dry-run", 1))),
    "recipe.yaml": (5, (("grow recipe.yaml --json", 2), ("grow recipe.yaml --dry-run", 2), ("grow recipe.yaml --source mixture --dry-run", 1))),
    "steps.yaml": (2, (("grow steps.yaml --dry-run --json", 1),)),
    "train.yaml": (6, (("train train.yaml --dry-run --json", 3), ("train train.yaml --json", 1), ("train train.yaml --dry-run --accelerate train.yaml", 1))),
    "prompts.yaml": (2, (("experts source --experts 4 --router cheap-embed --prompts prompts.yaml -o out", 1),)),
    "adapter/adapter_config.json": (5, (("merge adapter -o out --json", 3), ("merge adapter -o out --base source", 1))),
    "adapter/adapter_model.safetensors": (3, (("merge adapter -o out", 1),)),
    "fisher.safetensors": (4, (("fisher grown --from-growth fisher.safetensors -o f.safetensors --json", 1),
                               ("fisher source --text text.jsonl --merge fisher.safetensors -o f.safetensors --tokens 32 --seq-length 16 --json", 1),
                               ("train train.yaml --model source --regularizer.kind ewc --regularizer.fisher fisher.safetensors --dry-run", 1))),
    "half.partial/.hf-grow-journal.jsonl": (5, (("dus source -o half --resume --json", 3), ("dus source -o half --overwrite", 1), ("dus source -o half --dry-run", 1))),
    "text.jsonl": (2, (("fisher source --text text.jsonl -o f.safetensors --tokens 32 --seq-length 16", 1), ("train train.yaml --dry-run", 1))),
}  # fmt: skip
"""File -> how often it is mutated, and the commands that read it, with how often each is run."""


def fresh(corpus: Path, into: Path) -> None:
    shutil.copytree(corpus, into, copy_function=shutil.copyfile)
