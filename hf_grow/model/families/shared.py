"""Tensor rows and config defaults that several families have in common."""

from __future__ import annotations

from collections.abc import Mapping

from hf_grow.model.family import TensorSpec, rows

_BLOCK = "model.layers.{layer}."


def block_rows(table: Mapping[str, str], *, when: str = "") -> tuple[TensorSpec, ...]:
    """Rows of a decoder block, from names relative to it."""
    return rows({_BLOCK + name: dims for name, dims in table.items()}, when=when)


def block_fused(table: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """`Family.fused` from names relative to a block."""
    return {_BLOCK + name: tuple(_BLOCK + part for part in parts) for name, parts in table.items()}


DEFAULTS = {"tie_word_embeddings": False, "head_dim": None, "rope_theta": 10000.0}

EMBEDDING = rows({"model.embed_tokens.weight": "in:vocab out:hidden"})
HEAD = rows({"model.norm.weight": "norm:hidden"}) + rows({"lm_head.weight": "out:vocab in:hidden"}, when="untied")
NORMS = block_rows({"input_layernorm.weight": "norm:hidden", "post_attention_layernorm.weight": "norm:hidden"})
ATTENTION = block_rows(
    {
        "self_attn.q_proj.weight": "out:kv*group*head_dim in:hidden",
        "self_attn.k_proj.weight": "out:kv*head_dim in:hidden",
        "self_attn.v_proj.weight": "out:kv*head_dim in:hidden",
        "self_attn.o_proj.weight": "out:hidden in:kv*group*head_dim",
    }
)
QKV_BIAS = {
    "self_attn.q_proj.bias": "out:kv*group*head_dim",
    "self_attn.k_proj.bias": "out:kv*head_dim",
    "self_attn.v_proj.bias": "out:kv*head_dim",
}
QKVO_BIAS = block_rows({**QKV_BIAS, "self_attn.o_proj.bias": "out:hidden"}, when="attention_bias")
QK_NORM = block_rows({"self_attn.q_norm.weight": "norm:head_dim", "self_attn.k_norm.weight": "norm:head_dim"})
FFN = {
    "mlp.gate_proj.weight": "out:inter in:hidden",
    "mlp.up_proj.weight": "out:inter in:hidden",
    "mlp.down_proj.weight": "out:hidden in:inter",
}
EXPERTS = {
    "mlp.gate.weight": "out:experts in:hidden",
    "mlp.experts.{expert}.gate_proj.weight": "out:expert_inter in:hidden",
    "mlp.experts.{expert}.up_proj.weight": "out:expert_inter in:hidden",
    "mlp.experts.{expert}.down_proj.weight": "out:hidden in:expert_inter",
}
FUSED_EXPERTS = block_fused(
    {
        "mlp.experts.gate_up_proj": ("mlp.experts.{expert}.gate_proj.weight", "mlp.experts.{expert}.up_proj.weight"),
        "mlp.experts.down_proj": ("mlp.experts.{expert}.down_proj.weight",),
    }
)
