"""A run in stages equals the trainings and growths that it stands for, done one by one; interrupted anywhere, it ends with the same weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from penalties import random_importance
from safetensors.torch import load_file
from trained import logged, recipe, run, source, tokenizer
from transformers import AutoModelForCausalLM
from two_processes import together

from hf_grow import api
from hf_grow.cli import main
from hf_grow.training.trainer.events import read_events

GROWTHS: list[dict[str, Any]] = [
    {"method": "identity", "layers_to": 3},
    {"method": "fpi", "intermediate": 60},
    {"method": "experts", "experts": 3, "router": "normal"},
]
STEPS = [3, 5, 8]
"""Steps of the run at which stages end."""
SCHEDULE = {"max_steps": 11, "lr_scheduler_type": "constant"}


def staged(folder: Path, model: Any, growths: list[dict[str, Any]] = GROWTHS, **changes: Any) -> Path:
    stages: list[dict[str, Any]] = [{"until": {"steps": 3}}]
    lengths = [b - a for a, b in zip(STEPS, [*STEPS[1:], 11], strict=True)]
    stages += [{"grow": g, "until": {"steps": n}, "warmup": {"lr": 2.0, "steps": 2}} for g, n in zip(growths, lengths, strict=False)]
    del stages[-1]["until"]
    return recipe(folder, model, stages=stages, **{**SCHEDULE, **changes})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: Path, two: Path) -> None:
    a, b = weights(one), weights(two)
    assert a.keys() == b.keys() and all(torch.equal(t, b[n]) for n, t in a.items())


def test_three_growths_equal_trainings_and_growths_done_one_by_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = source(tmp_path / "source")
    result = run(capsys, "train", staged(tmp_path, old))
    assert [e["spent"]["step"] for e in result["ended"]] == [3, 5, 8, 11]
    model, resumed = old, None
    for i, (growth, end) in enumerate(zip([None, *GROWTHS], [*STEPS, 11], strict=True)):
        if growth is not None:
            options = {k: v for k, v in growth.items() if k != "method"}
            grown = tmp_path / f"grown-{i}"
            api.grow(model, grown, growth["method"], with_optimizer=str(model), **options)
            model = resumed = grown
        more: dict[str, Any] = {"resume_from_checkpoint": str(resumed)} if resumed is not None else {}
        out = tmp_path / f"alone-{i}"
        warmup = {"warmup": {"lr": 2.0, "steps": 2}} if growth is not None else {}
        run(capsys, "train", recipe(tmp_path, model, **SCHEDULE | {"max_steps": end}, **warmup, **more, output=str(out)))
        same(out, tmp_path / "out" / f"stage-{i:02d}")
        assert logged(out) == {s: x for s, x in logged(tmp_path / "out" / f"stage-{i:02d}").items() if s <= end}
        model = out / f"checkpoint-{end}"
    growths = [json.loads((tmp_path / "out" / f"stage-{i:02d}" / "growth.json").read_text())["growth"]["method"] for i in (1, 2, 3)]
    assert growths == ["identity", "fpi", "experts"]
    kinds = [e["event"] for e in read_events(tmp_path / "out" / "events.jsonl")]
    assert kinds == ["stage", "stage_end"] * 4


class Killed(Exception):
    pass


def interrupt(monkeypatch: pytest.MonkeyPatch, name: str, call: int) -> None:
    """As a kill at one moment: nothing after it is done, nothing is cleaned up."""
    import hf_grow.training.stages.runner as runner
    from hf_grow.training.trainer.trainer import BaseGrowTrainer

    places: dict[str, tuple[Any, str]] = {
        "step": (BaseGrowTrainer, "monitor_step"), "checkpoint": (BaseGrowTrainer, "_save_rng_state"), "model": (BaseGrowTrainer, "save_model"),
        "training": (runner, "train"), "log": (runner.RunLog, "end_stage"),
    }  # fmt: skip
    owner, attribute = places[name]
    original, count = getattr(owner, attribute), [0]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] == call:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, attribute, wrapped)


MOMENTS = [
    ("step", 2),
    ("step", 4),
    ("checkpoint", 1),
    ("checkpoint", 2),
    ("model", 1),
    ("model", 2),
    ("model", 4),
    ("training", 2),
    ("log", 1),
    ("log", 2),
]


@pytest.mark.parametrize(("name", "call"), MOMENTS)
def test_resume_after_an_interruption(name: str, call: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = staged(tmp_path, source(tmp_path / "source"), GROWTHS[:2], save_steps=2, max_steps=7)
    run(capsys, "train", path)
    shutil.move(tmp_path / "out", tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, name, call)
        with pytest.raises(Killed):
            main(["train", str(path)])
    capsys.readouterr()
    result = run(capsys, "train", path, "--resume")
    assert [e["spent"]["step"] for e in result["ended"]] == [3, 5, 7]
    for i in range(3):
        same(tmp_path / "whole" / f"stage-{i:02d}", tmp_path / "out" / f"stage-{i:02d}")
        assert logged(tmp_path / "whole" / f"stage-{i:02d}") == logged(tmp_path / "out" / f"stage-{i:02d}")


def test_fresh_model_from_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "tiny.yaml").write_text(
        "model_type: llama\nvocab_size: 64\nhidden_size: 24\nintermediate_size: 40\nnum_hidden_layers: 1\nnum_attention_heads: 4\n"
        "num_key_value_heads: 2\nmax_position_embeddings: 64\n"
    )
    model = {"config": str(tmp_path / "tiny.yaml"), "tokenizer": str(tmp_path / "tokenizer")}
    path = staged(tmp_path, model, GROWTHS[:1])
    path.write_text(path.read_text().replace(f"model: '{model}'", ""))
    data = __import__("yaml").safe_load(path.read_text()) | {"model": model}
    path.write_text(json.dumps(data))
    run(capsys, "train", path)
    assert json.loads((tmp_path / "out" / "stage-01" / "config.json").read_text())["num_hidden_layers"] == 3
    assert weights(tmp_path / "out" / "initial").keys() < weights(tmp_path / "out" / "stage-01").keys()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_processes_as_one(how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In fp64; AdamW's epsilon is large, because norms compute in fp32 and half of the rows round otherwise."""
    old = source(tmp_path / "source", dtype=torch.float64)
    penalty = {"regularizer": {"kind": "l2sp", "lambda": 0.5}}
    path = staged(tmp_path, old, GROWTHS[:2], adam_epsilon=1e-2, max_steps=7, **penalty)
    together(how, path, tmp_path / "together")
    run(capsys, "train", path)
    for i in range(3):
        one, two = (weights(tmp_path / f / f"stage-{i:02d}") for f in ("out", "together"))
        assert one.keys() == two.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-9, msg=lambda m, name=f"stage {i}, {name}": f"{name}: {m}")


def test_si_adds_up_over_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every stage starts with the importances of the one before (grown), and adds its own."""
    old = source(tmp_path / "source")
    stages = [{"until": {"steps": 2}}, {"until": {"steps": 2}, "learning_rate": 1e-3}, {"grow": GROWTHS[0], "until": {"steps": 2}}, {}]
    path = recipe(tmp_path, old, **SCHEDULE | {"max_steps": 8}, stages=stages, regularizer={"kind": "si", "lambda": 0.5})
    run(capsys, "train", path)
    files = [load_file(tmp_path / "out" / f"stage-{i:02d}" / "penalty" / "importance.safetensors") for i in range(4)]
    assert files[0].keys() == files[1].keys() < files[2].keys() == files[3].keys()
    for before, after in ((0, 1), (2, 3)):
        assert all(bool((files[after][n] >= t).all()) for n, t in files[before].items())
        assert any(not torch.equal(files[after][n], t) for n, t in files[before].items())


def test_a_run_whose_folder_was_moved_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = staged(tmp_path, source(tmp_path / "source"), GROWTHS[:1], max_steps=5, save_steps=1)
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, "step", 5)
        with pytest.raises(Killed):
            main(["train", str(path)])
    capsys.readouterr()
    (tmp_path / "out").rename(tmp_path / "moved")
    result = run(capsys, "train", path, "--resume", "-o", tmp_path / "moved")
    assert [e["spent"]["step"] for e in result["ended"]] == [3, 5]


def test_stages_that_use_up_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = [{"until": {"steps": 50}}, {"grow": GROWTHS[0]}]
    path = recipe(tmp_path, source(tmp_path / "source"), **SCHEDULE | {"max_steps": 4}, stages=stages)
    assert "took all 4 steps" in run(capsys, "train", path, status=1)["error"]


def test_a_stage_does_not_end_while_blocks_blend_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = [
        {"until": {"steps": 1}},
        {"grow": GROWTHS[0], "until": {"steps": 1}, "warmup": {"alpha_steps": 3}},
        {"per_device_train_batch_size": 1},
    ]
    path = recipe(tmp_path, source(tmp_path / "source"), **SCHEDULE | {"max_steps": 6}, stages=stages)
    result = run(capsys, "train", path)
    assert [e["spent"]["step"] for e in result["ended"]] == [1, 4, 6]
    assert [s["tokens"] for s in result["stages"]] == [32, 128, 160] == [e["spent"]["tokens"] for e in result["ended"]]


STAGES: dict[str, list[dict[str, Any]]] = {
    "two growths": [{"until": {"steps": 3}}, {"grow": GROWTHS[0], "until": {"steps": 2}}, {"grow": GROWTHS[1]}],
    "a growth, and a stage without": [{"until": {"steps": 3}}, {"grow": GROWTHS[0], "until": {"steps": 2}}, {"learning_rate": 1e-3}],
    "no growth": [{"until": {"steps": 3}}, {"learning_rate": 1e-3, "until": {"steps": 2}}, {"learning_rate": 1e-4}],
}


@pytest.mark.parametrize("name", STAGES)
def test_ewc_holds_the_first_weights_through_all_stages(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anchors and importances of the last stage against the first model and its Fisher, grown by the commands."""
    from hf_grow.training.regularizers.penalty import QuadraticPenalty

    old = source(tmp_path / "source")
    random_importance(AutoModelForCausalLM.from_pretrained(old), tmp_path / "fisher.safetensors")
    held: list[QuadraticPenalty] = []
    attach = QuadraticPenalty.attach
    monkeypatch.setattr(QuadraticPenalty, "attach", lambda self, model: (held.append(self), attach(self, model))[1])
    penalty = {"kind": "ewc", "lambda": 3.0, "fisher": str(tmp_path / "fisher.safetensors")}
    run(capsys, "train", recipe(tmp_path, old, **SCHEDULE | {"max_steps": 7}, stages=STAGES[name], regularizer=penalty))
    first, fisher = old, tmp_path / "fisher.safetensors"
    for i, stage in enumerate(STAGES[name]):
        if (growth := stage.get("grow")) is not None:
            grown, mapped = tmp_path / f"grown-{i}", tmp_path / f"fisher-{i}.safetensors"
            api.grow(first, grown, growth["method"], **{k: v for k, v in growth.items() if k != "method"})
            run(capsys, "fisher", grown, "--from-growth", fisher, "-o", mapped)
            first, fisher = grown, mapped
    weights, importances = load_file(first / "model.safetensors"), load_file(fisher)
    last = held[-1].held
    assert last.keys() == weights.keys()
    for tensor, parameter in last.items():
        assert torch.equal(parameter.anchor, weights[tensor]), tensor
        assert isinstance(parameter.importance, torch.Tensor)
        torch.testing.assert_close(parameter.importance, importances[tensor], rtol=1e-6, atol=0)


def error(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main([str(w) for w in words]) == 2
    return capsys.readouterr().err


def test_mistakes_of_all_stages_are_reported_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = source(tmp_path / "source")

    def said(stages: Any, **more: Any) -> str:
        return error(capsys, "train", recipe(tmp_path, old, stages=stages, **more))

    both = said([{"until": {"step": 3}}, {"grow": {"method": "identity"}, "learning_rat": 1.0}])
    assert "stages.0.until.step" in both and "stages.1.learning_rat: unknown key" in both
    assert "stages.0.until: is missing" in said([{}, {}])
    assert "stages.1.seed: cannot change in a stage" in said([{"until": {"steps": 1}}, {"seed": 3}])
    assert "stages.1.grow" in said([{"until": {"steps": 1}}, {"grow": {"method": "identity", "layers_to": 1}}])
    assert "max_steps: is missing" in said([{"until": {"steps": 1}}, {}], max_steps=None)
    assert "stages.0: should be" in said([1]) and "list of mappings" in said([])
    assert "there is no 'odl'" in said([{"until": {"plateau": {"on": "odl"}}}, {}])
    assert "there is no 'forgot'" in said([{"until": {"any": [{"metric": {"name": "forgot", "below": 1.0}}]}}, {}])
    assert "is empty" in said([{"until": {"not_before": {"steps": 2}}}, {}]) and "is empty" in said(
        [{"until": {"any": [{"steps": None}]}}, {}]
    )
    assert "belongs to a stage" in said([{"until": {"steps": 1}}, {}], grow={"method": "identity"})
    assert "optimizer_policy: has no effect" in said([{"until": {"steps": 1}}, {"optimizer_policy": "reset"}])
    assert "stages.1.data.train" in said([{"until": {"steps": 1}}, {"data": {"train": str(tmp_path / "nowhere.jsonl")}}])
    assert "stages.0.early_stopping_patience" in said([{"until": {"steps": 1}}, {}], early_stopping_patience=1)
    assert "stages.1.save_only_model" in said([{"until": {"steps": 1}}, {"save_only_model": True}])
    assert "stages.0.save_strategy" in said([{"until": {"steps": 1}}, {}], save_strategy="no")
    assert not (tmp_path / "out").exists()


def test_resume_with_other_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = source(tmp_path / "source")
    path = staged(tmp_path, old, GROWTHS[:1], max_steps=5)
    run(capsys, "train", path)
    assert "All stages" in error(capsys, "train", path, "--resume")
    assert "contains an earlier training" in error(capsys, "train", path)
    data = __import__("yaml").safe_load(path.read_text())
    data["stages"][0]["until"] = {"steps": 2}
    path.write_text(json.dumps(data))
    assert "have ended, and the recipe changes them" in error(capsys, "train", path, "--resume")
