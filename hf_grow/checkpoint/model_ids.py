"""Well-known Hub ids: aliases, suggestions for a mistyped id, and telling a path from an id."""

from __future__ import annotations

import difflib
import os
import re

MODELS = (
    # llama
    "meta-llama/Llama-2-7b-hf",
    "meta-llama/Llama-2-13b-hf",
    "meta-llama/Llama-2-70b-hf",
    "meta-llama/Meta-Llama-3-8B",
    "meta-llama/Meta-Llama-3-70B",
    "meta-llama/Llama-3.1-8B",
    "meta-llama/Llama-3.1-70B",
    "meta-llama/Llama-3.1-405B",
    "meta-llama/Llama-3.2-1B",
    "meta-llama/Llama-3.2-3B",
    "codellama/CodeLlama-7b-hf",
    "codellama/CodeLlama-13b-hf",
    "codellama/CodeLlama-34b-hf",
    "huggyllama/llama-7b",
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "HuggingFaceTB/SmolLM-135M",
    "HuggingFaceTB/SmolLM-360M",
    "HuggingFaceTB/SmolLM-1.7B",
    "HuggingFaceTB/SmolLM2-135M",
    "HuggingFaceTB/SmolLM2-360M",
    "HuggingFaceTB/SmolLM2-1.7B",
    "01-ai/Yi-6B",
    "01-ai/Yi-34B",
    "01-ai/Yi-1.5-9B",
    "upstage/SOLAR-10.7B-v1.0",
    "tiiuae/Falcon3-7B-Base",
    "tiiuae/Falcon3-10B-Base",
    # mistral
    "mistralai/Mistral-7B-v0.1",
    "mistralai/Mistral-7B-v0.3",
    "mistralai/Mistral-7B-Instruct-v0.1",
    "mistralai/Mistral-7B-Instruct-v0.2",
    "mistralai/Mistral-7B-Instruct-v0.3",
    "mistralai/Mistral-Nemo-Base-2407",
    "mistralai/Mistral-Small-24B-Base-2501",
    # mixtral
    "mistralai/Mixtral-8x7B-v0.1",
    "mistralai/Mixtral-8x7B-Instruct-v0.1",
    "mistralai/Mixtral-8x22B-v0.1",
    "mistralai/Mixtral-8x22B-Instruct-v0.1",
    # qwen2
    "Qwen/Qwen2-0.5B",
    "Qwen/Qwen2-1.5B",
    "Qwen/Qwen2-7B",
    "Qwen/Qwen2-72B",
    "Qwen/Qwen2.5-0.5B",
    "Qwen/Qwen2.5-1.5B",
    "Qwen/Qwen2.5-3B",
    "Qwen/Qwen2.5-7B",
    "Qwen/Qwen2.5-14B",
    "Qwen/Qwen2.5-32B",
    "Qwen/Qwen2.5-72B",
    "Qwen/Qwen2.5-Coder-7B",
    "Qwen/Qwen2.5-Math-7B",
    # qwen3
    "Qwen/Qwen3-0.6B-Base",
    "Qwen/Qwen3-1.7B-Base",
    "Qwen/Qwen3-4B-Base",
    "Qwen/Qwen3-8B-Base",
    "Qwen/Qwen3-14B-Base",
    "Qwen/Qwen3-32B",
    # qwen3_moe
    "Qwen/Qwen3-30B-A3B-Base",
    "Qwen/Qwen3-30B-A3B",
    "Qwen/Qwen3-235B-A22B",
)

# Lower case -> repository. Ids of existing checkpoints are not aliases.
ALIASES = {
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "mistralai/mistral-7b": "mistralai/Mistral-7B-v0.1",
    "mixtral-8x7b": "mistralai/Mixtral-8x7B-v0.1",
    "mistralai/mixtral-8x7b": "mistralai/Mixtral-8x7B-v0.1",
    "mixtral-8x22b": "mistralai/Mixtral-8x22B-v0.1",
    "mistralai/mixtral-8x22b": "mistralai/Mixtral-8x22B-v0.1",
    # These repositories hold the original .pth files of the same weights.
    "meta-llama/llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "meta-llama/llama-2-13b": "meta-llama/Llama-2-13b-hf",
    "meta-llama/llama-2-70b": "meta-llama/Llama-2-70b-hf",
    "meta-llama/llama-3-8b": "meta-llama/Meta-Llama-3-8B",
    "meta-llama/llama-3-70b": "meta-llama/Meta-Llama-3-70B",
    "tinyllama": "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
    "tinyllama-1.1b": "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
    "tinyllama/tinyllama-1.1b": "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B",
    "upstage/solar-10.7b": "upstage/SOLAR-10.7B-v1.0",
}


def similar_ids(ref: str, most: int = 3) -> list[str]:
    """Up to `most` known ids that are similar to `ref`, with or without the owner; the most similar first."""
    wanted = ref.lower()
    scores: dict[str, float] = {}
    for model in MODELS:
        whole = model.lower()
        # The owner is often guessed wrongly while the name is right.
        pairs = ((wanted, whole), (wanted.rpartition("/")[2], whole.rpartition("/")[2]))
        scores[model] = max(difflib.SequenceMatcher(None, a, b).ratio() for a, b in pairs)
    return [m for m in sorted(scores, key=lambda m: -scores[m]) if scores[m] > 0.75][:most]


def why_not_hub_id(ref: str) -> str:
    """Why `ref`, which is no existing file or folder, cannot be a Hub id, as the end of a sentence; empty if it may be one."""
    if not ref or ref.startswith((".", "/", "~")) or ref.count("/") > 1 or "\\" in ref:
        return "."
    owner, slash, name = ref.partition("/")
    if slash and os.path.isdir(owner):
        return f", although there is a folder {owner!r}."
    if not name:
        return ", and no Hub id either: those have an owner."
    if re.search(r"(^checkpoint-\d+|\.(safetensors|bin|gguf|pth?|json|ya?ml|partial))/?$", name):
        return ", and this is no Hub id."
    return ""
