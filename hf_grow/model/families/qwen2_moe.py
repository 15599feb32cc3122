"""Qwen2-MoE: Qwen2 with experts and one shared expert that every token passes."""

from __future__ import annotations

from hf_grow.model.families.shared import (
    ATTENTION,
    DEFAULTS,
    EMBEDDING,
    EXPERTS,
    FFN,
    FUSED_EXPERTS,
    HEAD,
    NORMS,
    QKV_BIAS,
    block_rows,
)
from hf_grow.model.family import Family

_SHARED_EXPERT = {
    "mlp.shared_expert.gate_proj.weight": "out:shared_inter in:hidden",
    "mlp.shared_expert.up_proj.weight": "out:shared_inter in:hidden",
    "mlp.shared_expert.down_proj.weight": "out:hidden in:shared_inter",
    "mlp.shared_expert_gate.weight": "out:one in:hidden",
}

QWEN2_MOE = Family(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    EMBEDDING
    + NORMS
    + ATTENTION
    + block_rows(QKV_BIAS, when="qkv_bias")
    + block_rows(FFN, when="dense")
    + block_rows({**EXPERTS, **_SHARED_EXPERT}, when="sparse")
    + HEAD,
    {
        **DEFAULTS,
        "num_key_value_heads": 16,
        "qkv_bias": True,
        "rms_norm_eps": 1e-6,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "max_window_layers": 28,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    sizes={"experts": "num_experts"},
    fused=FUSED_EXPERTS,
    sliding="window_alternating",
)
