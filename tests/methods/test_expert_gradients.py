"""Moments through experts: a share of the dense gradient where routing is even, and exactly a share where copies are chosen together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from grown import gradients, through
from models import BY_NAME, make, tokens

from hf_grow import api
from hf_grow.convert.in_memory import grow_model

EVEN: dict[str, dict[str, Any]] = {
    "copy": {"experts": 3, "top_k": 3},
    "fine-grained": {"experts": 4, "top_k": 4, "init": "fine-grained", "shards": 2},
    "shared half": {"experts": 3, "top_k": 3},
    "shared zero": {"experts": 3, "top_k": 3, "shared_expert": "zero"},
}


@pytest.mark.parametrize("way", EVEN)
def test_under_even_routing_every_expert_gets_its_share_of_the_gradient(way: str, exact_math: None) -> None:
    """All experts chosen by a router of zeros: every weight is 1/E, and the map is exact."""
    model = make(BY_NAME["qwen2" if "shared" in way else "llama"], dtype=torch.float64)
    plan = api.plan(model, "experts", router="zeros", **EVEN[way])
    ids = tokens(model)
    mapped = through(plan, gradients(model, ids), "grad")
    real = gradients(grow_model(model, plan), ids)
    checked = [n for n in mapped if ".experts." in n or "shared_expert." in n]
    assert len(checked) >= 4 * 3 * 3
    for name in checked:
        if way == "shared zero" and "shared_expert." in name:
            continue  # its down_proj is zero: the others are the whole FFN, and this gradient has no origin
        assert torch.allclose(mapped[name], real[name], atol=1e-10), name
        assert real[name].abs().max() > 1e-6
    squared = through(plan, {n: g**2 for n, g in gradients(model, ids).items()}, "grad2")
    for name in checked:
        if not (way == "shared zero" and "shared_expert." in name):
            assert torch.allclose(squared[name], real[name] ** 2, atol=1e-10), name


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_copies_chosen_together_share_the_gradient_exactly(name: str, exact_math: None) -> None:
    model = make(BY_NAME[name], dtype=torch.float64)
    plan = api.plan(model, "experts", experts=8, top_k=4)
    ids = tokens(model)
    mapped = through(plan, gradients(model, ids), "grad")
    real = gradients(grow_model(model, plan), ids)
    assert all(torch.allclose(mapped[n], real[n], atol=1e-10) for n in mapped)
    assert sum("experts" in n or "gate.weight" in n for n in mapped) > 8 * 3 * 4
