"""Model families that are not supported: the reason, and the nearest supported family, for the error message."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

_GPT = "it has LayerNorm with a bias and an FFN without a gate"
_STATE = "not all of its layers are attention"
_ENCODER = "it is not a causal language model"

UNSUPPORTED: Mapping[str, tuple[str, str]] = {
    name: (why, nearest)
    for names, why, nearest in (
        ("gpt2 gpt_neo gpt_neox gptj gpt_bigcode codegen opt bloom mpt falcon phi persimmon starcoder2", _GPT, "llama"),
        ("gemma", "its norms multiply by 1 + weight, and its embeddings by a constant", "llama"),
        ("gemma2 gemma3_text", "its norms multiply by 1 + weight and also follow attention and FFN", "llama"),
        ("phi3 glm", "its q, k and v, or gate and up, are fused", "llama"),
        ("glm4", "it also has norms after attention and FFN, and gate and up are fused", "llama"),
        ("internlm2 baichuan chatglm", "its q, k and v are fused", "llama"),
        ("stablelm cohere cohere2 nemotron olmo", "it has LayerNorm, not RMSNorm", "llama"),
        ("olmo2 olmo3", "its norms follow attention and FFN instead of preceding them", "llama"),
        ("granite", "it multiplies embeddings, attention, residuals and logits by constants of its own", "llama"),
        ("granitemoe", "it multiplies embeddings, attention, residuals and logits by constants of its own", "mixtral"),
        ("smollm3", "some of its layers have no rotary embedding", "llama"),
        ("llama4_text", "some of its layers have no rotary embedding, and its experts are one fused tensor", "mixtral"),
        ("deepseek_v2 deepseek_v3 minicpm3 longcat_flash", "it has multi-head latent attention", "qwen3_moe"),
        ("gpt_oss", "its attention has sinks, and its experts are one fused tensor with biases", "mixtral"),
        ("olmoe", "its q and k norms span all heads", "qwen3_moe"),
        ("dbrx", "its experts are one fused tensor", "mixtral"),
        ("qwen3_next", _STATE, "qwen3_moe"),
        ("mamba mamba2 falcon_mamba rwkv recurrent_gemma jamba bamba zamba zamba2 falcon_h1 nemotron_h granitemoehybrid lfm2", _STATE, "llama"),
        ("t5 mt5 umt5 bart mbart pegasus bert roberta xlm-roberta deberta deberta-v2 electra distilbert albert modernbert", _ENCODER, "llama"),
    )
    for name in names.split()
}  # fmt: skip


def explain_unsupported(config: Mapping[str, Any], families: Collection[str]) -> tuple[str, str]:
    """For a config whose model_type is not in ``families``: the reason (a clause) and the nearest family."""
    model_type = config.get("model_type")
    inner = config.get("text_config")
    if isinstance(inner, Mapping):
        found = inner.get("model_type")
        known = isinstance(found, str) and found in families
        if known or not isinstance(found, str):
            return "it is multimodal; save its language model on its own", found if isinstance(found, str) else next(iter(families))
        why, nearest = explain_unsupported({"model_type": found}, families)
        return f"it is multimodal, and its language model is not supported either: {why}", nearest
    if not isinstance(model_type, str):
        return "config.json has no valid model_type", next(iter(families))
    if model_type in UNSUPPORTED:
        return UNSUPPORTED[model_type]
    near = difflib.get_close_matches(model_type, families, 1, 0)
    return "hf-grow has no tensor table for it", near[0] if near else next(iter(families))
