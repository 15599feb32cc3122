"""Qwen2: biases on q, k and v."""

from __future__ import annotations

from hf_grow.model.families.shared import ATTENTION, DEFAULTS, EMBEDDING, FFN, HEAD, NORMS, QKV_BIAS, block_rows
from hf_grow.model.family import Family

QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    EMBEDDING + NORMS + ATTENTION + block_rows(QKV_BIAS) + block_rows(FFN) + HEAD,
    {
        **DEFAULTS,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-6,
        "max_window_layers": 28,
        "use_sliding_window": False,
        "sliding_window": 4096,
    },
    sliding="window_after_first",
)
