"""Counted FLOPs against torch's counter: equal, for every family, forward and backward, whatever is frozen, adapted or checkpointed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from models import BY_NAME, CASES, WINDOWED, Case, each_case, make, real_config, tokens
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import GenerationConfig

from hf_grow.model.flops import Batch, Training, causal_pairs, count_flops
from hf_grow.training.config.lora_options import LoraOptions
from hf_grow.training.param_updates.param_flops import training_of
from hf_grow.training.peft.lora import add_lora

ROWS, LENGTH = 2, 12  # those of `tokens`; longer than the windows of CASES
aten = torch.ops.aten
ON_CPU = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **options: sdpa_flop_count(*shapes[:3]),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *shapes, **options: sdpa_backward_flop_count(*shapes[:4]),
}
"""torch's counter knows the fused kernels of accelerators only; on a CPU this one takes their place, and is counted by the same formulas."""


def counted(work: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False, custom_mapping=ON_CPU) as counter:
        work()
    return int(counter.get_total_flops())


def step(model: Any) -> int:
    ids = tokens(model).to(model.device)
    model.train()
    return counted(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss.backward())


def ours(model: Any, **changes: Any) -> tuple[int, int]:
    """Of a step: forward and backward, and what is computed again."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    flops = count_flops(base.config.to_dict(), training_of(model, **changes))
    return flops.train.rows(ROWS, LENGTH), flops.recompute.rows(ROWS, LENGTH)


@each_case
@pytest.mark.parametrize("attention", ["eager", "sdpa", "math"])
def test_forward_and_backward(case: Case, attention: str) -> None:
    """``math``: sdpa without a fused kernel does what eager does."""
    model = make(case)
    model.set_attn_implementation("eager" if attention == "eager" else "sdpa")
    ids = tokens(model)
    forward = count_flops(case.config).forward.rows(ROWS, LENGTH)
    with _kernel(attention), torch.no_grad():
        assert counted(lambda: model(input_ids=ids, use_cache=False)) == forward
    train, again = ours(model, attention="eager" if attention == "math" else attention)
    assert train == 3 * forward
    assert (again > 0) == (attention == "sdpa")
    with _kernel(attention):
        assert step(model) == train + again


def _kernel(attention: str) -> AbstractContextManager[Any]:
    return sdpa_kernel(SDPBackend.MATH) if attention == "math" else nullcontext()


@pytest.mark.parametrize(
    ("case", "attention"),
    [("llama", "eager"), ("llama", "sdpa"), ("mixtral", "sdpa"), ("qwen2_moe", "eager"), ("qwen3_moe-mixed", "eager")],
)
@pytest.mark.parametrize("trained", [
    "lm_head", "model.norm", "layers.3.", "layers.1.", "layers.0.", "layers.2.input_layernorm", "layers.2.post_attention_layernorm", "embed_tokens",
    "layers.1.self_attn.q_proj", "layers.1.self_attn.k_proj", "layers.1.self_attn.v_proj", "layers.1.self_attn.o_proj", "layers.1.mlp",
    "layers.1.mlp.down_proj", "layers.1.mlp.gate", "layers.1.mlp.experts.down_proj", "layers.1.mlp.experts.gate_up_proj",
    "layers.1.mlp.shared_expert.down_proj", "layers.1.mlp.shared_expert_gate",
])  # fmt: skip
def test_what_is_frozen(case: str, attention: str, trained: str) -> None:
    model = make(BY_NAME[case])
    model.set_attn_implementation(attention)
    for name, p in model.named_parameters():
        p.requires_grad_(trained in name)
    if not any(p.requires_grad for p in model.parameters()):
        pytest.skip(f"{case} has no {trained}")
    assert step(model) == sum(ours(model, attention=attention))


@pytest.mark.parametrize("case", ["llama-bias", "qwen2", "qwen3-bias"])
@pytest.mark.parametrize("trained", ["q_proj.bias", "v_proj.bias", "o_proj.bias", "3.mlp.down_proj.bias", "q_norm", "k_norm"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_biases_and_norms_pass_gradients_on(case: str, trained: str, checkpointed: bool) -> None:
    model = make(BY_NAME[case])
    for name, p in model.named_parameters():
        p.requires_grad_(trained in name)
    if not any(p.requires_grad for p in model.parameters()):
        pytest.skip(f"{case} has no {trained}")
    if checkpointed:
        for layer in model.model.layers:  # without transformers' gradients of the embeddings
            layer.gradient_checkpointing, layer._gradient_checkpointing_func = True, _checkpoint
    assert step(model) == sum(ours(model))


def _checkpoint(*args: Any, **kwargs: Any) -> Any:
    return torch.utils.checkpoint.checkpoint(*args, use_reentrant=False, **kwargs)


@pytest.mark.parametrize("case", ["llama-bias", "mistral-tied", "mixtral", "qwen2", "qwen2_moe-mixed", "qwen3", "qwen3_moe"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("options", [{}, {"every_n_layers": 2}, {"activation_checkpointing_kwargs": {"use_reentrant": True}}], ids=str)
def test_activation_checkpointing(case: str, attention: str, options: dict[str, Any]) -> None:
    model = make(BY_NAME[case])
    model.set_attn_implementation(attention)
    model.activation_checkpointing_enable(**options)
    train, again = ours(model, attention=attention)
    assert (train, again > 0) == (3 * count_flops(BY_NAME[case].config).forward.rows(ROWS, LENGTH), True)
    assert step(model) == train + again


@pytest.mark.parametrize("case", ["llama", "mixtral", "qwen2_moe"])
@pytest.mark.parametrize("trained", ["lm_head", "layers.3.", "layers.1.self_attn.q_proj", "layers.1.mlp"])
def test_checkpointing_of_frozen_layers(case: str, trained: str) -> None:
    """transformers lets gradients go down to the embeddings where activations are checkpointed."""
    model = make(BY_NAME[case])
    for name, p in model.named_parameters():
        p.requires_grad_(trained in name)
    model.activation_checkpointing_enable()
    assert step(model) == sum(ours(model))


@pytest.mark.parametrize("case", ["llama-bias", "mixtral", "qwen2_moe", "qwen3"])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["o_proj", "down_proj"], None], ids=str)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_lora(case: str, targets: list[str] | None, checkpointed: bool) -> None:
    """One layer trains in full."""
    model = make(BY_NAME[case])
    new = {n: ".layers.2." in n for n, _ in model.named_parameters()}
    lora = add_lora(model, LoraOptions(r=3, dropout=0.5, target_modules=targets), new)
    if checkpointed:
        lora.activation_checkpointing_enable()
    assert step(lora) == sum(ours(lora))


@pytest.mark.parametrize("case", ["mixtral", "qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize("experts", ["eager", "batched_mm"])
@pytest.mark.parametrize("routing", ["as drawn", "all to the same experts"])
def test_routing_does_not_change_the_count(case: str, experts: str, routing: str) -> None:
    """Each token is computed by top_k experts, whichever. torch's counter has no formula for the grouped_mm implementation, and counts none of it."""
    model = make(BY_NAME[case])
    model.set_experts_implementation(experts)
    if routing != "as drawn":
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith("mlp.gate.weight"):
                    p.zero_()  # topk takes the first of equal ones
    assert step(model) == sum(ours(model))


def test_grouped_mm_is_not_counted_by_torch() -> None:
    model = make(BY_NAME["mixtral"])
    model.set_experts_implementation("grouped_mm")
    flops = count_flops(model.config.to_dict())
    experts = sum(p.forward.token + p.backward.token for p in flops.products if p.part == "experts") * ROWS * LENGTH
    assert step(model) == flops.train.rows(ROWS, LENGTH) - experts


@each_case
def test_sampling(case: Case) -> None:
    model = make(case)
    ids = tokens(model)
    config = GenerationConfig(max_new_tokens=5, min_new_tokens=5, do_sample=False, use_cache=True)
    wanted = counted(lambda: model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config))
    assert count_flops(model.config.to_dict()).generation(ROWS, LENGTH, 5) == wanted


@pytest.mark.parametrize("case", [*CASES, *(c for c in WINDOWED if c not in CASES)], ids=str)
def test_sliding_windows_are_those_of_the_model(case: Case) -> None:
    """Kernels that skip masked scores compute those that transformers' mask lets through."""
    model = make(case)
    seen: list[int] = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(int((kwargs["attention_mask"][0, 0] == 0).sum())), with_kwargs=True
        )
    with torch.no_grad():
        model(input_ids=tokens(model), use_cache=False)
    flops = count_flops(case.config)
    windows = [next(iter(p.forward.pair)) for p in flops.products if p.part == "attention"]
    assert [causal_pairs(LENGTH, w) for w in windows] == seen
    batch = Batch(ROWS * LENGTH, {w: ROWS * causal_pairs(LENGTH, w) for w in flops.windows})
    width = 4 * real_config(case).num_attention_heads * model.model.layers[0].self_attn.head_dim
    masked = sum(ROWS * (LENGTH**2 - pairs) for pairs in seen)
    assert flops.forward.of(batch) == flops.forward.rows(ROWS, LENGTH) - width * masked


def test_parts_add_up() -> None:
    flops = count_flops(BY_NAME["qwen2_moe"].config, Training(checkpointed={1}))
    assert {p.part for p in flops.products} == {"projections", "attention", "router", "experts", "shared_expert", "head"}
    assert sum(p.forward.rows(1, 8) for p in flops.products) == flops.forward.rows(1, 8)
    assert {p.layer for p in flops.products if p.recompute.token} == {1}
