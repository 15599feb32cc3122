"""Example model cards: one of each method for a tiny model, and one of a trained model. Three of them are kept in model_cards/.

`python tests/support/cards.py` renders those three; with --verify it first grows, trains and verifies the examples and stores what was measured in
verification.json, so that the cards show real figures and are the same bytes on every machine.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import models
import pytest

from hf_grow import api
from hf_grow._version import __version__
from hf_grow.growth.plan import GrowthPlan, make_plan
from hf_grow.growth.source_info import SourceInfo, TensorInfo
from hf_grow.methods import METHODS
from hf_grow.model.architecture import Architecture
from hf_grow.options import parse
from hf_grow.publish.card import CardOptions, make_card
from hf_grow.verification import Report

ROOT = Path(__file__).parents[2] / "model_cards"
MEASURED = ROOT / "verification.json"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
APACHE = "---\nlicense: apache-2.0\nlanguage:\n- en\ndatasets:\n- example-org/web-text\n---\n# tiny-mistral\n"
LLAMA = "---\nlicense: llama3.1\nlanguage: [en, de]\n---\n# Llama-tiny\n"


@dataclass(frozen=True)
class Example:
    case: str
    """A row of models.CASES."""
    options: dict[str, Any] = field(default_factory=dict)
    verified: bool = False

    @property
    def ref(self) -> str:
        return {"mistral": "example-org/tiny-mistral", "llama": "example-org/Llama-tiny"}[self.case]


EXAMPLES = {
    "dus": Example("mistral", {"layers_to": 6}, verified=True),
    "stack": Example("mistral"),
    "interleave": Example("mistral", {"layers_to": 6, "noise": 0.01}),
    "identity": Example("llama", {"layers_to": 6}, verified=True),
    "layers": Example("mistral", {"layers": "0-2,1-3"}),
    "tile": Example("llama", {"hidden": 72, "intermediate": 64}, verified=True),
    "pad": Example("llama", {"hidden": 72}),
    "lemon": Example("mistral", {"hidden": 96}),
    "fpi": Example("llama", {"factor": 2}),
    "aki": Example("mistral", {"factor": 2}),
    "net2net": Example("llama", {"intermediate": 64}),
    "hypercloning": Example("mistral", {"factor": 2, "noise_db": 10}),
    "hybrid": Example("llama", {"to": 200_000, "multiple_of": 8}),
    "experts": Example("mistral", {"experts": 4, "init": "drop"}, verified=True),
}
TRAINED = "trained"
"""The example of `identity`, trained."""
NAMES = [*EXAMPLES, TRAINED]
KEPT = ("identity", "experts", TRAINED)
"""Rendered in model_cards/."""
TRAINING = {
    "data": {
        "train": "corpus/new.jsonl", "replay": {"path": "corpus/old.jsonl", "share": 0.25}, "seq_length": 16,
        "eval": {"old": "corpus/old-heldout.jsonl", "new": "corpus/new-heldout.jsonl"},
    },
    "regularizer": {"kind": "l2sp", "lambda": 0.1}, "max_steps": 60, "lr_scheduler_type": "cosine", "per_device_train_batch_size": 8, "learning_rate": 3e-3,
}  # fmt: skip


def flat(text: str) -> str:
    """A card with its line breaks and quote marks as single spaces."""
    return " ".join(re.sub(r"^> ", "", text, flags=re.MULTILINE).split())


def cached_sources(cache: Path) -> None:
    """A Hub cache that holds the cards of the sources, and nothing else."""
    for ref, text in (("example-org/tiny-mistral", APACHE), ("example-org/Llama-tiny", LLAMA)):
        snapshot = cache / f"models--{ref.replace('/', '--')}" / "snapshots" / COMMIT
        snapshot.mkdir(parents=True, exist_ok=True)
        (snapshot / "README.md").write_text(text)


def plan_of(method: str) -> GrowthPlan:
    """The plan of an example, from the config alone."""
    example = EXAMPLES[method]
    config = models.BY_NAME[example.case].config
    arch = Architecture(config)
    tensors = {name: TensorInfo("F32", entry.shape) for name, entry in arch.tensors.items()}
    options = parse(METHODS[method].options, example.options, where="example", strict=False)
    return make_plan(SourceInfo(example.ref, COMMIT, config, tensors), METHODS[method].build(arch, options))


def folder_of(plan: GrowthPlan, folder: Path, verification: Any = None, **more: Any) -> Path:
    """A grown folder as far as a card reads it; ``more``: further keys of growth.json."""
    folder.mkdir(parents=True, exist_ok=True)
    record = plan.to_json() | {"made_by": {"hf_grow": __version__}} | more | ({"verification": verification} if verification else {})
    (folder / "growth.json").write_text(json.dumps(record))
    return folder


def render(example: str, work: Path) -> dict[str, str]:
    """README.md and what goes with it, by name. The Hub's cache must be that of `cached_sources`."""
    method = "identity" if example == TRAINED else example
    name = f"{EXAMPLES[method].ref.split('/')[1]}-{example}"
    measured = json.loads(MEASURED.read_text())
    training = {"training": measured["training"]} if example == TRAINED else {}
    folder = folder_of(plan_of(method), work / name, measured.get(example), **training)
    (folder / "LICENSE").write_text("the license of the source")
    card = make_card(folder, CardOptions(name=f"example-org/{name}", offline=True))
    return {"README.md": card.text, **card.files}


def measure(work: Path) -> dict[str, Any]:
    """Grows and verifies for real."""
    found = {}
    for method, example in EXAMPLES.items():
        if example.verified:
            source = models.save(models.make(models.BY_NAME[example.case]), work / f"{method}-source")
            api.grow(source, work / method, method, **example.options)
            report = api.verify(source, work / method)
            assert report.ok
            found[method] = public_report(report, source, method, example.ref)
    return found | measure_training(work / "training")


def public_report(report: Report, source: Path, name: str, ref: str) -> dict[str, Any]:
    """A report without the paths of this machine."""
    found = report.to_json() | {"old": ref, "new": name}
    for check in found["checks"]:
        check["detail"] = check["detail"].replace(str(source), ref)
    return found


def measure_training(work: Path) -> dict[str, Any]:
    """A source that knows the old text, grown as in the example of `identity`, trained on new text and verified: the `training` section of
    growth.json, and the verification of the result."""
    from trained import text, tokenizer

    from hf_grow.training.config import train_config as recipe
    from hf_grow.training.train import train

    example = EXAMPLES["identity"]
    source = work / "Llama-tiny"
    tokenizer().save_pretrained(models.save(models.make(models.BY_NAME[example.case]), work / "random"))
    (work / "corpus").mkdir()
    for name, seed in (("old", 0), ("new", 5)):
        text(work / "corpus", name, 400, seed)
        lines = (work / "corpus" / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (work / "corpus" / f"{name}.jsonl").write_text("".join(lines[:-40]))
        (work / "corpus" / f"{name}-heldout.jsonl").write_text("".join(lines[-40:]))
    with contextlib.chdir(work):
        settings = {"use_cpu": True, "per_device_train_batch_size": 8, "learning_rate": 3e-3, "max_steps": 300}
        data = {"train": "corpus/old.jsonl", "seq_length": 16, "cache": "cache"}
        train(recipe.read_recipe({"model": "random", "output": str(source), "data": data, **settings}))
        api.grow(source, "Llama-tiny-identity", "identity", **example.options)
        before = public_report(api.verify(source, "Llama-tiny-identity"), source, "identity", example.ref)
        given = {"model": "Llama-tiny-identity", "output": TRAINED, "use_cpu": True, "eval_steps": 30, "save_steps": 60, **TRAINING}
        train(recipe.read_recipe({**given, "data": {**TRAINING["data"], "cache": "cache"}}))
        report = api.verify(source, TRAINED)
        assert report.ok
        section = json.loads(Path(TRAINED, "growth.json").read_text())["training"]
    section["recipe"]["data"].pop("cache")
    return {"training": section | {"verification_before": before}, TRAINED: public_report(report, source, TRAINED, example.ref)}


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary, pytest.MonkeyPatch.context() as patch:
        work = Path(temporary)
        if "--verify" in sys.argv:
            MEASURED.write_text(json.dumps(measure(work), indent=1) + "\n")
        cached_sources(work / "cache")
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(work / "cache"))
        for name in KEPT:
            for file, text in render(name, work).items():
                (ROOT / name).mkdir(exist_ok=True)
                (ROOT / name / file).write_text(text)


if __name__ == "__main__":
    main()
