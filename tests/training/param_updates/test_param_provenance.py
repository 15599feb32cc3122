"""What is new in a grown model: against the grown weights themselves, which tell by their values where they come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from grown import dense_mask, plan_of
from models import BY_NAME, make, on_disk
from torch import Tensor

from hf_grow import api
from hf_grow.convert.in_memory import disk_names, grow_model
from hf_grow.errors import InputError, SourceError
from hf_grow.growth.plan import GrowthPlan
from hf_grow.training.param_updates.masks import RowMask
from hf_grow.training.param_updates.param_provenance import PARTS, load_plan, new_masks, new_on_disk, parts
from hf_grow.training.param_updates.parameter_map import parameter_map, parameters


def inherited(source: Tensor, grown: Tensor) -> Tensor:
    """Slow and plain: an entry is inherited if it is a value of the source (all distinct), and the first of its kind in reading order.

    Growth scales a whole tensor evenly here; its first entry is that of the source.
    """
    scale = source.flatten()[0] / grown.flatten()[0]
    values = {round(float(v), 9) for v in source.flatten()}
    out = torch.zeros(grown.shape, dtype=torch.bool)
    for at, value in enumerate((grown * scale).flatten().tolist()):
        if round(value, 9) in values:
            values.remove(round(value, 9))
            out.view(-1)[at] = True
    return out


EVEN: dict[str, dict[str, Any]] = {
    "tile x2": {"method": "tile", "factor": 2},
    "tile x3": {"method": "tile", "factor": 3},
    "tile and pad": {"method": "tile", "hidden": 60, "heads": 12, "kv_heads": 2, "intermediate": 44},
    "pad": {"method": "pad", "hidden": 96, "heads": 8, "kv_heads": 2, "new_heads": "null"},
    "ffn null": {"method": "tile", "intermediate": 52, "ffn": "null"},
    "head_dim": {"method": "tile", "head_dim": 16},
}


@pytest.mark.parametrize("way", EVEN)
@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3"])
def test_new_masks_match_values_of_grown_weights(name: str, way: str) -> None:
    model = make(BY_NAME[name], dtype=torch.float64, num_hidden_layers=1)
    options = dict(EVEN[way])
    plan = plan_of(model, options.pop("method"), symmetry="none", **options)
    before, after, masks = on_disk(model), on_disk(grow_model(model, plan)), new_on_disk(plan)
    some = 0
    for tensor, grown in after.items():
        mask = dense_mask(masks[tensor], grown.shape)
        if way == "head_dim" and tensor.endswith(("q_norm.weight", "k_norm.weight")):
            continue  # free gains repeat old ones, and stand before them: the values do not tell
        assert torch.equal(~mask, inherited(before[tensor], grown)), tensor
        assert (~mask).sum() == before[tensor].numel(), tensor
        some += int(mask.any())
    assert some


def test_aki_rows_from_layer_above_are_new() -> None:
    model = make(BY_NAME["llama"], dtype=torch.float64, num_hidden_layers=2)
    plan = plan_of(model, "aki", factor=2)
    masks, before = new_on_disk(plan), on_disk(model)
    assert all((~dense_mask(masks[n], plan.targets[n].shape)).sum() == t.numel() for n, t in before.items())
    up = dense_mask(masks["model.layers.0.mlp.up_proj.weight"], plan.targets["model.layers.0.mlp.up_proj.weight"].shape)
    assert up[40:].all() and not up[:40, :48].any()


@pytest.mark.parametrize(
    ("method", "options"), [("identity", {"at": "0,2"}), ("stack", {}), ("dus", {"drop": 1}), ("interleave", {"layers_to": 6})]
)
def test_only_added_blocks_are_new(method: str, options: dict[str, Any]) -> None:
    model = make(BY_NAME["mixtral"])
    plan = plan_of(model, method, **options)
    added = [i for i, o in enumerate(plan.growth.layers) if o.new]
    grown = grow_model(model, plan)
    masks = new_masks(grown, plan)
    assert masks.keys() == parameters(grown).keys()
    assert added and {n for n, m in masks.items() if m is True} == {n for n in masks if any(f"layers.{i}." in n for i in added)}
    assert all(m is True or m is False for m in masks.values())
    assert parts(grown, plan)["new_layers"].keys() == parts(grown, plan)["new"].keys()


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_equal_layers_share_masks(name: str) -> None:
    """Memory must not grow with depth: a byte for each weight of a large model would be as much as a smaller model."""

    def held(layers: int) -> int:
        model = make(BY_NAME[name], num_hidden_layers=layers)
        plan = plan_of(model, "tile", factor=2)
        found = {"new": new_masks(grow_model(model, plan), plan), **parts(grow_model(model, plan), plan)}
        every = [m for masks in found.values() for m in masks.values() if isinstance(m, RowMask)]
        return sum({id(m): m.nbytes() for m in every}.values())

    assert 0 < held(2) == held(5)


def test_width_and_depth_masks() -> None:
    model = make(BY_NAME["llama"])
    plan = plan_of(model, "tile", deeper="after", factor=2)
    masks = new_masks(grow_model(model, plan), plan)
    for i, layer in enumerate(plan.growth.layers):
        mask = masks[f"model.layers.{i}.mlp.up_proj.weight"]
        assert mask is True if layer.identity else isinstance(mask, RowMask) and mask.dense().float().mean() == 0.75


def test_upcycling_masks() -> None:
    model = make(BY_NAME["llama"], num_hidden_layers=2)
    plan = api.plan(model, "experts", experts=4)
    grown = grow_model(model, plan)
    masks, named = new_masks(grown, plan), parts(grown, plan)
    fused = "model.layers.1.mlp.experts.gate_up_proj"
    mask = dense_mask(masks[fused], ())
    assert mask.shape == parameters(grown)[fused].shape
    assert mask[1:].all() and not mask[0].any()
    assert masks["model.layers.1.mlp.gate.weight"] is True and masks["model.embed_tokens.weight"] is False
    assert set(named["routers"]) == {f"model.layers.{i}.mlp.gate.weight" for i in range(2)}
    assert torch.equal(dense_mask(named["new_experts"][fused], ()), mask)
    assert torch.equal(dense_mask(named["old_experts"][fused], ()), ~mask)
    assert "model.layers.0.self_attn.q_proj.weight" not in named["new"] and named["old"]["model.layers.0.self_attn.q_proj.weight"] is True


def test_redrawn_expert_units_are_new() -> None:
    model = make(BY_NAME["llama"], dtype=torch.float64, num_hidden_layers=2)
    plan = api.plan(model, "experts", experts=3, init="drop", drop=0.4)
    before, after, masks = on_disk(model), on_disk(grow_model(model, plan)), new_on_disk(plan)
    for part, old in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
        name = f"model.layers.1.block_sparse_moe.experts.0.{part}.weight"
        redrawn = after[name] != before[f"model.layers.1.mlp.{old}.weight"]
        assert 0 < redrawn.sum() < redrawn.numel()
        assert torch.equal(dense_mask(masks[name], redrawn.shape), redrawn)


def test_added_experts_and_router_rows_are_new() -> None:
    model = make(BY_NAME["qwen3_moe-mixed"])
    plan = api.plan(model, "experts", experts=6)
    grown = grow_model(model, plan)
    masks = new_masks(grown, plan)
    for name in ("model.layers.1.mlp.experts.down_proj", "model.layers.1.mlp.gate.weight"):
        mask = dense_mask(masks[name], parameters(grown)[name].shape)
        assert mask[4:].all() and not mask[:4].any()
    assert masks["model.layers.0.mlp.up_proj.weight"] is False


def test_ffn_shards_are_inherited_once() -> None:
    model = make(BY_NAME["llama"], num_hidden_layers=1)
    plan = api.plan(model, "experts", experts=4, init="fine-grained", shards=2)
    masks = new_on_disk(plan)
    for part in ("w1", "w2", "w3"):
        found = [masks[n] for n in plan.targets if n.endswith(f"{part}.weight")] or [
            masks[n] for n in plan.targets if f".experts.{part}" in n
        ]
        assert found in ([], [False, False, True, True])


@pytest.mark.parametrize("name", ["llama", "llama-tied", "mixtral", "qwen2"])
def test_parts_without_growth(name: str) -> None:
    model = make(BY_NAME[name])
    named = parts(model, None)
    assert set(named) == set(PARTS)
    assert named["old"].keys() == parameters(model).keys() and all(m is True for m in named["old"].values())
    assert not named["new"] and not named["new_layers"] and not named["new_experts"]
    assert set(named["embeddings"]) == {"model.embed_tokens.weight"}
    assert set(named["head"]) == {"model.embed_tokens.weight" if "tied" in name else "lm_head.weight"}
    assert set(named["norms"]) == {n for n in parameters(model) if "norm" in n}
    assert bool(named["routers"]) == bool(named["old_experts"]) == (name == "mixtral")


def test_wrapper_prefixes_are_removed() -> None:
    model = make(BY_NAME["llama"], num_hidden_layers=1)
    wrapped = torch.nn.Module()
    wrapped.module = torch.compile(model, disable=True)
    assert parameters(wrapped).keys() == parameters(model).keys()


@pytest.mark.parametrize("name", ["llama-tied", "qwen2_moe", "mixtral", "qwen3_moe-mixed"])
def test_parameter_map_matches_transformers(name: str) -> None:
    model = make(BY_NAME[name])
    found, memory, disk = parameter_map(model), parameters(model), on_disk(model)
    assert found.keys() == disk.keys()
    assert all(torch.equal(place.of(memory[place.parameter].data), disk[n]) for n, place in found.items())
    assert sum(p.numel() for p in memory.values()) == sum(t.numel() for t in disk.values())
    assert disk_names(model, {}) == {}


def test_load_plan_and_plan_of_another_model(tmp_path: Path) -> None:
    model = make(BY_NAME["llama"], num_hidden_layers=2)
    assert load_plan(tmp_path) is None
    plan = plan_of(model, "tile", factor=2)
    (tmp_path / "growth.json").write_text(json.dumps(plan.to_json()))
    loaded = load_plan(tmp_path)
    assert isinstance(loaded, GrowthPlan) and loaded.targets == plan.targets
    with pytest.raises(InputError, match="has shape"):
        new_masks(model, loaded)
    with pytest.raises(InputError, match="has no tensor"):
        new_masks(make(BY_NAME["qwen2"]), loaded)
    (tmp_path / "growth.json").write_text("{}")
    with pytest.raises(SourceError, match="format"):
        load_plan(tmp_path)
