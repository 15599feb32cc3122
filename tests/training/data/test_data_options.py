"""Options of a training's data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hf_grow.errors import InputError
from hf_grow.options import parse
from hf_grow.training.data import DataOptions


def test_all_option_errors_are_reported_at_once() -> None:
    bad = {
        "train": [{"path": "a.txt", "wieght": 2}, {"weight": -1, "path": "b.txt"}],
        "replay": {"path": "c.txt", "share": "5e-2"},
        "eval": {"old": {"sequences": 3}},
        "seq_length": 1,
        "sed": 0,
    }
    with pytest.raises(InputError) as error:
        parse(DataOptions, bad, where="recipe.yaml")
    for part in (
        "train.0.wieght",
        "train.1.weight",
        "replay.share: '5e-2' is a string",
        "eval.old.path: is missing",
        "seq_length",
        "sed: unknown key",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"train": []}, "at least 1 item"),
        ({"train": [{"path": "a", "weight": 1.0}, "b"]}, "a weight to every source or to none"),
        ({"train": "a", "replay": {"share": 0.1}}, "either path .* or self"),
        ({"train": "a", "replay": {"path": "b", "self": {}}}, "either path .* or self"),
        ({"train": "a", "replay": {"path": "b", "share": 1.0}}, "less than 1"),
        ({"train": "a", "replay": {"self": {"temperature": 0}}}, "replay.self.temperature"),
        ({"train": 3}, "train"),
    ],
)
def test_contradicting_options_fail(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse(DataOptions, bad, where="recipe.yaml")


def test_data_md_documents_every_option() -> None:
    from hf_grow.training.config.replay_options import ReplayOptions
    from hf_grow.training.data import EvalSource, ReplaySource, TextOptions, TrainSource

    text = (Path(__file__).parents[3] / "docs" / "data.md").read_text()
    keys = {k for model in (DataOptions, TextOptions, TrainSource, EvalSource) for k in model.model_fields}
    assert not [k for k in keys if f"`{k}`" not in text and f"{k}:" not in text]
    assert not [
        k for k in ReplaySource.model_fields.keys() - TextOptions.model_fields if f"`replay.{k}`" not in text and f"{{{k}:" not in text
    ]
    assert not [k for k in ReplayOptions.model_fields if f"`--{k.replace('_', '-')}`" not in text]
