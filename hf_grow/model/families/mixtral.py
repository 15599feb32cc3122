"""Mixtral: Mistral with a mixture of experts in every block, under names of its own."""

from __future__ import annotations

from hf_grow.model.families.shared import ATTENTION, DEFAULTS, EMBEDDING, HEAD, NORMS, block_fused, block_rows
from hf_grow.model.family import Family

_EXPERTS = {
    "block_sparse_moe.gate.weight": "out:experts in:hidden",
    "block_sparse_moe.experts.{expert}.w1.weight": "out:expert_inter in:hidden",
    "block_sparse_moe.experts.{expert}.w2.weight": "out:hidden in:expert_inter",
    "block_sparse_moe.experts.{expert}.w3.weight": "out:expert_inter in:hidden",
}
_FUSED = {
    "mlp.gate.weight": ("block_sparse_moe.gate.weight",),
    "mlp.experts.gate_up_proj": ("block_sparse_moe.experts.{expert}.w1.weight", "block_sparse_moe.experts.{expert}.w3.weight"),
    "mlp.experts.down_proj": ("block_sparse_moe.experts.{expert}.w2.weight",),
}

MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    EMBEDDING + NORMS + ATTENTION + block_rows(_EXPERTS, when="sparse") + HEAD,
    {
        **DEFAULTS,
        "rope_theta": 1e6,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    sizes={"expert_inter": "intermediate_size"},
    fused=block_fused(_FUSED),
    sliding="window",
)
