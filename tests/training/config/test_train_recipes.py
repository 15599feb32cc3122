"""Every recipe of recipes/train/ through the real command, on a tiny model grown by the command that the recipe names."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from models import BY_NAME, make, save
from safetensors.torch import load_file
from trained import run, text, tokenizer

from hf_grow import api
from hf_grow.cli.grow import RECIPES as GROWTHS
from hf_grow.model.param_count import count_parameters, format_count
from hf_grow.training.config.recipe_files import RECIPES
from hf_grow.training.config.train_config import read_recipe
from hf_grow.training.trainer.events import read_events

FOLDER = Path(__file__).parents[3] / "recipes" / "train"
NAMES = ["ewc_domain_shift", "llama_pro_domain", "mixtral_upcycle", "solar_10b7_continued", "width_2x_sparkling"]
each = pytest.mark.parametrize("name", NAMES)
TINY = ["--max_steps", "6", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--data.seq_length", "16",
        "--logging_steps", "1", "--eval_steps", "3", "--save_steps", "3", "--learning_rate", "3e-3", "--use_cpu"]  # fmt: skip


def test_the_recipes_come_with_the_package() -> None:
    assert sorted(p.stem for p in FOLDER.glob("*.yaml")) == NAMES
    assert {n: p.read_text() for n, p in RECIPES.items()} == {n: (FOLDER / f"{n}.yaml").read_text() for n in NAMES}


@each
def test_a_recipe_says_its_paper_what_trains_and_what_it_needs(name: str) -> None:
    head = (FOLDER / f"{name}.yaml").read_text().split("\nmodel:")[0]
    assert all(f"# {word}" in head for word in ("Paper", "Trains", "Needs"))
    assert re.search(r"arXiv \d{4}\.\d{5}", head)


@each
def test_a_recipe_has_no_mistake_of_its_own(name: str) -> None:
    """As written: all that is missing are the user's model and texts."""
    found = read_recipe(yaml.safe_load((FOLDER / f"{name}.yaml").read_text()))
    assert found.mistakes == ()


@each
def test_the_commands_in_a_recipe_parse(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_grow.cli import main

    seen: list[str] = []
    monkeypatch.setattr("hf_grow.cli.grow.carry_out", lambda source, *a, **o: seen.append(source) or 0)
    lines = re.sub(r" \\\n#\s+", " ", (FOLDER / f"{name}.yaml").read_text()).splitlines()
    for line in lines:
        found = re.match(r"#\s+(hf-grow (?:width|depth|experts) .*)", line)
        if found:
            assert main(shlex.split(found[1])[1:]) == 0
    assert seen or name in ("solar_10b7_continued", "llama_pro_domain")


def test_default_names_of_grown_models_are_those_that_recipes_train() -> None:
    for growth, recipe, size in (
        ("solar_10b7", "solar_10b7_continued", 10_731_524_096),
        ("llama_pro_8b3", "llama_pro_domain", 8_357_482_496),
    ):
        grown = yaml.safe_load(GROWTHS[growth].read_text())
        expected = f"{grown['source'].rpartition('/')[2]}-{grown['method']}-{format_count(size)}"
        assert yaml.safe_load((FOLDER / f"{recipe}.yaml").read_text())["model"] == expected


def tiny(folder: Path, case: str = "mistral", **changes: Any) -> Path:
    save(make(BY_NAME[case], dtype=torch.bfloat16, num_hidden_layers=4, **changes), folder)
    tokenizer().save_pretrained(folder)
    return folder


def corpus(folder: Path) -> dict[str, Path]:
    return {n: text(folder, n, 30, seed) for n, seed in (("new", 5), ("old", 0))}


def overriding(folder: Path, model: Path, *, replay: bool) -> list[str]:
    texts = corpus(folder)
    words = [
        *TINY,
        "--model",
        str(model),
        "--data.train",
        str(texts["new"]),
        "--data.cache",
        str(folder / "cache"),
        "-o",
        str(folder / "out"),
    ]
    words += ["--data.eval", f"{{old: {{path: {texts['old']}, sequences: 4}}, new: {{path: {texts['new']}, sequences: 4}}}}"]
    return words + (["--data.replay.self.tokens", "200", "--data.replay.self.max_length", "24"] if replay else [])


def test_solar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = tiny(tmp_path / "small")
    run(capsys, "dus", old, "--layers-to", 6, "-o", tmp_path / "grown")
    run(capsys, "train", "solar_10b7_continued", *overriding(tmp_path, tmp_path / "grown", replay=True))
    before, trained, after = (load_file(tmp_path / n / "model.safetensors") for n in ("grown", "out/checkpoint-6", "out"))
    assert all(not torch.equal(before[n].float(), trained[n]) for n in before)
    assert {t.dtype for t in after.values()} == {torch.bfloat16}, "trained in fp32, stored as the source is"


def test_llama_pro(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = tiny(tmp_path / "small", "llama")
    run(capsys, "depth", old, "--method", "identity", "--layers-to", 6, "-o", tmp_path / "grown")
    words = [*overriding(tmp_path, tmp_path / "grown", replay=False), "--monitor.contribution_steps", "3"]
    run(capsys, "train", "llama_pro_domain", *words)
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("grown", "out"))
    new = {n for n in before if ".layers.2." in n or ".layers.5." in n}
    assert all(torch.equal(before[n].float(), after[n]) == (n not in new) for n in before)
    told = [e for e in read_events(tmp_path / "out" / "events.jsonl") if e["event"] == "contribution"]
    assert all(set(e["blocks"]) == {"2", "5"} for e in told) and len(told) == 4


def test_mixtral(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = tiny(tmp_path / "small")
    run(capsys, "experts", old, "--experts", 8, "-o", tmp_path / "grown")
    words = [*overriding(tmp_path, tmp_path / "grown", replay=True), "--phases", "[{steps: 3, train: routers}]"]
    run(capsys, "train", "mixtral_upcycle", *words)
    start, phase, end = (load_file(tmp_path / n / "model.safetensors") for n in ("grown", "out/checkpoint-3", "out"))
    moved = {n for n in start if not torch.equal(start[n].float(), phase[n])}
    assert moved and all(n.endswith("block_sparse_moe.gate.weight") for n in moved)
    assert len({n for n in start if not torch.equal(start[n].float(), end[n])}) > len(moved)


def test_width(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run before the growth, the growth with its optimizer state, and the run after it."""
    old = tiny(tmp_path / "small", "llama")
    before = [w.replace("out", "runs") if w.endswith("out") else w for w in overriding(tmp_path, old, replay=False)]
    plain = tmp_path / "plain.yaml"
    data = yaml.safe_load((FOLDER / "width_2x_sparkling.yaml").read_text())
    plain.write_text(
        yaml.safe_dump(
            {k: v for k, v in data.items() if k not in ("resume_from_checkpoint", "warmup", "after_growth", "monitor", "old_set")}
        )
    )
    run(capsys, "train", plain, *before)
    checkpoint = tmp_path / "runs" / "checkpoint-6"
    wide = tmp_path / "wide"
    run(capsys, "width", checkpoint, "--factor", 2, "-o", wide, "--with-optimizer", checkpoint, "--optimizer-policy", "keep-and-zero")
    words = [w if w != "6" else "12" for w in overriding(tmp_path, wide, replay=False)]
    words += ["--resume_from_checkpoint", str(wide), "--old_set", "old", "--warmup.steps", "2", "--after_growth.settle_steps", "2",
              "--after_growth.restore_steps", "1"]  # fmt: skip
    found = run(capsys, "train", "width_2x_sparkling", *words)
    assert found["steps"] == 12
    events = list(read_events(tmp_path / "out" / "events.jsonl"))
    logs = {e["step"]: e for e in events if e["event"] == "log"}
    assert sorted(logs) == list(range(7, 13))
    assert [logs[s].get("lr_factor", 1.0) for s in (7, 8, 9, 10)] == [0.5, 0.5, 0.75, 1.0]
    assert [logs[s].get("lr_factor_new", 1.0) for s in (7, 8, 9)] == [0.5, 1.0, 1.0]
    assert next(e for e in events if e["event"] == "start")["grown_at"] == 6
    small, large = (count_parameters(api.plan(p, "identity", layers_to=8).source.architecture).total for p in (old, tmp_path / "out"))
    assert large > 2 * small


def test_ewc(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = tiny(tmp_path / "small", "llama")
    run(capsys, "depth", old, "--method", "identity", "--layers-to", 6, "-o", tmp_path / "grown")
    texts = corpus(tmp_path)
    fisher = tmp_path / "fisher.safetensors"
    run(capsys, "fisher", tmp_path / "grown", "--text", texts["old"], "--tokens", 512, "--seq-length", 16, "-o", fisher)
    words = overriding(tmp_path, tmp_path / "grown", replay=True)
    found = {}
    for strength in ("0", "1e5"):
        run(capsys, "train", "ewc_domain_shift", *words, "--regularizer.fisher", fisher, "--regularizer.lambda", strength)
        logs = [e["penalty"] for e in read_events(tmp_path / "out" / "events.jsonl") if e["event"] == "log"]
        assert (max(logs) > 0) == (strength != "0")
        found[strength] = load_file(tmp_path / "out" / "checkpoint-6" / "model.safetensors")
        shutil.rmtree(tmp_path / "out")
    assert any(not torch.equal(t, found["0"][n]) for n, t in found["1e5"].items())
