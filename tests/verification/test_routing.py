"""What routers do: entropy, load and agreement against plain loops over tokens, and what growth must keep."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from grown import growth_of, plan_of
from models import BY_NAME, CASES, Case, make, save
from transformers import PreTrainedModel

from hf_grow import api
from hf_grow.checkpoint.reader import open_folder
from hf_grow.cli import main
from hf_grow.convert.in_memory import describe_model, grow_model
from hf_grow.growth.growth import compose
from hf_grow.growth.plan import GrowthPlan, make_plan
from hf_grow.growth.tensormap import Fill
from hf_grow.methods.experts.expert_methods import ExpertsOptions, build_experts
from hf_grow.model.architecture import Architecture
from hf_grow.verification import Report, verify_checkpoints
from hf_grow.verification.routing import Routing, agreement, compare_routers, expert_origins

LENGTH = 40


def ids(length: int = LENGTH) -> torch.Tensor:
    return torch.randint(0, 64, (length,), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def inputs_of_routers(model: PreTrainedModel, tokens: torch.Tensor) -> dict[int, np.ndarray]:
    """The hidden states that reach every router, by layer, seen where they enter it."""
    seen: dict[int, np.ndarray] = {}
    for at, block in enumerate(model.model.layers):
        gate = getattr(block.mlp, "gate", None)
        if gate is not None:
            gate.register_forward_pre_hook(lambda _, args, at=at: seen.__setitem__(at, args[0].reshape(-1, args[0].shape[-1]).numpy()))
    model(tokens[None], use_cache=False)
    return seen


def plain(model: PreTrainedModel, tokens: torch.Tensor) -> dict[int, dict[str, Any]]:
    """Entropy, counts and choices by loops over tokens, from the weights of the routers and what enters them."""
    found = {}
    top_k = model.config.num_experts_per_tok
    for layer, hidden in inputs_of_routers(model, tokens).items():
        weight = model.model.layers[layer].mlp.gate.weight.detach().numpy().astype(np.float64)
        entropy, counts, choices = 0.0, [0] * len(weight), []
        for state in hidden.astype(np.float64):
            scores = [sum(a * b for a, b in zip(row, state, strict=True)) for row in weight]
            total = sum(math.exp(s) for s in scores)
            for s in scores:
                entropy -= math.exp(s) / total * math.log(math.exp(s) / total)
            best = sorted(range(len(scores)), key=lambda e: -scores[e])[:top_k]
            for e in best:
                counts[e] += 1
            choices.append(set(best))
        found[layer] = {"entropy": entropy / len(hidden), "counts": counts, "choices": choices}
    return found


@torch.no_grad()
def routed(model: PreTrainedModel, tokens: torch.Tensor, windows: int = 1) -> Routing:
    routing = Routing(Architecture(model.config.to_dict()))
    for window in tokens.chunk(windows):
        routing.add(model(window[None], use_cache=False, output_router_logits=True).router_logits)
    return routing


MIXTURES = [case for case in CASES if Architecture(case.config).is_moe]


@pytest.mark.parametrize("case", MIXTURES, ids=str)
def test_entropy_and_load_equal_a_plain_loop_over_tokens(case: Case) -> None:
    model = make(case, dtype=torch.float64)
    count = Architecture(case.config).size("experts")
    found, wanted = routed(model, ids()).measure(), plain(model, ids())
    assert [layer["layer"] for layer in found["layers"]] == list(wanted)
    assert len(wanted) == 4 or case.name != "mixtral"
    assert list(wanted) == [1, 5] or case.name != "qwen3_moe-mixed"
    variations, entropies = [], []
    for layer in found["layers"]:
        counts = wanted[layer["layer"]]["counts"]
        assert sum(counts) == 2 * LENGTH
        assert layer["load"] == pytest.approx([c / sum(counts) for c in counts], abs=1e-12)
        assert layer["entropy"] == pytest.approx(wanted[layer["layer"]]["entropy"], rel=1e-6)
        variations.append(np.std(counts) / np.mean(counts))
        assert layer["load_variation"] == pytest.approx(variations[-1])
        entropies.append(layer["entropy"])
    assert found["entropy"] == pytest.approx(np.mean(entropies))
    assert found["entropy_share"] == pytest.approx(np.mean(entropies) / math.log(count))
    assert found["load_variation"] == pytest.approx(np.mean(variations))
    every = [(w["counts"][e] / (2 * LENGTH), layer, e) for layer, w in wanted.items() for e in range(count)]
    for key, best in (("most_loaded", max(every)), ("least_loaded", min(every))):
        place = found[key]
        assert place["share"] == pytest.approx(best[0])
        assert (place["share"], place["layer"], place["expert"]) in [(pytest.approx(s), i, e) for s, i, e in every]
    assert (found["experts"], found["top_k"], found["tokens"]) == (count, 2, LENGTH)


def test_windows_add_up() -> None:
    """Routers see one token at a time: at equal hidden states, windows of the text make no difference."""
    logits = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    arch = Architecture(make(BY_NAME["mixtral"], num_hidden_layers=1).config.to_dict())
    whole, parts = Routing(arch), Routing(arch)
    whole.add([logits])
    for part in logits.split([5, 1, 6]):
        parts.add([part])
    assert parts.chosen(0).tolist() == whole.chosen(0).tolist()
    assert parts.measure()["entropy"] == pytest.approx(whole.measure()["entropy"])
    assert parts.measure()["tokens"] == 12
    assert parts.measure()["layers"][0]["load"] == whole.measure()["layers"][0]["load"]


def set_routers(model: PreTrainedModel, rows: torch.Tensor) -> None:
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.gate.weight.copy_(rows.expand_as(block.mlp.gate.weight))


def test_equal_router_rows_give_log_e_and_a_zero_router_sends_every_token_to_the_same_experts() -> None:
    model = make(BY_NAME["mixtral"])
    for rows in (torch.randn(1, 48, generator=torch.Generator().manual_seed(1)), torch.zeros(1, 48)):
        set_routers(model, rows)
        found = routed(model, ids()).measure()
        assert found["entropy"] == pytest.approx(math.log(4), abs=1e-6)
        assert found["entropy_share"] == pytest.approx(1, abs=1e-6)
    assert len(found["dead"]) == 8  # two of four experts in each of four layers
    for layer in found["layers"]:
        assert sorted(layer["load"]) == [0, 0, 0.5, 0.5]
        assert layer["load_variation"] == pytest.approx(1)
    assert found["most_loaded"]["share"] == 0.5
    assert found["least_loaded"]["share"] == 0


def test_a_certain_router_has_no_entropy_and_its_experts_take_everything() -> None:
    """Logits set by hand: expert 2 first, expert 0 second, for every token."""
    arch = Architecture(make(BY_NAME["mixtral"], num_hidden_layers=2).config.to_dict())
    routing = Routing(arch)
    routing.add([torch.tensor([[50.0, -50.0, 90.0, 0.0]]).expand(7, 4)] * 2)
    found = routing.measure()
    assert found["entropy"] == pytest.approx(0, abs=1e-12)
    assert [layer["load"] for layer in found["layers"]] == [[0.5, 0, 0.5, 0]] * 2
    assert found["dead"] == [[0, 1], [0, 3], [1, 1], [1, 3]]
    assert routing.chosen(1).tolist() == [[2, 0]] * 7


# Origins and agreement


def test_origins_are_read_off_the_map() -> None:
    model = make(BY_NAME["mixtral"])
    assert expert_origins(plan_of(model, "experts", experts=7, copy_from="2,0")) == {
        layer: {0: 0, 1: 1, 2: 2, 3: 3, 4: 2, 5: 0, 6: 2} for layer in range(4)
    }
    noisy = plan_of(model, "experts", experts=6, init="noise")
    assert expert_origins(noisy)[3] == {0: 0, 1: 1, 2: 2, 3: 3, 4: 0, 5: 1}
    # A new identity block: two of an expert's matrices are copies, the third is zeros.
    same = {e: e for e in range(4)}
    assert expert_origins(plan_of(model, "identity", layers_to=6)) == dict.fromkeys(range(6), same)
    # From dense there is none.
    assert expert_origins(plan_of(make(BY_NAME["mistral"]), "experts", experts=4)) == {}


def grown_pair(model: PreTrainedModel, method: str, **options: Any) -> tuple[GrowthPlan, Routing, Routing]:
    plan = plan_of(model, method, **options)
    return plan, routed(model, ids()), routed(grow_model(model, plan), ids())


def test_experts_and_top_k_times_n_agree_wholly() -> None:
    """Lossless: all copies of a chosen expert are chosen, and nothing else."""
    plan, old, new = grown_pair(make(BY_NAME["mixtral"]), "experts", experts=8, top_k=4)
    assert plan.guarantee.lossless
    found = agreement(plan, old, new)
    assert found is not None
    assert found["mean"] == found["inherited"] == 1
    assert [(f["layer"], f["source"], f["share"]) for f in found["layers"]] == [(i, i, 1.0) for i in range(4)]


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe-mixed"])
def test_inherited_layers_of_a_lossless_depth_growth_agree_wholly(name: str) -> None:
    """New blocks add nothing, so routers that were there before see what they saw; the new ones see another input."""
    options = {"at": "1,5"} if name == "qwen3_moe-mixed" else {"layers_to": 6}
    plan, old, new = grown_pair(make(BY_NAME[name]), "identity", **options)
    found = agreement(plan, old, new)
    assert found is not None
    assert found["inherited"] == 1
    assert [f["share"] for f in found["layers"] if not f["new"]] == [1.0] * sum(not f["new"] for f in found["layers"])
    new_ones = [f["share"] for f in found["layers"] if f["new"]]
    assert len(new_ones) == 2
    assert found["mean"] == pytest.approx((len(found["layers"]) - 2 + sum(new_ones)) / len(found["layers"]))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("experts", {"experts": 6}),
        ("experts", {"experts": 6, "init": "noise", "noise": 0.5, "copy_from": "3,1"}),
        ("dus", {"layers_to": 6}),
    ],
)
def test_partial_agreement_equals_a_plain_loop_over_tokens(method: str, options: dict[str, Any]) -> None:
    model = make(BY_NAME["mixtral"])
    plan = plan_of(model, method, **options)
    grown = grow_model(model, plan)
    before, after = plain(model.double(), ids()), plain(grown.double(), ids())
    found = agreement(plan, routed(model, ids()), routed(grown, ids()))
    assert found is not None
    copied = {4: 3, 5: 1} if "copy_from" in options else {4: 0, 5: 1}
    shares = []
    for layer, choices in after.items():
        source = [0, 1, 2, 1, 2, 3][layer] if method == "dus" else layer
        kept = sum(copied.get(e, e) in old for new, old in zip(choices["choices"], before[source]["choices"], strict=True) for e in new)
        shares.append(kept / (2 * LENGTH))
    assert [f["share"] for f in found["layers"]] == pytest.approx(shares)
    assert found["mean"] == pytest.approx(np.mean(shares))
    assert 0 < found["mean"] < 1


def test_an_expert_without_an_origin_never_agrees_and_no_mapping_is_none() -> None:
    model = make(BY_NAME["mixtral"], num_hidden_layers=1)
    plan = plan_of(model, "experts", experts=5, top_k=3)  # expert 4 is a copy of expert 0
    old, new = Routing(plan.source.architecture), Routing(plan.architecture)
    old.add([torch.tensor([[9.0, 8, 1, 0], [0.0, 8, 9, 1]])])  # 0 1, and 2 1
    new.add([torch.tensor([[9.0, 8, 0, 0, 7], [0.0, 8, 9, 7, 0]])])  # 0 1 4, and 2 1 3
    found = agreement(plan, old, new)
    assert found is not None
    assert found["mean"] == pytest.approx(5 / 6)
    # The same with experts 1 and 4 made from nothing.
    gone = {n: Fill(plan.targets[n].shape) for n in plan.targets if ".experts.1." in n or ".experts.4." in n}
    orphan = replace(plan, growth=replace(plan.growth, tensors={**plan.growth.tensors, **gone}))
    assert expert_origins(orphan) == {0: {0: 0, 2: 2, 3: 3}}
    found = agreement(orphan, old, new)
    assert found is not None
    assert found["mean"] == pytest.approx(2 / 6)
    assert agreement(None, old, new) is None
    dense = plan_of(make(BY_NAME["mistral"], num_hidden_layers=1), "experts", experts=5, top_k=3)
    assert agreement(dense, old, new) is None
    nothing = Routing(dense.source.architecture)
    assert compare_routers(dense, nothing, nothing) is None


def test_depth_after_experts_goes_through_both_maps() -> None:
    model = make(BY_NAME["mixtral"])
    info = describe_model(model)
    first = build_experts(info.architecture, ExpertsOptions(experts=8, top_k=4))
    plan = make_plan(info, compose(first, growth_of(first.config, "identity", layers_to=6)))
    found = agreement(plan, routed(model, ids()), routed(grow_model(model, plan), ids()))
    assert found is not None
    assert [f["source"] for f in found["layers"]] == [o.sources[0] for o in plan.growth.layers]
    assert found["inherited"] == 1


# In the report


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("routing")
    save(make(BY_NAME["mixtral"]), folder / "old")
    api.grow(folder / "old", folder / "new", "experts", experts=8, top_k=4)
    return folder / "old", folder / "new"


def test_verify_reports_it_on_the_same_tokens(pair: tuple[Path, Path]) -> None:
    report = verify_checkpoints(*map(open_folder, pair))
    experts = report.metrics["experts"]
    assert experts["old"]["tokens"] == experts["new"]["tokens"] == report.metrics["tokens"]
    assert (experts["old"]["experts"], experts["new"]["experts"], experts["new"]["top_k"]) == (4, 8, 4)
    assert experts["agreement"]["mean"] == 1
    # Copies share what their origin had.
    for before, after in zip(experts["old"]["layers"], experts["new"]["layers"], strict=True):
        assert after["load"] == pytest.approx([share / 2 for share in before["load"] * 2])
        assert after["entropy"] == pytest.approx(before["entropy"] + math.log(2), abs=1e-5)


def test_it_is_told_recorded_and_shown(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    old, new = pair
    assert main(["verify", str(old), str(new)]) == 0
    said = capsys.readouterr().out
    assert "4, top 2 / 8, top 4" in said
    assert "router entropy" in said and "router entropy / log(experts)" in said
    assert "most loaded expert" in said and "least loaded expert" in said
    assert "top-k agreement" in said and "100.0%" in said
    assert "warning" not in said
    assert main(["verify", str(old), str(new), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert json.loads((new / "growth.json").read_text())["verification"] == report
    assert report["metrics"]["experts"]["agreement"]["mean"] == 1


def test_from_dense_only_the_new_side_is_measured_and_dead_experts_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(make(BY_NAME["mistral"]), tmp_path / "old")
    api.grow(tmp_path / "old", tmp_path / "new", "experts", experts=4, router="zeros")
    assert main(["verify", str(tmp_path / "old"), str(tmp_path / "new")]) == 0
    said = capsys.readouterr().out
    assert "- / 4, top 2" in said
    assert "top-k agreement" not in said
    assert "warning    8 dead experts, chosen by none of the 1024 tokens: layer 0: " in said
    record = json.loads((tmp_path / "new" / "growth.json").read_text())["verification"]["metrics"]["experts"]
    assert record["old"] is None and record["agreement"] is None
    assert record["new"]["entropy_share"] == pytest.approx(1, abs=1e-6)


def test_dense_models_have_no_routers_to_report(tmp_path: Path) -> None:
    save(make(BY_NAME["mistral"]), tmp_path / "old")
    api.grow(tmp_path / "old", tmp_path / "new", "dus")
    assert "experts" not in verify_checkpoints(*map(open_folder, (tmp_path / "old", tmp_path / "new"))).metrics


def test_nan_at_any_depth_becomes_null() -> None:
    bad = Routing(Architecture(make(BY_NAME["mixtral"], num_hidden_layers=1).config.to_dict()))
    bad.add([torch.full((3, 4), float("nan"))])
    report = Report("a", "b", metrics={"experts": {"new": bad.measure()}, "deep": [(1, math.inf), {"x": math.nan}]})
    told = json.loads(json.dumps(report.to_json(), allow_nan=False))["metrics"]
    assert told["experts"]["new"]["entropy"] is None
    assert told["experts"]["new"]["layers"][0]["entropy"] is None
    assert sum(told["experts"]["new"]["layers"][0]["load"]) == pytest.approx(1)
    assert told["deep"] == [[1, None], {"x": None}]
