"""Errors put into maps, not into files: the tensors follow the map bit for bit, so only running the models can find them."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import BY_NAME, make, save
from reports import failed_checks

from hf_grow import api
from hf_grow.checkpoint.reader import open_folder
from hf_grow.checkpoint.writer import layout
from hf_grow.convert.execute import execute
from hf_grow.growth.plan import GrowthPlan
from hf_grow.growth.tensormap import Source
from hf_grow.verification.routing import Routing, unaffected_tokens

_file = Path(__file__).parents[2] / "benchmarks" / "injected_errors.py"
_spec = importlib.util.spec_from_file_location("injected_errors", _file)
assert _spec is not None
assert _spec.loader is not None
injected = importlib.util.module_from_spec(_spec)
__import__("sys").modules["injected_errors"] = injected
_spec.loader.exec_module(injected)

BELOW = ("0.0001", "1e-05", "one weight of q_proj off by 0.01")
"""Near what rounding explains: whether these are found depends on the processor."""


@pytest.mark.parametrize("name", ["llama", "llama-tied", "mistral"])
def test_every_error_of_the_table_is_found_in_fp32_and_no_error_is_not(name: str, tmp_path: Path) -> None:
    source = open_folder(save(make(BY_NAME[name]), tmp_path / "source"))
    results = {what: found.within(limit) for what, found, limit in injected.judge(source, 1024, "float32")}
    assert results.pop("no error") is True
    passed = [what for what, within in results.items() if within and not any(b in what for b in BELOW)]
    assert passed == []
    assert len(results) > 20


def test_in_bf16_large_errors_are_found_and_rounding_is_none(tmp_path: Path) -> None:
    source = open_folder(save(make(BY_NAME["llama"]), tmp_path / "source"))
    results = {what: found.within(limit) for what, found, limit in injected.judge(source, 1024, "bfloat16")}
    assert results["no error"] is True
    assert not any(within for what, within in results.items() if "swapped" in what or "missing" in what or "layer 2" in what)


def wrong(source: Path, method: str, options: dict[str, Any], change: Callable[[Any], GrowthPlan], out: Path) -> Path:
    """A growth whose map has an error, written as hf-grow writes it."""
    checkpoint = open_folder(source)
    plan = change(injected.FaultyPlan(api.plan(source, method, **options)))
    execute(plan, checkpoint, out, layout(plan.targets))
    return out


BF16_TILE = ("tile", {"factor": 3})  # weights a third as large, which bf16 rounds
ERRORS: dict[str, Callable[[Any], GrowthPlan]] = {
    "swapped head": lambda w: w.swapped("model.layers.1.self_attn.q_proj.weight", 0, 0, 8, 8),
    "missing 1/n": lambda w: w.scaled("model.layers.2.mlp.down_proj.weight", 3.0),
    "norm gain": lambda w: w.scaled("model.layers.1.input_layernorm.weight", 1.01, row=5),
    "eps": lambda w: w.config(rms_norm_eps=0.011),
    "row": lambda w: w.scaled("model.layers.3.self_attn.v_proj.weight", -1.0, row=2),
}


@pytest.mark.parametrize("error", ERRORS)
def test_storing_in_bf16_does_not_hide_them(error: str, tmp_path: Path) -> None:
    """The stored weights are rounded by more than some of these errors; the map is judged before it is rounded."""
    source = save(make(BY_NAME["llama"], dtype=torch.bfloat16), tmp_path / "source")
    report = api.verify(source, wrong(source, *BF16_TILE, ERRORS[error], tmp_path / "out"))
    assert "lossless" in failed_checks(report)
    assert {c.name for c in report.checks if c.status == "pass"} >= {"tensors", "SHA-256", "config.json", "source"}


def test_without_an_error_the_rounding_passes_and_is_told(tmp_path: Path) -> None:
    source = save(make(BY_NAME["llama"], dtype=torch.bfloat16), tmp_path / "source")
    api.grow(source, tmp_path / "out", "tile", factor=3)
    report = api.verify(source, tmp_path / "out")
    assert failed_checks(report) == set()
    rounding = report.metrics["rounding"]
    assert {c.name for c in report.checks if c.status == "pass"} >= {"lossless", "rounding"}
    assert report.metrics["kl_nats_per_token"] > 100 * rounding["map"]["kl_nats_per_token"]
    assert rounding["allowed_stored"]["kl_nats_per_token"] > 100 * rounding["allowed"]["kl_nats_per_token"]
    json.dumps(report.to_json(), allow_nan=False)


@pytest.mark.parametrize(("error", "names"), [
    ("experts swapped", {"w1": "w1", "w2": "w2", "w3": "w3"}), ("up of another expert", {"w3": "w3"}), ("router", {"gate": "gate"}),
])  # fmt: skip
def test_errors_in_mixtures_are_found(error: str, names: dict[str, str], tmp_path: Path) -> None:
    source = save(make(BY_NAME["mixtral"]), tmp_path / "source")

    def swap(w: Any) -> GrowthPlan:
        if error == "router":
            return w.swapped("model.layers.1.block_sparse_moe.gate.weight", 0, 0, 1)
        tensors = dict(w.plan.growth.tensors)
        for part in names:
            one, two = (f"model.layers.1.block_sparse_moe.experts.{i}.{part}.weight" for i in (0, 1))
            tensors[one], tensors[two] = Source(two), Source(one)
        return replace(w.plan, growth=replace(w.plan.growth, tensors=tensors))

    report = api.verify(source, wrong(source, "identity", {"at": "2"}, swap, tmp_path / "out"))
    assert failed_checks(report) == {"lossless"}


def routing(chosen: list[list[int]]) -> Routing:
    """One sparse layer of Mixtral, top 2 of 4, whose router chose these for each token."""
    made = Routing(api.plan(make(BY_NAME["mixtral"], num_hidden_layers=1), "identity", at="0").source.architecture)
    logits = torch.full((len(chosen), 4), -1.0)
    logits[torch.arange(len(chosen))[:, None], torch.tensor(chosen)] = 1.0
    made.add([logits])
    return made


def test_what_follows_a_choice_that_rounding_changed_is_left_out() -> None:
    old = [[0, 1], [0, 1], [2, 3], [2, 3], [1, 2]]
    new = [[1, 0], [0, 2], [2, 3], [3, 2], [1, 2]]
    found = unaffected_tokens([3, 2], routing(old), routing(new), None)
    assert found is not None
    assert found[0].tolist() == [True, False, False, True, True]
    assert found[1] == 1
    assert unaffected_tokens([3, 2], routing(old), routing(old), None) is None
