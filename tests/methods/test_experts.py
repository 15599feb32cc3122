"""Experts against plain references: what upcycling copies, shards and redraws, and when the function stays the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from exact import logits
from models import BY_NAME, make, on_disk, save, tokens
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_grow import api
from hf_grow.checkpoint.provenance import format_growth_json
from hf_grow.convert.in_memory import disk_tensors, grow_model
from hf_grow.errors import InputError, PlanError
from hf_grow.growth.evaluate import Evaluator
from hf_grow.growth.plan import GrowthPlan, make_plan
from hf_grow.growth.source_info import SourceInfo, TensorInfo
from hf_grow.growth.tensormap import Quantity
from hf_grow.growth.tensors import InMemoryTensors
from hf_grow.methods import METHODS
from hf_grow.model.architecture import Architecture
from hf_grow.model.param_count import count_parameters

DENSE = ["llama", "llama-tied", "llama-multi-head", "mistral", "mistral-tied", "qwen2", "qwen2-tied", "qwen3", "qwen3-tied", "qwen3-bias"]
MOE = ["mixtral", "mixtral-tied", "qwen2_moe", "qwen2_moe-mixed", "qwen3_moe", "qwen3_moe-tied", "qwen3_moe-mixed", "qwen3_moe-bias"]
PARTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def grown(model: PreTrainedModel, **options: Any) -> PreTrainedModel:
    return grow_model(model, api.plan(model, "experts", **options))


def both(model: PreTrainedModel, **options: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return disk_tensors(model), disk_tensors(grown(model, **options))


def experts_of(tensors: dict[str, Tensor], layer: int, part: str, count: int) -> list[Tensor]:
    """One matrix of every expert of a layer, by the dense name of the matrix."""
    names = [f"model.layers.{layer}.{n}.weight" for e in range(count) for n in
             (f"block_sparse_moe.experts.{e}.{next(k for k, v in PARTS.items() if v == part)}", f"mlp.experts.{e}.{part}")]  # fmt: skip
    return [tensors[n] for n in names if n in tensors]


def router_of(tensors: dict[str, Tensor], layer: int) -> Tensor:
    return tensors.get(f"model.layers.{layer}.block_sparse_moe.gate.weight", tensors.get(f"model.layers.{layer}.mlp.gate.weight"))


LOSSLESS = {
    "copy": {"experts": 8, "top_k": 2},
    "copy top 1": {"experts": 3, "top_k": 1},
    "copy all": {"experts": 4, "top_k": 4},
    "copy zeros": {"experts": 4, "router": "zeros"},
    "fine-grained 2": {"experts": 8, "init": "fine-grained"},
    "fine-grained 4": {"experts": 16, "init": "fine-grained", "shards": 4, "top_k": 8},
}


@pytest.mark.parametrize("way", LOSSLESS)
@pytest.mark.parametrize("name", DENSE)
def test_lossless_upcycling_keeps_the_logits(name: str, way: str, exact_math: None) -> None:
    model = make(BY_NAME[name], dtype=torch.float64)
    plan = api.plan(model, "experts", **LOSSLESS[way])
    assert plan.guarantee.lossless
    ids = tokens(model)
    after = logits(grow_model(model, plan), ids)
    assert (after - logits(model, ids)).abs().max() < 1e-10


@pytest.mark.parametrize("options", [{"experts": 4, "init": "noise", "noise": 0.1}, {"experts": 4, "init": "drop"}], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen3-tied"])
def test_other_inits_say_that_they_change_the_function_and_do(name: str, options: dict[str, Any], exact_math: None) -> None:
    model = make(BY_NAME[name], dtype=torch.float64)
    plan = api.plan(model, "experts", **options)
    assert not plan.guarantee.lossless
    ids = tokens(model)
    assert (logits(grow_model(model, plan), ids) - logits(model, ids)).abs().max() > 1e-3


@pytest.mark.parametrize("times", [2, 3])
@pytest.mark.parametrize("name", MOE)
def test_more_experts_with_as_many_times_top_k_keep_the_logits(name: str, times: int, exact_math: None) -> None:
    model = make(BY_NAME[name], dtype=torch.float64)
    arch = Architecture(model.config.to_dict())
    plan = api.plan(model, "experts", experts=times * arch.size("experts"), top_k=times * arch.top_k)
    assert plan.guarantee.lossless
    ids = tokens(model)
    assert (logits(grow_model(model, plan), ids) - logits(model, ids)).abs().max() < 1e-10


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_more_experts_at_the_same_top_k_change_the_function_and_the_plan_says_what_would_not(name: str, exact_math: None) -> None:
    model = make(BY_NAME[name], dtype=torch.float64)
    plan = api.plan(model, "experts", experts=6)
    assert not plan.guarantee.lossless
    assert "--experts 8 --top-k 4" in plan.guarantee.because
    ids = tokens(model)
    assert (logits(grow_model(model, plan), ids) - logits(model, ids)).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["llama", "mistral-tied", "qwen3"])
def test_copies_are_the_ffn_and_all_else_is_untouched(name: str) -> None:
    old, new = both(make(BY_NAME[name]), experts=3)
    for layer in range(4):
        for part in PARTS.values():
            found = experts_of(new, layer, part, 3)
            assert len(found) == 3
            assert all(torch.equal(e, old[f"model.layers.{layer}.mlp.{part}.weight"]) for e in found)
    rest = {n for n in old if ".mlp." not in n}
    assert all(torch.equal(new[n], old[n]) for n in rest)
    routers = torch.stack([router_of(new, i) for i in range(4)])
    assert routers.std().item() == pytest.approx(0.02, rel=0.15)
    assert not torch.equal(routers[0], routers[1])


def test_fine_grained_experts_are_shards_with_down_times_their_number_and_equal_rows_a_group() -> None:
    old, new = both(make(BY_NAME["llama"]), experts=8, init="fine-grained", shards=4)
    inter = old["model.layers.0.mlp.up_proj.weight"].shape[0] // 4
    for e in range(8):
        rows = slice(e % 4 * inter, (e % 4 + 1) * inter)
        assert torch.equal(experts_of(new, 2, "up_proj", 8)[e], old["model.layers.2.mlp.up_proj.weight"][rows])
        assert torch.equal(experts_of(new, 2, "down_proj", 8)[e], 4 * old["model.layers.2.mlp.down_proj.weight"][:, rows])
    router = router_of(new, 2)
    assert all(torch.equal(router[g * 4], router[g * 4 + s]) for g in range(2) for s in range(4))
    assert not torch.equal(router[0], router[4])


def test_drop_redraws_one_set_of_units_in_all_three_matrices_from_what_it_replaces() -> None:
    """Drop-Upcycling, written plainly: floor(r I) units an expert; the rest equal; the redrawn ones with mean and spread of the replaced ones."""
    model = make({**BY_NAME["llama"].config, "hidden_size": 96, "intermediate_size": 1000})
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.add_(0.3)  # a mean that is not zero
    old, new = both(model, experts=4, init="drop", drop=0.3)
    sets = []
    for e in range(4):
        gone = {}
        for part in PARTS.values():
            before, after = old[f"model.layers.1.mlp.{part}.weight"], experts_of(new, 1, part, 4)[e]
            before, after = (before.T, after.T) if part == "down_proj" else (before, after)
            changed = (before != after).any(1)
            gone[part] = changed.nonzero().flatten().tolist()
            assert len(gone[part]) == 300
            assert after[changed].std().item() == pytest.approx(before[changed].std().item(), rel=0.03)
            assert after[changed].mean().item() == pytest.approx(before[changed].mean().item(), abs=0.01)
            assert not (before[changed] == after[changed]).any()
        assert gone["gate_proj"] == gone["up_proj"] == gone["down_proj"]
        sets.append(tuple(gone["up_proj"]))
    assert len(set(sets)) == 4


@pytest.mark.parametrize("quantity", ["weight", "grad", "grad2"])
def test_redrawn_units_do_not_depend_on_the_blocks_they_are_computed_in(quantity: Quantity) -> None:
    model = make(BY_NAME["llama"], num_hidden_layers=1)
    plan = api.plan(model, "experts", experts=2, init="drop", drop=0.6)
    evaluator = Evaluator(plan, InMemoryTensors(on_disk(model)), quantity)
    for name in (n for n in plan.targets if "experts" in n):
        expr, size = plan.growth.tensors[name], plan.targets[name].shape[0]
        whole = evaluator.rows(expr, 0, size)
        for step in (1, 5):
            parts = [evaluator.rows(expr, at, min(at + step, size)) for at in range(0, size, step)]
            assert torch.equal(torch.cat(parts), whole), name


def test_a_plan_of_redrawn_units_is_small_at_the_shapes_of_mixtral_8x7b() -> None:
    """Index sets come from the seed. Written out, those of 256 experts with 14,336 units took 89 MB, and 3 GB of memory to plan."""
    config = {
        "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    }  # fmt: skip
    source = Architecture(config)
    info = SourceInfo("m", "", config, {n: TensorInfo("BF16", e.shape) for n, e in source.tensors.items()}, {}, ())
    growth = METHODS["experts"].build(source, METHODS["experts"].options(experts=8, init="drop"), ())
    record = format_growth_json(make_plan(info, growth).to_json())
    assert len(record) < 1_000_000
    assert GrowthPlan.from_json(json.loads(record)).growth.tensors == growth.tensors


def test_noise_has_its_size() -> None:
    old, new = both(make({**BY_NAME["mistral"].config, "hidden_size": 96, "intermediate_size": 500}), experts=2, init="noise", noise=0.05)
    source = old["model.layers.0.mlp.up_proj.weight"]
    a, b = (e - source for e in experts_of(new, 0, "up_proj", 2))
    assert (a.std() / source.std()).item() == pytest.approx(0.05, rel=0.03)
    assert (a * b).mean().abs() < 0.05 * a.var()


def test_chosen_experts_are_copied_with_their_router_rows() -> None:
    old, new = both(make(BY_NAME["mixtral"]), experts=7, copy_from="2,0")
    assert [old["model.layers.0.block_sparse_moe.gate.weight"][i].tolist() for i in (0, 1, 2, 3, 2, 0, 2)] == router_of(new, 0).tolist()
    for e, origin in enumerate((0, 1, 2, 3, 2, 0, 2)):
        assert torch.equal(experts_of(new, 3, "down_proj", 7)[e], experts_of(old, 3, "down_proj", 4)[origin])


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "mixtral", "qwen3_moe-mixed"])
@pytest.mark.parametrize("init", ["copy", "noise", "drop", "fine-grained"])
def test_disk_and_memory_agree_and_transformers_finds_every_tensor(name: str, init: str, tmp_path: Path) -> None:
    model = make(BY_NAME[name], dtype=torch.bfloat16)
    if name in MOE and init in ("drop", "fine-grained"):
        init = "copy"
    options = {"experts": 8, "init": init}
    source = save(model, tmp_path / "source", sharded=True)
    api.grow(source, tmp_path / "out", "experts", max_shard_size=100_000, **options)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    on_disk, in_memory = disk_tensors(loaded), disk_tensors(grown(model, **options))
    assert on_disk.keys() == in_memory.keys()
    assert all(torch.equal(on_disk[n], in_memory[n]) for n in on_disk)
    assert api.verify(source, tmp_path / "out").ok


def test_the_config_keeps_what_the_families_default_differently(tmp_path: Path) -> None:
    for name, window in (("llama", None), ("mistral", 4096), ("mistral-tied", 4)):
        model = make(BY_NAME[name])
        config = grown(model, experts=4).config
        assert config.rms_norm_eps == model.config.rms_norm_eps
        assert config.rope_parameters == model.config.rope_parameters
        assert config.sliding_window == window
        assert config.tie_word_embeddings == model.config.tie_word_embeddings
        assert config.head_dim == Architecture(model.config.to_dict()).size("head_dim")
        assert config.router_aux_loss_coef == 0.01


def test_a_window_that_the_family_of_the_source_ignores_is_none() -> None:
    growth = api.find_method("experts").build(
        Architecture({**BY_NAME["llama"].config, "sliding_window": 4}), api.find_method("experts").options(experts=4)
    )
    assert growth.config["sliding_window"] is None


def test_a_size_gives_the_number_of_experts() -> None:
    model = make(BY_NAME["llama"])
    eight = api.plan(model, "experts", experts=8).sizes[1]
    plan = api.plan(model, "experts", to=eight.total + 100)
    assert plan.sizes[1] == eight
    mixture = make(BY_NAME["mixtral"])
    wanted = api.plan(mixture, "experts", experts=9).sizes[1].total
    assert api.plan(mixture, "experts", to=wanted).architecture.size("experts") == 9


def test_mistral_7b_with_eight_experts_has_the_published_size_of_mixtral() -> None:
    config = {"model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
              "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5}  # fmt: skip
    growth = api.find_method("experts").build(Architecture(config), api.find_method("experts").options(experts=8))
    size = count_parameters(Architecture(growth.config))
    assert size.total == 46_702_792_704
    assert round(size.active / 1e9, 1) == 12.7  # 12.9B with the embedding table


REFUSED = {
    "nothing asked": ("llama", {}, "One of|one of"),
    "both asked": ("llama", {"experts": 4, "to": "1M"}, "one of"),
    "top_k": ("llama", {"experts": 4, "top_k": 5}, "at most"),
    "top_k of groups": ("llama", {"experts": 8, "init": "fine-grained", "top_k": 3}, "multiple of the 2 shards"),
    "shards": ("llama", {"experts": 9, "init": "fine-grained"}, "must divide"),
    "shards of copies": ("llama", {"experts": 8, "shards": 2}, "fine-grained"),
    "biases": ("llama-bias", {"experts": 4}, "has no biases"),
    "utility of another": ("mixtral", {"add": 2, "utility": [1, 2]}, "must hold 4 numbers"),
    "two origins": ("mixtral", {"add": 2, "utility": [1, 2, 3, 4], "copy_from": "0"}, "give one"),
    "add to dense": ("llama", {"add": 2}, "applies to MoE"),
    "router of copies": ("mixtral", {"add": 2, "router": "zeros"}, "keep the router rows"),
    "prompts for nothing": ("llama", {"experts": 2, "prompts": {"experts": [{"positive": ["a"]}, {"positive": ["b"]}]}}, "does not apply"),
    "noise of copies": ("llama", {"experts": 4, "noise": 0.1}, "requires --init noise"),
    "drop of copies": ("llama", {"experts": 4, "drop": 0.1}, "requires --init drop"),
    "no shared expert": ("llama", {"experts": 4, "shared_expert": "zero"}, "shared expert"),
    "pooling of noise": ("llama", {"experts": 4, "prompt_pooling": "last"}, "requires --router prompts"),
    "no prompts": ("llama", {"experts": 2, "router": "prompts"}, "needs --prompts"),
    "prompts of another number": (
        "llama",
        {"experts": 3, "router": "prompts", "prompts": {"experts": [{"positive": ["a"]}, {"positive": ["b"]}]}},
        "for 2 experts",
    ),
    "weights of one": ("llama", {"experts": 2, "weights": [1, 2]}, "several checkpoints"),
    "too many at right angles": ("llama", {"experts": 64, "router": "orthogonal"}, "all be orthogonal"),
    "window": ("qwen3-window", {"experts": 4}, "sliding window"),
    "copy_from dense": ("llama", {"experts": 4, "copy_from": "0"}, "dense"),
    "copy_from": ("mixtral", {"experts": 6, "copy_from": "4"}, "experts 0-3"),
    "drop in a mixture": ("mixtral", {"experts": 8, "init": "drop"}, "dense FFN"),
    "fewer": ("mixtral", {"experts": 3}, "is not a growth"),
    "same": ("mixtral", {"experts": 4}, "is not a growth"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(case: str) -> None:
    name, options, words = REFUSED[case]
    with pytest.raises(PlanError, match=words):
        api.plan(make(BY_NAME[name]), "experts", **options)


def test_utility_copies_the_most_useful_layer_by_layer(tmp_path: Path) -> None:
    """By hand: seats in turn to whom has most for each of its copies. Layer 0: 8, 3, 1, 1 -> 0 (8), 0 (4); layer 3: all equal -> 0, 1."""
    file = tmp_path / "utility.json"
    file.write_text('{"utility": [[8, 3, 1, 1], [1, 8, 5, 1], [0, 0, 0, 2], [1, 1, 1, 1]]}')
    model = make(BY_NAME["mixtral"])
    old, new = both(model, add=2, utility=str(file))
    for layer, chosen in enumerate([(0, 0), (1, 2), (3, 3), (0, 1)]):
        wanted = router_of(old, layer)[[0, 1, 2, 3, *chosen]]
        assert torch.equal(router_of(new, layer), wanted)
        for at, origin in enumerate(chosen):
            assert torch.equal(experts_of(new, layer, "up_proj", 6)[4 + at], experts_of(old, layer, "up_proj", 4)[origin])
    with pytest.raises(InputError, match=r"none\.json is missing"):
        api.plan(model, "experts", add=1, utility=str(tmp_path / "none.json"))


def test_router_noise_moves_only_the_copied_rows() -> None:
    old, new = both(make(BY_NAME["mixtral"]), add=4, router_noise=0.1)
    before, after = router_of(old, 1), router_of(new, 1)
    assert torch.equal(after[:4], before)
    moved = (after[4:] - before) / before.std()
    assert moved.std().item() == pytest.approx(0.1, rel=0.2)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_an_orthogonal_router_has_rows_at_right_angles(name: str) -> None:
    _, new = both(make(BY_NAME[name]), experts=4, router="orthogonal", router_std=0.05)
    for layer in range(4):
        rows = router_of(new, layer).double()
        gram = rows @ rows.T
        assert torch.allclose(gram, torch.eye(4, dtype=torch.float64) * 0.05**2 * 48, atol=1e-7)
    assert not torch.equal(router_of(new, 0), router_of(new, 1))


def test_the_shared_expert_is_half_of_the_ffn_or_nothing_yet() -> None:
    model = make(BY_NAME["qwen2"])
    old = disk_tensors(model)
    for shared, share in (("half", 0.5), ("zero", 1.0)):
        new = disk_tensors(grown(model, experts=3, shared_expert=shared))
        ffn = old["model.layers.1.mlp.down_proj.weight"]
        assert all(torch.equal(e, share * ffn) for e in experts_of(new, 1, "down_proj", 3))
        assert torch.equal(new["model.layers.1.mlp.shared_expert.down_proj.weight"], ffn if shared == "half" else torch.zeros_like(ffn))
        assert torch.equal(new["model.layers.1.mlp.shared_expert.up_proj.weight"], old["model.layers.1.mlp.up_proj.weight"])
        assert not new["model.layers.1.mlp.shared_expert_gate.weight"].any()


def test_an_active_size_chooses_top_k() -> None:
    arch = Architecture(make(BY_NAME["llama"]).config.to_dict())
    search = api.find_method("experts").for_size
    wanted = count_parameters(Architecture(api.plan(make(BY_NAME["llama"]), "experts", experts=8, top_k=3).growth.config))
    found = search(arch, wanted.total, wanted.active)
    assert (found.experts, found.top_k) == (8, 3)
