"""Sizes that make no sense are refused or marked: what is no growth, what a method misses, what nobody is known to have grown to at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from grown import SMOLLM2_135M, growth_of
from models import BY_NAME, make, save

from hf_grow.cli import main
from hf_grow.errors import PlanError
from hf_grow.methods import METHODS
from hf_grow.model.architecture import Architecture
from hf_grow.model.param_count import count_parameters, extrapolation_warnings

SMOL = Architecture(SMOLLM2_135M)
SIZED = ("dus", "stack", "interleave", "identity", "tile", "aki", "hybrid", "experts")


@pytest.mark.parametrize("size", ["1M", "134M", "134515008", "135M"])
@pytest.mark.parametrize("method", SIZED)
def test_the_size_that_the_source_has_is_no_growth(method: str, size: str) -> None:
    assert count_parameters(SMOL).total == 134_515_008
    with pytest.raises(PlanError, match=r"already has .* is not larger") as refused:
        growth_of(SMOLLM2_135M, method, to=size)
    assert "134,515,008" in str(refused.value)
    assert refused.value.hint


def test_a_growth_that_ends_farther_from_the_target_than_the_source_is_refused() -> None:
    """32 layers are 142M: within 5 % of 138M, but the source is nearer."""
    with pytest.raises(PlanError, match="closer to 138M than the nearest growth, 142M") as refused:
        growth_of(SMOLLM2_135M, "dus", to="138M")
    assert "142M (32 layers)" in refused.value.hint
    assert count_parameters(Architecture(growth_of(SMOLLM2_135M, "dus", to="139M").config)).total > 141e6


@pytest.mark.parametrize(("method", "size"), [("dus", "14B"), ("tile", "14B"), ("hybrid", "14B"), ("experts", "160M"), ("experts", "250M")])
def test_a_size_that_a_method_misses_by_more_than_5_percent_is_refused(method: str, size: str) -> None:
    with pytest.raises(PlanError, match="cannot be reached within 5%"):
        growth_of(SMOLLM2_135M, method, to=size)


def test_experts_say_which_sizes_they_reach() -> None:
    with pytest.raises(PlanError) as refused:
        growth_of(SMOLLM2_135M, "experts", to="250M")
    assert "(2 experts)" in refused.value.hint and "(3 experts)" in refused.value.hint


FAR = [("experts", {"experts": 175}), ("stack", {"factor": 5}), ("tile", {"factor": 3}), ("interleave", {"layers_to": 240})]
NEAR = [
    ("experts", {"experts": 64}),
    ("stack", {"factor": 4}),
    ("tile", {"factor": 2}),
    ("dus", {}),
    ("experts", {"experts": 8, "top_k": 4}),
]


@pytest.mark.parametrize(("method", "options", "far"), [(*way, True) for way in FAR] + [(*way, False) for way in NEAR], ids=str)
def test_what_is_far_beyond_the_papers_is_told(method: str, options: dict[str, Any], far: bool) -> None:
    found = extrapolation_warnings(SMOL, Architecture(growth_of(SMOLLM2_135M, method, **options).config))
    assert bool(found) is far
    assert all(line.startswith("Far beyond what is known to work") for line in found)


def test_a_mixture_that_has_many_experts_already_may_keep_them() -> None:
    many = Architecture({**BY_NAME["mixtral"].config, "num_local_experts": 128})
    deeper = METHODS["identity"].build(many, METHODS["identity"].options(layers_to=5))
    assert not extrapolation_warnings(many, Architecture(deeper.config))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make(BY_NAME["llama"]), tmp_path_factory.mktemp("sizes") / "model")


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    status = main([str(w) for w in words])
    said = capsys.readouterr()
    return status, said.out + said.err


def test_plan_marks_what_is_far_and_names_the_steps_that_reach_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = run(capsys, "plan", folder, "--to", "4M", "--json")
    ways = {way["method"]: way for way in json.loads(said)["ways"]}
    assert status == 0 and abs(ways["experts"]["off_target"]) < 0.05
    assert "experts" in ways["experts"]["beyond"][0]
    assert ways["experts"]["beyond"][0] in ways["experts"]["warnings"]
    assert not ways["dus"]["beyond"]
    status, said = run(capsys, "plan", folder, "--to", "4M")
    assert status == 0
    assert "Far beyond what is known to work" in said
    assert "No growth that is known to work reaches 4.00M in one step. In 4 steps" in said


def test_plan_offers_no_growth_that_is_farther_from_the_target_than_the_source(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    now = count_parameters(Architecture(BY_NAME["llama"].config)).total
    status, said = run(capsys, "plan", folder, "--to", now + 1)
    assert status == 2 and "is not larger" in said
    status, said = run(capsys, "plan", folder, "--to", round(1.015 * now))
    assert status == 0
    assert "hf-grow dus" not in said and "No growth option is within 5% of" in said


def test_a_dry_run_warns_of_what_is_far(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, said = run(capsys, "experts", folder, "--experts", 100, "-o", tmp_path / "out", "--dry-run")
    assert "100 experts; more than 64 count as untried here" in said
