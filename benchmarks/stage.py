"""What every arm of `forgetting.py` starts from, made once per seed and cached: texts, the source model, models grown from it, Fisher files and
self-sampled text. Growth, sampling and the Fisher are made by the commands of hf-grow.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import hf_grow
from hf_grow.cli import main as hf_grow_command
from hf_grow.demo.domains import Domains, domains
from hf_grow.demo.small_model import LlamaShape, build_model, build_tokenizer
from hf_grow.training.data import cache
from hf_grow.training.data.packing import DocumentEncoder, split_sequences

GROWTHS: dict[str, tuple[str, dict[str, Any]]] = {
    "depth": ("identity", {"layers_to": "LAYERS"}),
    "width": ("tile", {"factor": 2}),
    "ffn": ("pad", {"intermediate": "INTER", "ffn": "null"}),
}
"""Growth of an arm -> method and options."""


@dataclass(frozen=True)
class Settings:
    """The settings that are the same for all arms."""

    shape: LlamaShape = field(
        default_factory=lambda: LlamaShape(vocab=1024, layers=4, hidden=128, inter=448, heads=4, kv_heads=2, init=0.05)
    )
    layers_to: int = 6
    length: int = 128
    pretrain_steps: int = 900
    pretrain_rate: float = 3e-3
    batch: int = 8
    steps: int = 150
    rate: float = 1e-3
    evaluations: int = 10
    rows: int = 64
    """Sequences of each held-out set."""
    fisher_tokens: int = 65_536
    sampled_tokens: int = 120_000
    cap: int | None = None
    """Maximum number of documents of each text."""


FULL = Settings()
QUICK = Settings(
    LlamaShape(vocab=512, layers=2, hidden=32, inter=64, heads=2, kv_heads=1, init=0.06), layers_to=3, length=32, pretrain_steps=40, batch=4,
    steps=16, evaluations=4, rows=8, fisher_tokens=1024, sampled_tokens=4000, cap=40,
)  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """The files of one seed."""

    settings: Settings
    seed: int
    folder: Path

    def text(self, name: str) -> str:
        return str(self.folder / "text" / f"{name}.jsonl")

    def model(self, growth: str) -> str:
        return str(self.folder / (growth or "source"))

    @property
    def sampled(self) -> str:
        return str(self.folder / "sampled" / "texts.jsonl")

    def fisher(self, kind: str, growth: str) -> str:
        """``kind``: old (on old text), self (on text sampled from the source), mapped (the source's ``old``, mapped through the growth), or si."""
        return str(self.folder / f"fisher-{kind}-{growth or 'source'}.safetensors")


def prepare(settings: Settings, seed: int) -> Stage:
    """The stage of one seed; files that exist are used as they are."""
    texts = domains(settings.cap)
    versions = {name: version(name) for name in ("torch", "transformers", "tokenizers")}
    only = {k: v for k, v in asdict(settings).items() if k not in ("steps", "rate", "evaluations", "rows", "batch")}
    key = cache.key({"text": texts.digest, "settings": only, "seed": seed, "versions": versions, "stage": 1})
    folder = cache.default_root() / "benchmarks" / f"forgetting-{key}"

    def make(partial: Path) -> None:
        stage = Stage(settings, seed, partial)
        (partial / "text").mkdir()
        texts.write(partial / "text")
        _pretrain(stage, texts)

    cache.get_or_create(folder, make)
    stage = Stage(settings, seed, folder)
    _derive(stage)
    return stage


def _pretrain(stage: Stage, texts: Domains) -> None:
    """The source: a Llama trained on old text alone; its tokenizer is trained on both domains. This training also gives the importances of SI."""
    import numpy as np
    import torch
    from transformers import TrainingArguments

    from hf_grow.convert.in_memory import disk_names
    from hf_grow.training.config.regularizer_options import PenaltyOptions
    from hf_grow.training.regularizers.build import make_penalty
    from hf_grow.training.regularizers.importance_file import model_fingerprint, write_importance
    from hf_grow.training.regularizers.si import SynapticIntelligence
    from hf_grow.training.trainer.state import GrowthSettings
    from hf_grow.training.trainer.trainer import BaseGrowTrainer

    s = stage.settings
    old = texts.documents["old"]
    tokenizer = build_tokenizer(texts.for_tokenizer(), s.shape.vocab)
    model = build_model(s.shape, tokenizer, max_positions=4 * s.length, seed=stage.seed)
    rows = torch.from_numpy(split_sequences(np.empty(0, np.int32), DocumentEncoder(tokenizer, "always")(old), s.length)[0]).long()
    generator = torch.Generator().manual_seed(stage.seed)
    wanted = 8 * s.pretrain_steps
    order = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(-(-wanted // len(rows)))])[:wanted]
    penalty = make_penalty(PenaltyOptions(kind="si"), model)
    assert isinstance(penalty, SynapticIntelligence)
    with tempfile.TemporaryDirectory() as nowhere:
        arguments = TrainingArguments(
            output_dir=nowhere, max_steps=s.pretrain_steps, per_device_train_batch_size=8, learning_rate=s.pretrain_rate, lr_scheduler_type="cosine",
            warmup_steps=20, weight_decay=0.1, adam_beta2=0.95, logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True,
            use_cpu=True, seed=stage.seed,
        )  # fmt: skip
        data = [{"input_ids": row, "labels": row} for row in rows[order]]  # the model shifts the labels
        BaseGrowTrainer(model=model, args=arguments, train_dataset=data, growth=GrowthSettings(penalty=penalty)).train()
    penalty.consolidate()
    model.save_pretrained(stage.model(""))
    tokenizer.save_pretrained(stage.model(""))
    tensors = disk_names(model, {n: h.importance for n, h in penalty.held.items() if isinstance(h.importance, torch.Tensor)})
    facts = {"kind": "si", "tokens": wanted * s.length, "model": "source", "sample": model_fingerprint(model)}
    write_importance(Path(stage.fisher("si", "")), {n: t.shape for n, t in tensors.items()}, tensors.items(), facts)


def _derive(stage: Stage) -> None:
    """Everything that is made from the source, by the commands that a user would run."""
    s = stage.settings
    values = {"LAYERS": s.layers_to, "INTER": 2 * s.shape.inter}
    for growth, (method, options) in GROWTHS.items():
        if not Path(stage.model(growth)).exists():
            hf_grow.grow(stage.model(""), stage.model(growth), method, **{k: values.get(str(v), v) for k, v in options.items()})
    sample = ["--tokens", str(s.sampled_tokens), "--max-length", str(2 * s.length), "--seed", str(stage.seed)]
    if not Path(stage.sampled).exists():
        command("replay", stage.model(""), *sample, "-o", str(Path(stage.sampled).parent))
    estimate = ["--tokens", str(s.fisher_tokens), "--seq-length", str(s.length), "--batch", "8", "--seed", str(stage.seed)]
    for growth in ("", "depth", "ffn"):
        for kind, text in (("old", stage.text("old")), ("self", stage.sampled)):
            if not Path(stage.fisher(kind, growth)).exists():
                command("fisher", stage.model(growth), "--text", text, *estimate, "-o", stage.fisher(kind, growth))
    for growth, kind in (("width", "mapped"), ("depth", "mapped")):
        if not Path(stage.fisher(kind, growth)).exists():
            command("fisher", stage.model(growth), "--from-growth", stage.fisher("old", ""), "-o", stage.fisher(kind, growth))


def command(*words: str) -> dict[str, Any]:
    """Runs `hf-grow WORDS --json` in this process and prints its time."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        status = hf_grow_command([*words, "--json"])
    if status:
        sys.exit(f"hf-grow {' '.join(words)} failed with exit status {status}")
    facts: dict[str, Any] = json.loads(output.getvalue())
    print(f"  hf-grow {words[0]} {Path(words[1]).name}: {facts.get('seconds', 0):.1f} s", file=sys.stderr)
    return facts
