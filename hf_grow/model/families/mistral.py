"""Mistral: grouped-query attention with a sliding window."""

from __future__ import annotations

from hf_grow.model.families.shared import ATTENTION, DEFAULTS, EMBEDDING, FFN, HEAD, NORMS, block_rows
from hf_grow.model.family import Family

MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    EMBEDDING + NORMS + ATTENTION + block_rows(FFN) + HEAD,
    {**DEFAULTS, "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "sliding_window": 4096},
    sliding="window",
)
