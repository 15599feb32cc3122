"""YAML: numbers are numbers, whoever reads the file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hf_grow.cli import main
from hf_grow.common import yaml_io
from hf_grow.methods.depth import IdentityOptions
from hf_grow.options import load_yaml, parse
from hf_grow.training.config import train_config as training
from hf_grow.training.config.recipe_files import load_recipe, parse_overrides

NUMBERS = {
    "1e-4": 1e-4, "1E-4": 1e-4, "-1e4": -1e4, "+2.5e3": 2500.0, "1.e2": 100.0, ".5e1": 5.0, "1.0e-5": 1e-5, "3e+2": 300.0, "12": 12, "0.5": 0.5,
}  # fmt: skip
WORDS = ("e4", "1e", "1e-", "abc1e4", "1e4x", "1e4 2", "0-23", "1e-4,2", "v1e4", "--1e4", "1..e3")


@pytest.mark.parametrize("text", NUMBERS)
def test_a_number_is_a_number(text: str) -> None:
    found = yaml_io.loads(f"key: {text}")["key"]
    assert (found, type(found)) == (NUMBERS[text], type(NUMBERS[text]))
    assert yaml_io.loads(f"key: '{text}'") == {"key": text}


@pytest.mark.parametrize("text", WORDS)
def test_a_word_stays_a_word(text: str) -> None:
    assert yaml_io.loads(f"key: {text}") == {"key": text}


scalars = st.one_of(
    st.floats(allow_nan=False), st.integers(), st.sampled_from([*NUMBERS, *WORDS, "no", "1:30", "null"]), st.booleans(), st.none()
)


@given(st.dictionaries(st.sampled_from("abcd"), st.one_of(scalars, st.lists(scalars))))
def test_what_is_written_is_read_as_it_was(data: dict[str, object]) -> None:
    found = yaml_io.loads(yaml_io.dumps(data))
    assert found == data
    assert repr(found) == repr(data)  # 1 is not 1.0


def test_growth_recipes_training_recipes_and_the_command_line_read_it_alike(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("noise: 1e-2\n")
    assert parse(IdentityOptions, load_yaml(file), where="it").noise == 0.01
    file.write_text("model: there\nlearning_rate: 2e-5\ndata: {train: here}\nregularizer: {kind: l2sp, lambda: 1e-3}\n")
    read = load_recipe(file, parse_overrides(["--weight_decay", "1e-2", "--warmup.lr=5e-1"]))
    assert read.mistakes == ()
    assert read.recipe is not None
    assert (read.arguments["learning_rate"], read.arguments["weight_decay"]) == (2e-5, 1e-2)
    assert (read.recipe.regularizer.lambda_, read.recipe.warmup.lr) == (1e-3, 0.5)


def test_a_word_that_looks_like_a_number_is_told_how_to_be_written() -> None:
    found = training.read_recipe(yaml_io.loads("attn_implementation: 1e5\nmodel: m\ndata: {train: x}")).mistakes
    assert found == ("attn_implementation: 100000.0 is read as a number; put quotes around a word.",)


# ---- files of unknown origin -----------------------------------------------------------------------------------------------------------

LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 40))
BAD = {
    "billion laughs": (LAUGHS, "more than"),
    "merge keys that double": (MERGES, "more than"),
    "a long text many times": ("a: &a '" + "x" * 100_000 + "'\nb: [" + "*a, " * 5_000 + "*a]\n", "more than"),
    "depth of lists": ("a: " + "[" * 5_000, "nested"),
    "depth of mappings": ("".join(" " * i + "a:\n" for i in range(200)), "nested"),
    "a list that holds itself": ("a: &a [*a]\n", "a node that contains it"),
    "a mapping that holds itself": ("a: &a {b: {c: *a}}\n", "a node that contains it"),
    "a boolean that is none": ("a: !!bool maybe\n", "does not match its tag"),
    "a number that is none": ("a: !!int x\n", "does not match its tag"),
    "a date that is none": ("a: !!timestamp 2024-13-45 99:00:00\n", "does not match its tag"),
    "a number without end": (f"a: {'9' * 50_000}\n", "does not match its tag"),
    "a duplicate key": ("noise: 0.1\nseed: 1\nnoise: 0.2\n", "duplicate key 'noise'"),
    "code": ("a: !!python/object/apply:os.system [true]\n", "could not determine a constructor"),
    "a lone surrogate": ('output: "\\ud800"\n', "lone surrogate"),
    "a zero byte": ('output: "a\\0b"\n', "NUL byte"),
    "a list as a key": ("? [a]\n: b\n", "unhashable"),
    "bytes that are no text": (b"a: \xff\xfe", "UTF-8"),
    "control characters": ("a: \x1b[2J", "not valid YAML"),
    "no mapping": ("2024-01-01", "key: value"),
    "too large": ("# " + "x" * 1_000_001, "larger than"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("command", ["grow", "train"])
def test_a_hostile_recipe_is_one_message(case: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, expected = BAD[case]
    file = tmp_path / "recipe.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert main([command, str(file)]) == 2
    said = capsys.readouterr().err
    assert expected in said
    assert len(said) < 4_000


@pytest.mark.parametrize("case", ["billion laughs", "merge keys that double", "a long text many times", "depth of lists"])
def test_what_grows_by_its_aliases_is_refused_before_it_grows(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loader, composed = yaml_io._classes()[0], []
    compose = loader.compose_node
    monkeypatch.setattr(loader, "compose_node", lambda self, *a: composed.append(1) or compose(self, *a))
    monkeypatch.setattr(loader, "construct_document", lambda *a: pytest.fail("values are made of it"))
    with pytest.raises(yaml.YAMLError):
        yaml_io.loads(str(BAD[case][0]))
    assert len(composed) < 10_000


def test_dates_and_aliases_that_are_small_are_read() -> None:
    assert yaml_io.loads("a: 2024-13-45 99:99:99\nb: &b [1, 2]\nc: *b\nd: {<<: {x: 1}, y: 2}") == {
        "a": "2024-13-45 99:99:99", "b": [1, 2], "c": [1, 2], "d": {"x": 1, "y": 2},
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["device", "pipe", "folder", "nothing"])
def test_a_recipe_must_be_a_file(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    if kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    for command in ("grow", "train"):
        assert main([command, str(path)]) == 2
        assert str(path) in capsys.readouterr().err


@pytest.mark.parametrize("value", ["!!bool maybe", "[" * 5_000, "&a [*a]", "9" * 50_000, "{a: 1, a: 2}"])
def test_a_hostile_value_on_the_command_line_is_one_message(value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").write_text("model: m\n")
    assert main(["train", str(tmp_path / "recipe.yaml"), "--learning_rate", value]) == 2
    assert len(capsys.readouterr().err) < 4_000
