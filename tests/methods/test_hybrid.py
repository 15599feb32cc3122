"""Depth and width to one size: candidates that come near, one map, the same function."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from exact import logits
from models import BY_NAME, CASES, Case, each_case, make, save, tokens

from hf_grow import api
from hf_grow.convert.in_memory import grow_model
from hf_grow.errors import PlanError
from hf_grow.methods.hybrid import HybridOptions, build_candidate, rank_candidates
from hf_grow.model.architecture import Architecture
from hf_grow.model.families import FAMILIES
from hf_grow.model.param_count import count_parameters

MISTRAL = {"model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5}  # fmt: skip


@each_case
def test_every_family_reaches_twice_its_size_without_changing_its_function(case: Case, exact_math: None) -> None:
    model = make(case, dtype=torch.float64)
    now = count_parameters(Architecture(model.config.to_diff_dict() | {"model_type": case.family})).total
    plan = api.plan(model, "hybrid", to=2 * now, multiple_of=8)
    assert abs(plan.sizes[1].total / (2 * now) - 1) <= 0.05
    assert plan.guarantee.lossless
    ids = tokens(model)
    assert (logits(grow_model(model, plan), ids) - logits(model, ids)).abs().max() < 1e-10


@pytest.mark.parametrize("to", [9_000_000_000, 13_000_000_000, 20_000_000_000, 34_000_000_000])
def test_a_candidate_counts_what_its_growth_counts_and_the_best_stands_first(to: int) -> None:
    arch, options = Architecture(MISTRAL), HybridOptions(to=to)
    found = rank_candidates(arch, options)
    assert [c.cost for c in found] == sorted(c.cost for c in found)
    assert len({c.shape.hidden for c in found}) == len(found)
    for c in found:
        assert count_parameters(Architecture(build_candidate(arch, c, options).config)).total == c.total
        assert abs(c.total / to - 1) <= 0.05


def test_limits_are_kept() -> None:
    options = HybridOptions(to=20_000_000_000, max_depth=40, min_depth=36, multiple_of=256)
    for c in rank_candidates(Architecture(MISTRAL), options):
        assert 36 <= c.layers <= 40
        assert c.shape.hidden % 256 == c.shape.inter % 256 == 0
        assert c.shape.head_dim == 128


def test_another_candidate_can_be_chosen_and_one_too_many_not() -> None:
    model = make(BY_NAME["mistral"])
    sizes = [api.plan(model, "hybrid", to="150K", multiple_of=8, choose=n).architecture.config for n in (1, 2)]
    assert sizes[0] != sizes[1]
    with pytest.raises(PlanError, match="candidates, not 99"):
        api.plan(model, "hybrid", to="150K", multiple_of=8, choose=99)


def test_a_size_out_of_reach_is_refused() -> None:
    with pytest.raises(PlanError, match=r"within 5%.*the source has"):
        api.plan(make(BY_NAME["llama"]), "hybrid", to="90B")


@pytest.mark.parametrize("depth", ["interleave", "dus"])
def test_its_methods_can_be_chosen_and_tell_their_guarantee(depth: str) -> None:
    plan = api.plan(make(BY_NAME["llama"]), "hybrid", to="150K", multiple_of=8, width_method="aki", depth_method=depth, min_depth=6)
    assert not plan.guarantee.lossless
    assert plan.architecture.layers >= 6


def test_one_pass_over_the_weights_gives_a_checkpoint_that_verifies(tmp_path: Path) -> None:
    source = save(make(BY_NAME["qwen3_moe-mixed"], dtype=torch.bfloat16), tmp_path / "source", sharded=True)
    now = api.plan(source, "identity").sizes[0].total
    api.grow(source, tmp_path / "out", "hybrid", to=round(1.8 * now), multiple_of=8)
    assert api.verify(source, tmp_path / "out").ok
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


def test_there_are_cases_of_every_family() -> None:
    assert {c.family for c in CASES} == set(FAMILIES)
