"""Llama (and the many models stored as it)."""

from __future__ import annotations

from hf_grow.model.families.shared import ATTENTION, DEFAULTS, EMBEDDING, FFN, HEAD, NORMS, QKVO_BIAS, block_rows
from hf_grow.model.family import Family

_FFN_BIAS = {"mlp.gate_proj.bias": "out:inter", "mlp.up_proj.bias": "out:inter", "mlp.down_proj.bias": "out:hidden"}

LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    EMBEDDING + NORMS + ATTENTION + QKVO_BIAS + block_rows(FFN) + block_rows(_FFN_BIAS, when="mlp_bias") + HEAD,
    {**DEFAULTS, "num_key_value_heads": None, "attention_bias": False, "mlp_bias": False, "rms_norm_eps": 1e-6},
    heads_divide_hidden=True,
)
