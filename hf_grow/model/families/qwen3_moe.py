"""Qwen3-MoE: Qwen3 with experts; config.json calls their number num_experts or num_local_experts."""

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
    QK_NORM,
    QKVO_BIAS,
    block_rows,
)
from hf_grow.model.family import Family

QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    EMBEDDING + NORMS + ATTENTION + QK_NORM + QKVO_BIAS + block_rows(FFN, when="dense") + block_rows(EXPERTS, when="sparse") + HEAD,
    {
        **DEFAULTS,
        "num_key_value_heads": 4,
        "attention_bias": False,
        "rms_norm_eps": 1e-6,
        "moe_intermediate_size": 768,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "num_local_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    aliases={"num_experts": "num_local_experts"},
    fused=FUSED_EXPERTS,
    sliding="window_if_used",
)
