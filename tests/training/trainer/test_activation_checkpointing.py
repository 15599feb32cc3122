"""Activation checkpointing of chosen layers: which are computed again, and that gradients do not depend on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import BY_NAME, make
from trained import grown, logged, recipe, run, source
from trainers import gradients_of_first_step

from hf_grow.training.trainer.state import GrowthSettings


def forward_counts(model: Any) -> list[int]:
    """How often attention of each layer is computed from now on; a layer that is checkpointed computes it twice."""
    counts = [0] * len(model.model.layers)

    def count(number: int) -> Any:
        def hook(*args: Any) -> None:
            counts[number] += 1

        return hook

    for number, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_pre_hook(count(number))
    return counts


POLICIES: dict[str, tuple[list[int], GrowthSettings, dict[str, Any]]] = {
    "none": ([], GrowthSettings(), {}),
    "all": ([0, 1, 2, 3], GrowthSettings(), {"activation_checkpointing": True}),
    "every second": (
        [0, 2],
        GrowthSettings(),
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"every_n_layers": 2}},
    ),
    "chosen": ([1, 2], GrowthSettings(checkpointed_layers=frozenset([1, 2])), {"activation_checkpointing": True}),
}


@pytest.mark.parametrize("case", ["llama", "mixtral"])
def test_gradients_are_equal_to_the_bit(case: str, tmp_path: Path) -> None:
    found = {}
    for name, (checkpointed, growth, arguments) in POLICIES.items():
        model = make(BY_NAME[case])
        counts = forward_counts(model)
        found[name], _ = gradients_of_first_step(model, tmp_path / name, growth, eval_strategy="no", **arguments)
        assert counts == [1 + (layer in checkpointed) for layer in range(4)], name
    for name, gradients in found.items():
        assert gradients.keys() == found["none"].keys() and len(gradients) > 30
        assert all(torch.equal(gradients[n], g) for n, g in found["none"].items()), name


def test_a_recipe_checkpoints_new_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, grown(tmp_path), max_steps=3, save_strategy="no")
    run(capsys, "train", path, "-o", tmp_path / "plain")
    on = ("--activation_checkpointing", "--checkpointed_layers")
    activations = []
    for layers in (None, "[0]", "new_layers", "[0, 1, 2, 3]"):
        words = [] if layers is None else [*on, layers]
        activations.append(run(capsys, "train", path, "--dry-run", *words)["memory"]["activations"])
        run(capsys, "train", path, *words, "-o", tmp_path / "one", "--overwrite")
        assert logged(tmp_path / "one") == logged(tmp_path / "plain")
    assert activations == sorted(activations, reverse=True) and len(set(activations[1:])) == 3
    assert activations[-1] == run(capsys, "train", path, "--dry-run", "--activation_checkpointing")["memory"]["activations"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"checkpointed_layers": [0]}, "requires activation_checkpointing"),
        ({"activation_checkpointing": True, "checkpointed_layers": [0, 2]}, "there is no layer 2. The layers are 0 to 1."),
        ({"activation_checkpointing": True, "checkpointed_layers": [-1]}, "there is no layer -1"),
        ({"activation_checkpointing": True, "checkpointed_layers": []}, "checkpointed_layers"),
        ({"activation_checkpointing": True, "checkpointed_layers": "odd"}, "checkpointed_layers"),
        ({"activation_checkpointing": True, "checkpointed_layers": "new_layers"}, "no layers that a growth added"),
        ({"activation_checkpointing": True, "checkpointed_layers": [0], "activation_checkpointing_kwargs": {"every_n_layers": 2}},
         "cannot be combined with every_n_layers"),
        ({"activation_checkpointing": True, "activation_checkpointing_kwargs": {"every_n_layers": 0}}, "at least 1, got 0"),
    ],
)  # fmt: skip
def test_wrong_layers_are_refused(settings: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, source(tmp_path / "model"), **settings)
    assert message in " ".join(run(capsys, "train", path, status=2)["error"].split())
