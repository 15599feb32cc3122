"""The small commands: in every pair of flags each changes what is done, or the pair is refused; and what Python's own functions refuse."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import astuple
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import BY_NAME, make, save
from option_pairs import REFUSED, Outcome, unheard, words

from hf_grow import api, cli
from hf_grow.cli import main
from hf_grow.demo.run import DemoOptions
from hf_grow.errors import InputError
from hf_grow.options import unmet_requirements, validate
from hf_grow.publish.push import Destination, PushResult
from hf_grow.training.config.train_config import TrainRecipe


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pairs")
    source = save(make(BY_NAME["mistral"], dtype=torch.bfloat16), root / "source")
    assert main(["dus", str(source), "-o", str(root / "grown")]) == 0
    (root / "adapter").mkdir()
    return root


class Recorder:
    """Runs a command; what it did is what it said, what it wrote, and how it called `told`."""

    def __init__(self, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.place, self.capsys = place, capsys
        self.calls: list[Any] = []

    def told(self, result: Any) -> Callable[..., Any]:
        def call(*positional: Any, **named: Any) -> Any:
            self.calls.append([_plain(v) for v in (*positional, *sorted(named.items()))])
            return result

        return call

    def outcome(self, command: list[str]) -> Callable[[Mapping[str, Any]], Outcome]:
        def run(options: Mapping[str, Any]) -> Outcome:
            self.calls.clear()
            status = main(command + words(options, self.place))
            said = self.capsys.readouterr()
            made = {p: p.read_bytes() for p in sorted((*self.place.glob("made*"), *self.place.glob("grown/README.md")))}
            for path in made:
                path.unlink()
            assert "Traceback" not in said.err
            return REFUSED if status else [list(self.calls), said.out, made]

        return run


def _plain(value: Any) -> Any:
    if isinstance(value, Destination):
        return astuple(value)
    if isinstance(value, DemoOptions):
        return value.model_dump()
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str):
        return value[0], _plain(value[1])
    return str(value) if isinstance(value, Path) else value if isinstance(value, str | int | bool | None) else ""


CASES: dict[str, tuple[list[str], dict[str, list[Any]]]] = {
    "inspect": (["inspect", "{tmp}/grown"], {"revision": ["a", "b"], "picture": ["{tmp}/made.svg", "{tmp}/made2.svg"], "json": [True]}),
    "plan": (
        ["plan", "{tmp}/source", "--to", "100K"],
        {"to": ["90K", "110K"], "active": ["90K", "80K"], "context": [1000, 2000], "revision": ["a", "b"], "json": [True]},
    ),
    "card": (
        ["card", "{tmp}/grown"],
        {"output": ["{tmp}/made.md", "{tmp}/made2.md"], "name": ["you/one", "you/two"], "license": ["mit", "apache-2.0"],
         "base_model": ["you/base", "you/other"], "offline": [True], "overwrite": [True], "json": [True]},
    ),
    "push": (
        ["push", "{tmp}/grown", "you/model"],
        {"private": [True], "revision": ["a", "b"], "create_pr": [True], "message": ["one", "two"], "dry_run": [True], "json": [True]},
    ),
    "merge": (
        ["merge", "{tmp}/adapter", "-o", "{tmp}/x"],
        {"output": ["{tmp}/y", "{tmp}/z"], "base": ["{tmp}/source", "{tmp}/grown"], "revision": ["a", "b"], "dtype": ["float32", "bfloat16"],
         "overwrite": [True], "json": [True]},
    ),
    "demo": (["demo"], {"output": ["{tmp}/y", "{tmp}/z"], "fresh": [True], "quick": [True], "seed": [1, 2]}),
}  # fmt: skip
BY_STATE = {"card": {"offline", "overwrite"}}
"""What depends on the Hub and on files that lie there already, beside which nothing here is idle."""


@pytest.mark.parametrize("command", CASES)
def test_every_flag_has_samples(command: str) -> None:
    parser = argparse.ArgumentParser()
    cli._add_arguments(command, parser)
    assert {a.dest for a in parser._actions if a.option_strings} - {"help"} == CASES[command][1].keys()


@pytest.mark.parametrize("command", CASES)
def test_in_every_pair_both_flags_are_heard_or_refused(
    command: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    base, samples = CASES[command]
    recorder = Recorder(place, capsys)
    monkeypatch.setattr("hf_grow.cli.demo.run_demo", recorder.told(None))
    monkeypatch.setattr("hf_grow.training.peft.merge.merge_adapter", recorder.told(SimpleNamespace(base="b", layers=1, plan=None)))
    monkeypatch.setattr("hf_grow.cli.push.push", recorder.told(PushResult("you/model", "url", "c" * 40, "", 1, 1)))
    monkeypatch.setattr("hf_grow.cli.push.uploaded_weights", recorder.told(None))
    outcome = recorder.outcome([w.format(tmp=place) for w in base])
    heard = 0
    for a, b in combinations(samples, 2):
        given = {a: samples[a][0], b: samples[b][0]}
        idle = set(unheard(outcome, given, samples)) - BY_STATE.get(command, set())
        assert not idle, (given, idle)
        heard += outcome(given) != REFUSED
    assert heard


def test_a_base_that_is_a_folder_has_no_revision(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(place / "source"), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    assert main(["merge", str(tmp_path / "adapter"), "--base", str(place / "source"), "--revision", "a", "-o", str(tmp_path / "out")]) == 2
    assert "Remove --revision" in capsys.readouterr().err


@pytest.mark.parametrize("idle", [{"tokens": 32}, {"text": "x"}, {"dtype": "float32"}, {"tasks": "one"}])
def test_verify_of_the_structure_takes_nothing_about_outputs(idle: dict[str, Any], place: Path) -> None:
    with pytest.raises(InputError, match=f"{next(iter(idle))}.* would do nothing|cannot be run"):
        api.verify(place / "source", place / "grown", structure_only=True, **idle)


RECIPE = {"model": "m", "data": {"train": "t"}}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"monitor": {"lr_factor": 0.1}}, "monitor.lr_factor: requires on_instability lower_lr or rollback"),
        ({"monitor": {"lr_factor": 0.1, "on_instability": "longer_warmup"}}, "monitor.lr_factor: requires"),
        ({"warmup": {"alpha_start": 0.5}}, "warmup.alpha_start: requires alpha_steps"),
        ({"warmup": {"shape": "cosine"}}, "warmup.shape: requires alpha_steps"),
        ({"warmup": {"shape": "cosine", "alpha_steps": 0}}, "warmup.shape: requires alpha_steps"),
    ],
)
def test_a_key_without_what_it_belongs_to(given: dict[str, Any], told: str) -> None:
    parsed, wrong = validate(TrainRecipe, {**RECIPE, **given})
    assert wrong == [] and parsed is not None
    assert [line for line in unmet_requirements(parsed) if line.startswith(told)]


def test_a_key_beside_what_it_belongs_to() -> None:
    both = {
        "monitor": {"lr_factor": 0.1, "on_instability": "rollback"},
        "warmup": {"shape": "cosine", "alpha_start": 0.5, "alpha_steps": 2},
    }
    parsed, wrong = validate(TrainRecipe, {**RECIPE, **both})
    assert parsed is not None
    assert wrong + unmet_requirements(parsed) == []


@pytest.mark.parametrize("key", ["name", "split", "revision", "files", "text_field", "limit"])
def test_text_that_is_sampled_is_not_read_from_a_data_set(key: str) -> None:
    _, wrong = validate(TrainRecipe, {"model": "m", "data": {"train": "t", "replay": {"self": {}, key: 3 if key == "limit" else "x"}}})
    assert len(wrong) == 1 and f"{key} would have no effect" in wrong[0]
