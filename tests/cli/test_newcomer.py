"""First use: the greeting, suggestions for mistyped names, and messages for wrong sources."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from models import BY_NAME, make, save

from hf_grow.cli import COMMANDS, main
from hf_grow.cli.train import after_training
from hf_grow.common import suggest
from hf_grow.growth.plan import GrowthPlan
from hf_grow.methods import METHODS
from hf_grow.options import nested_keys, parse_size
from hf_grow.publish.card import render_card
from hf_grow.publish.reproduce import OWN_COMMAND, command, size
from hf_grow.training.config.train_config import COMMAND_FLAGS, TrainRecipe, read_recipe, training_arguments_model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make(BY_NAME["mistral"], dtype=torch.bfloat16), tmp_path_factory.mktemp("newcomer") / "small")


def told(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The message of a command that rejects its input."""
    assert main([str(w) for w in words]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["help"]], ids=["alone", "help"])
def test_without_arguments_it_greets_with_the_next_step(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "next: hf-grow plan" in said
    named = {line.split()[1] for line in said.splitlines() if line.startswith("  hf-grow ")}
    assert named <= set(COMMANDS)
    assert {"demo", "plan"} <= named


def test_help_of_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["help", "plan"])
    assert stop.value.code == 0
    assert "--context" in capsys.readouterr().out


COMMAND_LINES = {
    "dsu m": "Did you mean hf-grow dus?",
    "verfy m": "Did you mean hf-grow verify?",
    "moe m": "Did you mean hf-grow experts?",
    "stack m": "Did you mean hf-grow depth --method stack?",
    "tile m": "Did you mean hf-grow width --method tile?",
    "help dsu": "Did you mean hf-grow dus?",
    "dus m --layers 48": "has no --layers. Did you mean --layers-to?",
    "dus m --layers=48": "has no --layers. Did you mean --layers-to?",
    "dus m --layers_to 48": "has no --layers_to. Did you mean --layers-to?",
    "width m --hidden_size 64": "has no --hidden_size. Did you mean --hidden?",
    "width m --intermediate_size 64 --heds 3": "has no --heds. Did you mean --heads?",
    "experts m --num-experts 8": "Did you mean --experts?",
    "dus m --out there": "Did you mean --output?",
    "dus m --force": "Did you mean --overwrite?",
    "fisher m --lr 3": "Did you mean --calibrate-lr?",
    "depth m --method identiy": "is not one of dus, stack, interleave, identity, layers. Did you mean identity?",
    "grow solar": "Did you mean solar_10b7?",
    "train llama_pro": "Did you mean llama_pro_domain?",
    "plan m --to 5M and more": "does not accept: and more",
}


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_suggestions_on_the_command_line(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = told(capsys, *line.split())
    assert COMMAND_LINES[line] in said
    assert "--help" in said or "Commands: " in said or "Give a YAML file" in said


def test_all_wrong_flags_are_reported_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    said = told(capsys, "dus", "m", "--layers", "3", "--hidden_size", "--dryrun")
    assert all(flag in said for flag in ("--layers.", "--hidden_size.", "--dryrun. Did you mean --dry-run?"))


KEYS = {
    "lr": "learning_rate", "lamda": "regularizer.lambda", "seqlength": "data.seq_length", "seq_length": "data.seq_length", "batch_size": "per_device_train_batch_size",
    "epochs": "num_train_epochs", "steps": "max_steps", "wd": "weight_decay", "ewc": "regularizer", "optimizer": "optim", "dataset": "data.train",
    "lerning_rate": "learning_rate", "max_length": "data.seq_length", "grad_accum": "gradient_accumulation_steps", "teacher": "distill", "dryrun": "--dry-run",
    "fisher": "regularizer.fisher", "replay": "data.replay",
}  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_suggestions_in_a_training_recipe(key: str) -> None:
    (mistake,) = [m for m in read_recipe({"model": "m", "data": {"train": "t"}, key: 1}).mistakes if m.startswith(key)]
    assert mistake.startswith(f"{key}: unknown key. Did you mean {KEYS[key]}? Known: ")


def test_suggestions_for_nested_keys_and_in_growth_recipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = read_recipe({"model": "m", "data": {"train": "t", "seqlength": 3}, "regularizer": {"kind": "ewc", "lamda": 3}}).mistakes
    assert any("data.seqlength: unknown key. Did you mean seq_length?" in m for m in found)
    assert any("regularizer.lamda: unknown key. Did you mean lambda?" in m for m in found)
    file = tmp_path / "recipe.yaml"
    file.write_text("source: m\nmethod: identity\nlayers: 3\nnoize: 0.1\nnonsense_beyond_words: 1\n")
    said = told(capsys, "grow", file)
    assert "layers: unknown key. Did you mean layers_to?" in said
    assert "noize: unknown key. Did you mean noise?" in said
    assert "nonsense_beyond_words: unknown key. Known: " in said
    file.write_text("source: m\nmethod: identiy\n")
    assert "Unknown method 'identiy'. Did you mean identity?" in told(capsys, "grow", file)


def test_every_synonym_names_something_that_exists() -> None:
    options = {f for m in METHODS.values() for f in m.options.model_fields}
    other = {"output", "overwrite", "source", "device", "text", "dtype", "calibrate_lr", "batch", "batch_size"}  # flags of single commands
    there = {
        *COMMANDS,
        *options,
        *other,
        *nested_keys(TrainRecipe),
        *training_arguments_model().model_fields,
        *COMMAND_FLAGS,
        "seq_length",
        "lambda",
    }
    assert not [(word, m) for word, meant in suggest.SYNONYMS.items() for m in meant if m not in there]
    assert not [word for word in suggest.SYNONYMS if "-" in word or word != word.lower()]  # as they are looked up


def test_a_failure_is_json_too(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = [
        (["dus", source, "--to", "10B", "-o", tmp_path / "out"], 2, "cannot be reached", "Reachable"),
        (["dsu", source], 2, "Did you mean", "Commands: "),
        (["plan", source], 2, "--to", "--help"),
        (["plan", source, "--to", "3 apples"], 2, "is not a size", ""),
        (["verify", tmp_path, tmp_path], 2, "", ""),
    ]
    for words, status, message, hint in cases:
        assert main([*map(str, words), "--json"]) == status
        captured = capsys.readouterr()
        facts = json.loads(captured.out)
        assert set(facts) == {"error", "hint", "status"}
        assert facts["status"] == status
        assert message in facts["error"]
        assert hint in facts["hint"]
        assert facts["error"] in captured.err  # and people read it too


def test_an_interruption_is_json_too(source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*words: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_grow.api.growth_job.open_sources", interrupted)
    assert main(["dus", str(source), "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert (facts["status"], "--resume" in facts["error"]) == (1, True)


def test_a_card_has_the_command_as_it_is_typed(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command is quoted for a shell, with sizes and ranges as the flags take them, and plans the same growth."""
    monkeypatch.chdir(source.parent)
    typed = [
        f"hf-grow dus ./{source.name} --layers-to 6 --noise 0.01",
        f"hf-grow depth ./{source.name} --method layers --layers 0-2,1-3",
        f"hf-grow width ./{source.name} --method tile --factor 2",
        f"hf-grow hybrid ./{source.name} --to 0.1M",
        f"hf-grow experts ./{source.name} --experts 4 --top-k 2",
    ]
    for words in typed:
        out = tmp_path / words.split()[1]
        assert main([*shlex.split(words)[1:], "-o", str(out)]) == 0
        plan = GrowthPlan.from_json(json.loads((out / "growth.json").read_text()))
        said = command(plan, "its name")
        assert said is not None
        assert set(shlex.split(said)) == {*shlex.split(words.replace("--to 0.1M", "--to 100000")), "-o", "its name"}
        assert said.startswith(shlex.join(shlex.split(words)[:3]))
    assert {m for m in METHODS if m in COMMANDS} == OWN_COMMAND | {m.name for m in METHODS.values() if m.name == m.kind}


def test_sizes_are_abbreviated_only_if_that_is_exact() -> None:
    for value in (10_700_000_000, 135_000_000, 10**12, 1_234_567, 134_515_008, 999, 10_000_000_001):
        assert parse_size(size(value)) == value
    assert (size(10_700_000_000), size(134_515_008), size(135_000_000)) == ("10.7B", "134515008", "135M")


def test_a_card_has_provenance_source_and_ranges(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["dus", str(source), "--layers-to", "6", "-o", str(out)]) == 0
    assert main(["verify", str(source), str(out), "--structure-only"]) == 0
    card = render_card(out)
    assert f"| provenance | ok | dus from {source.name}: changes the function |" in card
    assert f"| source | ok | {source.name} has the tensors of the plan's source |" in card
    assert str(source.parent) not in card
    assert "Layers 3-4 are further copies" in card


def test_after_training_the_next_commands_are_verify_and_card(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["dus", str(source), "--layers-to", "6", "-o", str(out)]) == 0
    assert after_training(out) == [("verify", str(source), out), ("card", out)]
    assert after_training(source) == [("inspect", source)]


def test_only_the_beginning_of_a_long_word_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparing takes quadratic time, and keys of a recipe may have a million letters."""
    compared: list[int] = []
    ratio = suggest._ratio
    monkeypatch.setattr(suggest, "_ratio", lambda a, b: compared.append(len(a)) or ratio(a, b))
    assert suggest.closest("learning_rate" + "x" * 100_000, ["learning_rate", "seed"]) is None
    assert compared and max(compared) <= suggest.MAX_LENGTH
    assert suggest.closest("learnig_rate", ["learning_rate", "seed"]) == "learning_rate"
