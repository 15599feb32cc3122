"""`grow` in a recipe: the model is grown as it is loaded, and trains as the written one does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from penalties import random_importance
from safetensors.torch import load_file
from trained import logged, recipe, run, source
from transformers import AutoModelForCausalLM
from two_processes import together

from hf_grow import api
from hf_grow.cli import main

GROWTHS: list[tuple[str, dict[str, Any]]] = [
    ("identity", {"layers_to": 4}),
    ("fpi", {"intermediate": 61}),
    ("experts", {"experts": 3, "router": "normal"}),
    ("pipeline", {"steps": [{"method": "tile", "factor": 2}, {"method": "identity", "layers_to": 4}]}),
]
SETTINGS: dict[str, Any] = {
    "warmup": {"lr": 2.0, "steps": 3}, "phases": [{"steps": 2, "train": ["new"]}], "regularizer": {"kind": "si", "lambda": 0.5},
}  # fmt: skip


def same_weights(one: Path, two: Path, tolerance: float) -> None:
    a, b = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        torch.testing.assert_close(b[name], tensor, rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(("method", "options"), GROWTHS)
def test_same_training_as_of_the_written_model(
    method: str, options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = source(tmp_path / "source")
    api.grow(old, tmp_path / "grown", method, **options)
    settings = SETTINGS | ({"regularizer": {"kind": "none"}} if method == "experts" else {})
    run(capsys, "train", recipe(tmp_path, tmp_path / "grown", **settings, output=str(tmp_path / "written")))
    run(capsys, "train", recipe(tmp_path, old, **settings, grow={"method": method, **options}, output=str(tmp_path / "loaded")))
    same_weights(tmp_path / "written", tmp_path / "loaded", 0.0)
    assert logged(tmp_path / "written") == logged(tmp_path / "loaded")
    records = [json.loads((tmp_path / name / "growth.json").read_text()) for name in ("written", "loaded")]
    for record in records:
        del record["training"]
    assert records[0] == records[1]
    assert main(["verify", str(old), str(tmp_path / "loaded"), "--structure-only"]) == 0
    configs = [(tmp_path / name / "config.json").read_text() for name in ("written", "loaded")]
    assert configs[0] == configs[1]
    capsys.readouterr()


@pytest.mark.parametrize(("method", "options"), [*GROWTHS[:2], GROWTHS[3]])
def test_fisher_of_the_source_is_grown(method: str, options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As `hf-grow fisher GROWN --from-growth` writes it."""
    old = source(tmp_path / "source")
    random_importance(AutoModelForCausalLM.from_pretrained(old), tmp_path / "fisher.safetensors")
    api.grow(old, tmp_path / "grown", method, **options)
    fisher = ["fisher", tmp_path / "grown", "--from-growth", tmp_path / "fisher.safetensors", "-o", tmp_path / "grown.safetensors"]
    run(capsys, *fisher)
    for name, more in (("written", {"fisher": "grown"}), ("loaded", {"fisher": "fisher"})):
        regularizer = {"kind": "ewc", "lambda": 3.0, "fisher": str(tmp_path / f"{more['fisher']}.safetensors")}
        growth = {"grow": {"method": method, **options}} if name == "loaded" else {}
        model = old if name == "loaded" else tmp_path / "grown"
        run(capsys, "train", recipe(tmp_path, model, **growth, regularizer=regularizer, output=str(tmp_path / name)))
    same_weights(tmp_path / "written", tmp_path / "loaded", 0.0)
    other = source(tmp_path / "other", num_key_value_heads=1)
    random_importance(AutoModelForCausalLM.from_pretrained(other), tmp_path / "fisher.safetensors")
    path = recipe(tmp_path, old, **growth, regularizer=regularizer, output=str(tmp_path / "third"))
    assert "belongs to another model" in error(capsys, "train", path)


def test_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, source(tmp_path / "source"), **SETTINGS, grow={"method": "identity", "layers_to": 4})
    run(capsys, "train", path)
    whole = load_file(tmp_path / "out" / "model.safetensors")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "out" / name).unlink()
    run(capsys, "train", path, "--resume")
    again = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
@pytest.mark.parametrize(("method", "options"), GROWTHS[:2])
def test_two_processes(how: str, method: str, options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In fp64; AdamW's epsilon is large, because norms compute in fp32 and half of the rows round otherwise."""
    old = source(tmp_path / "source", dtype=torch.float64)
    random_importance(AutoModelForCausalLM.from_pretrained(old, dtype="auto"), tmp_path / "fisher.safetensors")
    penalty = {"kind": "ewc", "lambda": 3.0, "fisher": str(tmp_path / "fisher.safetensors")}
    settings = {**SETTINGS, **({"regularizer": penalty} if method == "fpi" else {})}
    path = recipe(tmp_path, old, **settings, adam_epsilon=1e-2, grow={"method": method, **options})
    together(how, path, tmp_path / "together")
    run(capsys, "train", path)
    same_weights(tmp_path / "out", tmp_path / "together", 1e-9)


def error(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main([str(w) for w in words]) == 2
    return capsys.readouterr().err


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = source(tmp_path / "source")
    for growth, expected in (
        ({"method": "identty"}, "Unknown method 'identty'. Did you mean identity?"),
        ({"method": "identity", "layer": 4}, "layer: unknown"),
        ({"method": "experts", "experts": 3, "router": "prompt"}, "router"),
        ({"method": "identity", "layers_to": 1}, "layers"),
    ):
        assert expected in error(capsys, "train", recipe(tmp_path, old, grow=growth))
    assert not (tmp_path / "out").exists()
    assert "valid dictionary" in error(capsys, "train", recipe(tmp_path, old, grow="identity"))


def test_dry_run_counts_the_grown_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = source(tmp_path / "source")
    facts = run(capsys, "train", recipe(tmp_path, old, grow={"method": "identity", "layers_to": 4}), "--dry-run")
    api.grow(old, tmp_path / "grown", "identity", layers_to=4)
    written = run(capsys, "train", recipe(tmp_path, tmp_path / "grown"), "--dry-run")
    assert facts["parameters"] == written["parameters"] and facts["memory"] == written["memory"]
