"""Model families that are not in the table: what keeps them out, and which one of the table is nearest. Data, for one message."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

_GPT = "it has LayerNorm with a bias and an FFN without a gate"
_STATE = "not all of its layers are attention"
_ENCODER = "it is no decoder that predicts the next token"

UNSUPPORTED: Mapping[str, tuple[str, str]] = {
    name: (why, nearest)
    for names, why, nearest in (
        ("gpt2 gpt_neo gpt_neox gptj gpt_bigcode codegen opt bloom mpt falcon phi persimmon starcoder2", _GPT, "llama"),
        ("gemma", "its norms multiply by 1 + weight, and its embeddings by a constant", "llama"),
        ("gemma2 gemma3_text", "its norms multiply by 1 + weight and stand behind attention and FFN too", "llama"),
        ("phi3 glm", "its q, k and v, or gate and up, are one matrix", "llama"),
        ("glm4", "it has norms behind attention and FFN too, and gate and up are one matrix", "llama"),
        ("internlm2 baichuan chatglm", "its q, k and v are one matrix", "llama"),
        ("stablelm cohere cohere2 nemotron olmo", "it has LayerNorm, not RMSNorm", "llama"),
        ("olmo2 olmo3", "its norms stand behind attention and FFN, not before", "llama"),
        ("granite", "it multiplies embeddings, attention, residuals and logits by constants of its own", "llama"),
        ("granitemoe", "it multiplies embeddings, attention, residuals and logits by constants of its own", "mixtral"),
        ("smollm3", "some of its layers have no rotary embedding", "llama"),
        ("llama4_text", "some of its layers have no rotary embedding, and all experts are one tensor", "mixtral"),
        ("deepseek_v2 deepseek_v3 minicpm3 longcat_flash", "it has multi-head latent attention", "qwen3_moe"),
        ("gpt_oss", "its attention has sinks, and all experts are one tensor with biases", "mixtral"),
        ("olmoe", "its q and k norms go over all heads at once", "qwen3_moe"),
        ("dbrx", "all of its experts are one tensor", "mixtral"),
        ("qwen3_next", _STATE, "qwen3_moe"),
        ("mamba mamba2 falcon_mamba rwkv recurrent_gemma jamba bamba zamba zamba2 falcon_h1 nemotron_h granitemoehybrid lfm2", _STATE, "llama"),
        ("t5 mt5 umt5 bart mbart pegasus bert roberta xlm-roberta deberta deberta-v2 electra distilbert albert modernbert", _ENCODER, "llama"),
    )
    for name in names.split()
}  # fmt: skip


def explain_unsupported(config: Mapping[str, Any], families: Collection[str]) -> tuple[str, str]:
    """Of a config whose model_type is none of ``families``: a clause that says why, and the nearest family."""
    model_type = config.get("model_type")
    inner = config.get("text_config")
    if isinstance(inner, Mapping):
        found = inner.get("model_type")
        known = isinstance(found, str) and found in families
        if known or not isinstance(found, str):
            return "it holds more than text; save its language model alone", found if isinstance(found, str) else next(iter(families))
        why, nearest = explain_unsupported({"model_type": found}, families)
        return f"it holds more than text, and of its language model {why}", nearest
    if not isinstance(model_type, str):
        return "config.json names no family that transformers could build", next(iter(families))
    if model_type in UNSUPPORTED:
        return UNSUPPORTED[model_type]
    near = difflib.get_close_matches(model_type, families, 1, 0)
    return "its tensors are not in the table of families", near[0] if near else next(iter(families))
