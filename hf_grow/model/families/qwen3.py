"""Qwen3: norms over head_dim on queries and keys."""

from __future__ import annotations

from hf_grow.model.families.shared import ATTENTION, DEFAULTS, EMBEDDING, FFN, HEAD, NORMS, QK_NORM, QKVO_BIAS, block_rows
from hf_grow.model.family import Family

QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    EMBEDDING + NORMS + ATTENTION + QK_NORM + QKVO_BIAS + block_rows(FFN) + HEAD,
    {
        **DEFAULTS,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "attention_bias": False,
        "rms_norm_eps": 1e-6,
        "max_window_layers": 28,
        "use_sliding_window": False,
        "sliding_window": 4096,
    },
    sliding="window_after_first",
)
