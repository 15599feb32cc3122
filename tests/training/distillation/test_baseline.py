"""What forgetting is measured against, what trackers and cards hear of it, and machines and kernels on which it could not be measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from trained import grown, recipe, run, text
from trainers import loss_of
from trainers import trainer as trainer_for
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_grow.publish.card import render_card
from hf_grow.training.trainer import evaluation as evaluation_module
from hf_grow.training.trainer.events import read_events
from hf_grow.training.trainer.state import GrowthSettings


def events_of(out: Path, kind: str) -> list[dict[str, Any]]:
    return [e for e in read_events(out / "events.jsonl") if e["event"] == kind]


def source_loss(folder: Path) -> float:
    """The source's loss on the four sequences of the old set, written out: batches of two, as the recipe has them."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder / "source"), AutoModelForCausalLM.from_pretrained(folder / "source")
    lines = (folder / "old.jsonl").read_text().splitlines()
    stream = [i for line in lines for i in [*tokenizer(json.loads(line)["text"])["input_ids"], 2]]
    rows = torch.linspace(0, -(-len(stream) // 16) - 1, 4, dtype=torch.float64).long().tolist()
    sizes = [min(16, len(stream) - 16 * r) - 1 for r in rows]
    losses = [loss_of(model, stream, [r]) for r in rows]
    pairs = [(losses[i] * sizes[i] + losses[i + 1] * sizes[i + 1]) / (sizes[i] + sizes[i + 1]) for i in (0, 2)]
    return sum(pairs) / 2


def test_lossy_growth_uses_source_as_baseline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, grown(tmp_path, method="stack"))
    found = run(capsys, "train", path)
    out = tmp_path / "out"
    knew = source_loss(tmp_path)
    assert found["source"]["old"] == pytest.approx(knew, abs=1e-5)
    assert found["forgetting"] == pytest.approx(found["end"]["old"] - knew, abs=1e-5)
    first = events_of(out, "evaluation")[0]
    assert abs(first["losses"]["old"] - knew) > 1e-3, "stacking changed the function"
    assert first["forgetting"] == pytest.approx(first["losses"]["old"] - knew, abs=1e-5)
    assert events_of(out, "baseline")[0]["of"] == str(tmp_path / "source")
    training = json.loads((out / "growth.json").read_text())["training"]
    assert training["losses"] == {"start": found["start"], "end": found["end"], "source": found["source"]}
    card = render_card(out)
    rise = found["end"]["old"] - found["source"]["old"]
    told = (
        f"it forgot {rise:.3g} nats per token of old text that its source knew"
        if rise > 0
        else "it forgot nothing, compared with its source"
    )
    assert told in card and "| source | before | after | rise over the source |" in card
    # A resumed run knows it from its checkpoint, even where the source is gone by then.
    shutil.rmtree(out / "checkpoint-6")
    shutil.rmtree(tmp_path / "source")
    again = run(capsys, "train", path, "--resume")
    assert again["source"] == found["source"] and len(events_of(out, "baseline")) == 1


def test_unavailable_source_is_reported_and_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = grown(tmp_path, method="stack")
    shutil.move(tmp_path / "source", tmp_path / "elsewhere")
    from hf_grow.cli import main

    assert main(["train", str(recipe(tmp_path, model))]) == 0
    said = capsys.readouterr().err
    assert "The source cannot be evaluated" in said and "The baseline of forgetting is the grown model before training" in said
    training = json.loads((tmp_path / "out" / "growth.json").read_text())["training"]
    assert training["losses"].keys() == {"start", "end"}
    card = render_card(tmp_path / "out")
    assert "what it forgot of its source was not measured" in card and "it forgot" not in card.replace("what it forgot", "")
    # Another model in its place is not taken for it; who asks for the source by name is refused.
    grown(tmp_path / "other", "llama-tied")
    shutil.move(tmp_path / "other" / "source", tmp_path / "source")
    assert main(["train", str(recipe(tmp_path, model)), "--overwrite"]) == 0
    assert "is not the checkpoint that was grown" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "source")
    path = recipe(tmp_path, model, monitor={"baseline": "source"})
    assert "monitor:" in run(capsys, "train", path, "--overwrite", status=2)["error"]


def test_lossless_growth_uses_start_as_baseline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(capsys, "train", recipe(tmp_path, grown(tmp_path)))
    assert found["source"] == {} and not events_of(tmp_path / "out", "baseline")
    assert found["forgetting"] == pytest.approx(found["end"]["old"] - found["start"]["old"], abs=1e-9)
    assert "nats per token of old text" in render_card(tmp_path / "out") or "it forgot nothing." in render_card(tmp_path / "out")


def test_evaluated_tokens_are_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text(tmp_path, "old", 40)
    run(capsys, "train", recipe(tmp_path, grown(tmp_path)))
    parts = {p["use"]: p for p in json.loads((tmp_path / "out" / "growth.json").read_text())["training"]["data"]}
    stream = 0
    for line in (tmp_path / "old.jsonl").read_text().splitlines():
        stream += len(json.loads(line)["text"].split()) + 1
    last = stream % 16 or 16  # the four are spread from the first to the last, which is not full
    assert (parts["eval old"]["sequences"], parts["eval old"]["tokens"]) == (4, 3 * 16 + last)
    assert parts["eval old"]["documents"] is None
    assert parts["train"]["tokens"] > 64


def test_forgetting_and_kl_are_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from models import BY_NAME, make
    from transformers import TrainerCallback

    heard: list[dict[str, float]] = []

    class Tracker(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            heard.append(dict(logs))

    model = make(BY_NAME["llama"], num_hidden_layers=2)
    made = trainer_for(model, tmp_path, GrowthSettings(old_set="old"), max_steps=2, eval_strategy="steps", eval_steps=1)
    monkeypatch.setattr(made.hooks, "source_kl", lambda model: 0.25)
    made.add_callback(Tracker())
    made.train()
    for entries in (made.state.log_history, heard):
        found = [e for e in entries if "eval_forgetting" in e]
        assert [e["eval_kl"] for e in found] == [0.25, 0.25]
        assert found[0]["eval_forgetting"] == 0.0
    steps = [e["step"] for e in made.state.log_history if "eval_forgetting" in e]
    assert steps == [1, 2]


def test_early_stopping_on_forgetting(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The old set's loss is made to rise at every evaluation."""
    times = [0]

    def rising(metrics: Any) -> dict[str, float]:
        times[0] += 1
        return {"old": 3.0 + 0.1 * times[0], "new": 2.0}

    monkeypatch.setattr(evaluation_module, "set_losses", rising)
    path = recipe(tmp_path, grown(tmp_path), max_steps=20, eval_steps=2, save_steps=2, early_stopping_patience=2,
                  metric_for_best_model="eval_forgetting", greater_is_better=False)  # fmt: skip
    found = run(capsys, "train", path)
    assert found["stopped"] == "early stopping" and found["steps"] < 20


# ---- refusals ----------------------------------------------------------------------------------------------------------------------------


def test_several_gpus_without_launcher_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = grown(tmp_path)
    path = recipe(tmp_path, model, use_cpu=False)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "device_count", lambda: 4)
        for words in ((), ("--dry-run",)):
            said = run(capsys, "train", path, *words, status=2)["error"]
            assert "4 GPUs and one process" in said and "DataParallel" in said
            assert "accelerate launch --multi_gpu --num_processes 4 -m hf_grow train" in said and "CUDA_VISIBLE_DEVICES=0" in said
            assert not (tmp_path / "out").exists()
        run(capsys, "train", path, "--dry-run", "--processes", 4)  # a dry run may reckon with other machines
        run(capsys, "train", path, "--use_cpu", "true", "--max_steps", 1)


def test_distillation_with_liger_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = run(capsys, "train", recipe(tmp_path, grown(tmp_path), distill={}, use_liger_kernel=True), status=2)["error"]
    assert "distill: needs the logits, and use_liger_kernel" in said


def test_missing_kernel_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.is_liger_kernel_available", lambda: False)
    said = run(capsys, "train", recipe(tmp_path, grown(tmp_path), use_liger_kernel=True), status=2)["error"]
    assert "liger-kernel is not installed" in said and "Traceback" not in said
