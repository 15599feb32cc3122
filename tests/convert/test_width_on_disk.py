"""Width growth on disk: the same tensors as in memory, whatever the shards and the memory, and a plan that can be read back and checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from grown import growth_of, plan_of, write
from models import BY_NAME, CASES, Case, make, save
from safetensors.torch import load_file

from hf_grow import api
from hf_grow.checkpoint.reader import open_folder
from hf_grow.checkpoint.writer import layout
from hf_grow.convert.execute import execute
from hf_grow.convert.in_memory import disk_tensors, grow_model
from hf_grow.growth.axes import AxisMap
from hf_grow.growth.growth import Growth, compose
from hf_grow.growth.plan import GrowthPlan, make_plan
from hf_grow.growth.tensormap import Expr, Noise
from hf_grow.methods.width import activation_maps
from hf_grow.methods.width.attention_maps import head_dim_space, head_spaces
from hf_grow.verification import verify_checkpoints

WAYS: dict[str, dict[str, Any]] = {
    "tile": {"factor": 2},
    "odd": {"hidden": 60, "heads": 10, "kv_heads": 2, "intermediate": 64, "symmetry": "split"},
    "padded": {"method": "pad", "hidden": 72, "heads": 8, "kv_heads": 2, "new_heads": "null", "intermediate": 64, "ffn": "null"},
    "head_dim": {"head_dim": 18, "intermediate": 50},
    "hypercloning": {"method": "hypercloning", "factor": 2, "noise_db": 10},
    "aki": {"method": "aki", "hidden": 72, "intermediate": 64},
    "lossless aki": {"method": "aki", "hidden": 60, "heads": 12, "kv_heads": 4, "intermediate": 64, "lossless": True},
    "net2net": {"method": "net2net", "hidden": 96},
}
FAMILIES = ("llama-tied", "mixtral", "qwen2", "qwen3-tied", "qwen3_moe-mixed")
CASE_WAYS = [(BY_NAME[FAMILIES[i % len(FAMILIES)]], way) for i, way in enumerate(WAYS)] + [(c, "tile") for c in CASES]


def options_of(way: str) -> tuple[str, dict[str, Any]]:
    options = dict(WAYS[way])
    return options.pop("method", "tile"), options


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize(("case", "way"), CASE_WAYS, ids=str)
def test_disk_and_memory_give_the_same_tensors(case: Case, way: str, tmp_path: Path) -> None:
    method, options = options_of(way)
    model = make(case, dtype=torch.bfloat16)
    source = save(model, tmp_path / "source", sharded=True)
    api.grow(source, tmp_path / "out", method, **options)
    assert same(tensors_of(tmp_path / "out"), dict(disk_tensors(grow_model(model, plan_of(model, method, **options)))))


@pytest.mark.parametrize("way", WAYS)
def test_neither_shards_nor_memory_nor_workers_change_a_bit(way: str, tmp_path: Path) -> None:
    method, options = options_of(way)
    source = save(make(BY_NAME["mistral"], dtype=torch.bfloat16), tmp_path / "source")
    api.grow(source, tmp_path / "whole", method, workers=1, **options)
    for i, how in enumerate(
        ({"max_shard_size": 20_000, "memory_budget": 1}, {"max_shard_size": 100_000, "memory_budget": 5000, "workers": 3})
    ):
        write(source, tmp_path / str(i), method, options, **how)
        assert len(list((tmp_path / str(i)).glob("*.safetensors"))) > 1
        assert same(tensors_of(tmp_path / "whole"), tensors_of(tmp_path / str(i)))


@pytest.mark.parametrize("way", WAYS)
def test_a_written_width_growth_is_verified_from_its_own_record(way: str, tmp_path: Path) -> None:
    method, options = options_of(way)
    source = save(make(BY_NAME["qwen3-tied"], dtype=torch.bfloat16), tmp_path / "source", sharded=True)
    api.grow(source, tmp_path / "out", method, max_shard_size=50_000, **options)
    report = verify_checkpoints(open_folder(source), open_folder(tmp_path / "out"), structure_only=True)
    assert report.ok, report.checks
    assert {c.name for c in report.checks if c.status == "pass"} >= {"tensors", "SHA-256", "source", "provenance", "config.json"}


@pytest.mark.parametrize("way", WAYS)
def test_the_plan_comes_back_from_its_json(way: str) -> None:
    method, options = options_of(way)
    plan = plan_of(make(BY_NAME["mixtral"]), method, deeper="after", **options)
    again = GrowthPlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again.growth.tensors == plan.growth.tensors
    assert again.growth.axes == plan.growth.axes
    assert again.growth.layers == plan.growth.layers
    assert again.fingerprint == plan.fingerprint


@pytest.mark.parametrize("order", ["width first", "depth first"])
@pytest.mark.parametrize("depth", ["identity", "dus"])
@pytest.mark.parametrize("name", ["llama-tied", "qwen3_moe"])
def test_one_pass_over_width_and_depth_equals_two(name: str, depth: str, order: str, tmp_path: Path) -> None:
    model = make(BY_NAME[name], dtype=torch.float64)
    source = save(model, tmp_path / "source", sharded=True)
    steps: list[tuple[str, dict[str, Any]]] = [("tile", {"hidden": 120, "heads": 12, "kv_heads": 4, "symmetry": "none"}), (depth, {})]
    if order == "depth first":
        steps.reverse()
    checkpoint = open_folder(source)
    first = growth_of(checkpoint.config, steps[0][0], **steps[0][1])
    plan = make_plan(checkpoint.info, compose(first, growth_of(first.config, steps[1][0], **steps[1][1])))
    execute(plan, checkpoint, tmp_path / "once", layout(plan.targets), memory_budget=3000)
    api.grow(source, tmp_path / "half", steps[0][0], **steps[0][1])
    api.grow(tmp_path / "half", tmp_path / "twice", steps[1][0], **steps[1][1])
    once, twice = tensors_of(tmp_path / "once"), tensors_of(tmp_path / "twice")
    random = {n for n, e in plan.growth.tensors.items() if "Noise(" in repr(e)}  # each step draws its noise by its own key
    assert once.keys() == twice.keys()
    assert len(random) < len(once)
    for tensor in once.keys() - random:
        assert torch.equal(once[tensor], twice[tensor]), tensor
    for tensor in random:  # the old columns are the same, before the random ones
        assert torch.equal(once[tensor][..., :96], twice[tensor][..., :96]), tensor


def test_noise_of_a_composition_is_drawn_anew_for_each_step() -> None:
    """Growing twice by the same method must not draw the same numbers twice."""
    model = make(BY_NAME["llama"], dtype=torch.float64)
    first = growth_of(model.config.to_dict(), "tile", intermediate=80, ffn="copies")
    keys = noise_keys(compose(first, growth_of(first.config, "tile", intermediate=160, ffn="copies")))
    assert len(keys) == len(set(keys)) > 0


def noise_keys(growth: Growth) -> list[str]:
    def walk(expr: Expr) -> list[str]:
        return [*([expr.key] if isinstance(expr, Noise) else []), *(k for c in expr.children() for k in walk(c))]

    return [k for e in growth.tensors.values() for k in dict.fromkeys(walk(e))]


# ---- spaces -----------------------------------------------------------------------------------------------------------------------------


def exact_pairs() -> list[tuple[str, AxisMap]]:
    found: list[tuple[str, AxisMap]] = []
    for size, target, copies in ((4, 4, 1), (4, 8, 2), (4, 9, 2), (4, 7, 1), (4, 12, 2), (3, 10, 3)):
        for mode in ("scale", "eps"):
            hidden = activation_maps.tiled_hidden(size, target, copies, mode=mode)
            found += [(f"{size}-{target}-{copies}-{mode}-{s.name}", s.map) for s in (hidden.residual, hidden.normed)]
    for null in (True, False):
        found += [(f"ffn-{t}-{null}", activation_maps.ffn_space("inter", 5, t, null=null).map) for t in (5, 7, 10, 13)]
        for heads in ((6, 2, 12, 4), (6, 2, 8, 4), (6, 2, 9, 3), (8, 2, 8, 4), (6, 1, 8, 2), (6, 3, 15, 5)):
            for head_dim in (4, 6, 8):
                for normed in (True, False):
                    grown = head_spaces(*heads, head_dim_space(4, head_dim, normed=normed), null=null)
                    found.append((f"{heads}-{head_dim}-{normed}-{null}-attended", grown.attended.map))
                    if head_dim == 4:
                        found += [(f"{heads}-{null}-{s.name}", s.map) for s in (grown.query, grown.stored)]
    return found


@pytest.mark.parametrize(("name", "axis"), exact_pairs(), ids=lambda v: v if isinstance(v, str) else "")
def test_every_space_is_a_dual_pair(name: str, axis: AxisMap) -> None:
    """B^T A = I, computed with matrices."""
    a, b = (torch.zeros(axis.target_size, axis.source_size, dtype=torch.float64) for _ in range(2))
    for i, (source, gain, dual) in enumerate(axis.rows()):
        if source is not None:
            a[i, source], b[i, source] = gain, dual
    torch.testing.assert_close(b.T @ a, torch.eye(axis.source_size, dtype=torch.float64), rtol=0, atol=1e-12)
    assert axis.is_exact()
