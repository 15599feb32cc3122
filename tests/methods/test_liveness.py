"""What growth adds must learn: every new entry gets a gradient, and copies do not stay copies unless that was asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from grown import grown_by, growth_of
from models import BY_NAME, CASES, Case, each_case, make, on_disk
from torch import Tensor
from transformers import PreTrainedModel

WAYS: dict[str, dict[str, Any]] = {
    "odd sizes": {"hidden": 60, "heads": 10, "kv_heads": 2, "intermediate": 52},
    "odd sizes by eps": {"hidden": 60, "heads": 10, "kv_heads": 2, "intermediate": 52, "rms_mode": "eps"},
    "copies and zeros": {"hidden": 120, "heads": 12, "kv_heads": 4, "intermediate": 100, "symmetry": "split"},
    "padded": {"method": "pad", "hidden": 96, "heads": 12, "kv_heads": 4},
    "null heads and units": {"hidden": 96, "heads": 8, "kv_heads": 2, "new_heads": "null", "intermediate": 52, "ffn": "null"},
    "equal copies": {"factor": 2, "symmetry": "none"},
    "head_dim by a whole factor": {"head_dim": 24},
    "head_dim by theta": {"head_dim": 18, "intermediate": 60},
    "aki": {"method": "aki", "hidden": 72, "heads": 9, "kv_heads": 3, "intermediate": 60},
    "lossless aki": {"method": "aki", "hidden": 96, "heads": 12, "kv_heads": 4, "intermediate": 60, "lossless": True},
}


def grow(model: PreTrainedModel, **options: Any) -> PreTrainedModel:
    if "heads" in options and model.config.num_key_value_heads == model.config.num_attention_heads:
        options |= {"heads": 12, "kv_heads": 12}
    return grown_by(model, options.pop("method", "tile"), **options)


def batch(step: int) -> Tensor:
    """Six orders of the whole vocabulary: no row of the embedding stays out."""
    return torch.stack([torch.randperm(64, generator=torch.Generator().manual_seed(100 * step + i)) for i in range(6)])


def dead(model: PreTrainedModel, steps: int = 4) -> dict[str, Tensor]:
    """The entries of each parameter that never got a gradient in some steps of training."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    never = {n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters()}
    for step in range(steps):
        optimizer.zero_grad()
        model(batch(step), labels=batch(step), use_cache=False).loss.backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                never[name] &= p.grad == 0
        optimizer.step()
    return {n: entries for n, entries in never.items() if entries.any()}


EVERYWHERE = ("odd sizes", "null heads and units")  # the others on the cases that can tell something
TELLING = ("llama-tied", "llama-bias", "mixtral", "qwen2", "qwen3-bias")
POSSIBLE = [(c, w) for c in CASES for w in WAYS if not ("qwen3" in c.family and ("eps" in w or "head_dim" in w))]
LIVE = [(c, w) for c, w in POSSIBLE if c.name in TELLING or w in EVERYWHERE]


@pytest.mark.parametrize(("case", "way"), LIVE, ids=str)
def test_every_parameter_of_the_grown_model_learns(case: Case, way: str) -> None:
    assert not dead(grow(make(case), **WAYS[way]))


@pytest.mark.slow
@pytest.mark.parametrize(("case", "way"), [pair for pair in POSSIBLE if pair not in LIVE], ids=str)
def test_every_parameter_of_the_grown_model_learns_in_every_combination(case: Case, way: str) -> None:
    assert not dead(grow(make(case), **WAYS[way]))


@pytest.mark.parametrize("head_dim", [18, 24])
@pytest.mark.parametrize("name", ["qwen3", "qwen3-bias", "qwen3_moe"])
def test_under_a_norm_over_head_dim_new_coordinates_of_queries_and_keys_alone_do_not_learn(name: str, head_dim: int) -> None:
    """The exception: random queries would change the norm, and zero ones leave zero keys without a gradient. Values and o_proj do learn."""
    model = make(BY_NAME[name])
    found = dead(grown_by(model, "tile", head_dim=head_dim))
    assert {n.split("self_attn.")[1].split(".")[0] for n in found} == {"q_proj", "k_proj", "q_norm", "k_norm"}
    for entries in found.values():
        by_head = entries.flatten(1).all(1) if entries.dim() > 1 else entries
        assert by_head.sum() * head_dim == len(by_head) * (head_dim - 12)  # only those that are new
    warnings = growth_of(model.config.to_dict(), "tile", head_dim=head_dim).warnings
    assert any("norm over head_dim" in w for w in warnings)


def test_a_dead_parameter_would_be_found() -> None:
    """Gate, up and down of a unit all zero: nothing ever reaches it."""
    model = grow(make(BY_NAME["llama"]), **WAYS["null heads and units"])
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight[40:] = 0
            layer.mlp.up_proj.weight[40:] = 0
    assert len(dead(model)) == 12


# ---- copies -----------------------------------------------------------------------------------------------------------------------------


def copies_apart(name: str, **options: Any) -> dict[str, float]:
    """Relative distance of the two copies after 30 steps of AdamW, in every dimension of every tensor that was doubled.

    In exact arithmetic, and with an eps that does not make steps of gradients that are nothing but rounding: so few steps then end at the same
    weights on every processor, to many digits.
    """
    model = make(BY_NAME[name], dtype=torch.float64)
    grown, old = grown_by(model, "tile", **options), on_disk(model)
    optimizer = torch.optim.AdamW(grown.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, eps=1e-4)
    for step in range(30):
        optimizer.zero_grad()
        grown(batch(step), labels=batch(step), use_cache=False).loss.backward()
        optimizer.step()
    found = {}
    for name, tensor in on_disk(grown).items():
        for dim in range(tensor.dim()):
            if tensor.shape[dim] == 2 * old[name].shape[dim]:
                one, other = tensor.chunk(2, dim)
                found[f"{name}:{dim}"] = ((one - other).norm() / one.norm()).item()
    return found


SEPARATED = ("qwen2-tied", "mixtral")
UNITS = {"intermediate": 80, "ffn": "copies"}


@pytest.mark.parametrize("options", [{"factor": 2}, UNITS], ids=["everything", "ffn"])
@pytest.mark.parametrize("name", SEPARATED)
def test_equal_copies_stay_equal_for_good(name: str, options: dict[str, Any], exact_math: None) -> None:
    distances = copies_apart(name, symmetry="none", **options)
    assert distances
    assert max(distances.values()) < 1e-9


@pytest.mark.parametrize("symmetry", ["noise", "split"])
@pytest.mark.parametrize("name", SEPARATED)
def test_copies_told_apart_at_growth_learn_different_things_everywhere(name: str, symmetry: str, exact_math: None) -> None:
    distances = copies_apart(name, symmetry=symmetry, factor=2)
    assert min(distances.values()) > 1e-4


@pytest.mark.parametrize("symmetry", ["noise", "split"])
@pytest.mark.parametrize("name", SEPARATED)
def test_rows_that_growth_left_equal_learn_to_differ_because_their_readers_do(name: str, symmetry: str, exact_math: None) -> None:
    """FFN copies: growth tells only columns of down_proj apart; the rows of gate and up, equal at first, follow."""
    rows = {n: d for n, d in copies_apart(name, symmetry=symmetry, **UNITS).items() if n.endswith(":0")}
    assert rows
    assert min(rows.values()) > 3e-3


@each_case
def test_lemon_and_tile_tell_copies_apart_unless_told_otherwise(case: Case) -> None:
    for method in ("tile", "lemon"):
        grown = on_disk(grown_by(make(case), method, factor=2))
        columns = [t for n, t in grown.items() if t.dim() == 2 and "embed" not in n]
        assert all(not torch.equal(*t.chunk(2, 1)) for t in columns)


# ---- sizes of what is random --------------------------------------------------------------------------------------------------------------

WIDE = {"hidden_size": 96, "intermediate_size": 96}


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("strength", [0.1, 0.5])
@pytest.mark.parametrize("symmetry", ["noise", "split"])
def test_strength_is_the_size_of_what_tells_copies_apart(symmetry: str, strength: float, factor: int) -> None:
    """Noise: its spread over that of the shared weights. Split: the spread of the factor on each weight."""
    model = make(BY_NAME["mistral"], dtype=torch.float64, **WIDE)
    plain = on_disk(grown_by(model, "tile", factor=factor, symmetry="none"))
    apart = on_disk(grown_by(model, "tile", factor=factor, symmetry=symmetry, strength=strength))
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight", "lm_head.weight"):
        change = apart[name] - plain[name]
        found = change.std() / plain[name].std() if symmetry == "noise" else (change / plain[name]).std()
        assert found == pytest.approx(strength, rel=0.05), name


def test_random_values_have_the_spread_of_the_old_weights_at_the_new_fan_in() -> None:
    model = make(BY_NAME["mistral"], **WIDE)
    grown, old = on_disk(grown_by(model, "tile", hidden=144, intermediate=160, ffn="null")), on_disk(model)
    for name, part in (
        ("model.layers.0.mlp.up_proj.weight", (slice(96, None), slice(None))),  # new units
        ("model.layers.0.mlp.gate_proj.weight", (slice(None, 96), slice(96, None))),  # old units reading new coordinates
        ("model.layers.1.self_attn.k_proj.weight", (slice(None), slice(96, None))),
        ("lm_head.weight", (slice(None), slice(96, None))),
    ):
        assert grown[name][part].std() / old[name].std() == pytest.approx((96 / 144) ** 0.5, rel=0.1), name
