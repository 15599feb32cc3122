"""YAML: numbers are numbers, whoever reads the file."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_grow import yaml_text
from hf_grow.cli.train import overrides
from hf_grow.methods.depth import IdentityOptions
from hf_grow.recipe import load_yaml, parse
from hf_grow.training import recipe as training

NUMBERS = {
    "1e-4": 1e-4, "1E-4": 1e-4, "-1e4": -1e4, "+2.5e3": 2500.0, "1.e2": 100.0, ".5e1": 5.0, "1.0e-5": 1e-5, "3e+2": 300.0, "12": 12, "0.5": 0.5,
}  # fmt: skip
WORDS = ("e4", "1e", "1e-", "abc1e4", "1e4x", "1e4 2", "0-23", "1e-4,2", "v1e4", "--1e4", "1..e3")


@pytest.mark.parametrize("text", NUMBERS)
def test_a_number_is_a_number(text: str) -> None:
    found = yaml_text.loads(f"key: {text}")["key"]
    assert (found, type(found)) == (NUMBERS[text], type(NUMBERS[text]))
    assert yaml_text.loads(f"key: '{text}'") == {"key": text}


@pytest.mark.parametrize("text", WORDS)
def test_a_word_stays_a_word(text: str) -> None:
    assert yaml_text.loads(f"key: {text}") == {"key": text}


scalars = st.one_of(
    st.floats(allow_nan=False), st.integers(), st.sampled_from([*NUMBERS, *WORDS, "no", "1:30", "null"]), st.booleans(), st.none()
)


@given(st.dictionaries(st.sampled_from("abcd"), st.one_of(scalars, st.lists(scalars))))
def test_what_is_written_is_read_as_it_was(data: dict[str, object]) -> None:
    found = yaml_text.loads(yaml_text.dumps(data))
    assert found == data
    assert repr(found) == repr(data)  # 1 is not 1.0


def test_growth_recipes_training_recipes_and_the_command_line_read_it_alike(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("noise: 1e-2\n")
    assert parse(IdentityOptions, load_yaml(file), where="it").noise == 0.01
    file.write_text("model: there\nlearning_rate: 2e-5\ndata: {train: here}\nregularizer: {kind: l2sp, lambda: 1e-3}\n")
    read = training.load(file, overrides(["--weight_decay", "1e-2", "--warmup.lr=5e-1"]))
    assert read.mistakes == ()
    assert read.recipe is not None
    assert (read.arguments["learning_rate"], read.arguments["weight_decay"]) == (2e-5, 1e-2)
    assert (read.recipe.regularizer.lambda_, read.recipe.warmup.lr) == (1e-3, 0.5)


def test_a_word_that_looks_like_a_number_is_told_how_to_be_written() -> None:
    found = training.read(yaml_text.loads("attn_implementation: 1e5\nmodel: m\ndata: {train: x}")).mistakes
    assert found == ("attn_implementation: 100000.0 is read as a number; put quotes around a word.",)
