"""Tiny random models of every family, for all tests.

CASES is every family in every variant that changes its tensors: tied and untied, biases, q/k norms, dense and sparse blocks, windows.
Sizes hide nothing: 6 query heads on 2 key/value heads, a head_dim that is not hidden / heads where the family allows it, eps 1e-2, and no
parameter left at zero or one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging

logging.disable_progress_bar()
logging.set_verbosity_error()

SIZES = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WIDE_HEADS = {"head_dim": 12}  # 6 * 12 != 48
MOE = {"num_experts_per_tok": 2}
WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Case:
    name: str
    family: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    @property
    def config(self) -> dict[str, Any]:
        """A config.json, as someone would write it by hand."""
        return {"model_type": self.family, **SIZES, **self.options}


CASES = [
    Case("llama", "llama"),
    Case("llama-tied", "llama", {"tie_word_embeddings": True}),
    Case("llama-bias", "llama", {"attention_bias": True, "mlp_bias": True, **WIDE_HEADS}),
    Case("llama-attention-bias", "llama", {"attention_bias": True, "rope_parameters": LLAMA3}),
    Case("llama-multi-head", "llama", {"num_key_value_heads": 6}),
    Case("mistral", "mistral", WIDE_HEADS),
    Case("mistral-tied", "mistral", {"tie_word_embeddings": True, "sliding_window": 4}),
    Case("mixtral", "mixtral", {"num_local_experts": 4, **MOE}),
    Case("mixtral-tied", "mixtral", {"num_local_experts": 3, "tie_word_embeddings": True, **MOE, **WIDE_HEADS}),
    Case("qwen2", "qwen2"),
    Case("qwen2-tied", "qwen2", {"tie_word_embeddings": True}),
    Case("qwen2-window", "qwen2", WINDOW),
    Case("qwen2_moe", "qwen2_moe", {"num_experts": 4, "moe_intermediate_size": 20, "shared_expert_intermediate_size": 28, **MOE}),
    # Sparse: 1 and 5 only (every second layer, but not 3).
    Case("qwen2_moe-mixed", "qwen2_moe", {"num_experts": 3, "moe_intermediate_size": 20, "shared_expert_intermediate_size": 28,
                                          "norm_topk_prob": True, "qkv_bias": False, "tie_word_embeddings": True, **MOE, **WIDE_HEADS,
                                          "num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}),
    Case("qwen3", "qwen3", WIDE_HEADS),
    Case("qwen3-tied", "qwen3", {"tie_word_embeddings": True, **WIDE_HEADS}),
    Case("qwen3-bias", "qwen3", {"attention_bias": True, **WIDE_HEADS}),
    Case("qwen3-window", "qwen3", {**WINDOW, **WIDE_HEADS}),
    Case("qwen3_moe", "qwen3_moe", {"num_experts": 4, "moe_intermediate_size": 20, "norm_topk_prob": True, **MOE, **WIDE_HEADS}),
    Case("qwen3_moe-tied", "qwen3_moe", {"num_experts": 3, "moe_intermediate_size": 20, "tie_word_embeddings": True, **MOE, **WIDE_HEADS}),
    # Sparse: 1 and 5 only (every second layer, but not 3).
    Case("qwen3_moe-mixed", "qwen3_moe", {"num_experts": 4, "moe_intermediate_size": 20, "norm_topk_prob": True, **MOE, **WIDE_HEADS,
                                          "num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}),
    Case("qwen3_moe-bias", "qwen3_moe", {"num_experts": 4, "moe_intermediate_size": 20, "attention_bias": True, **MOE, **WIDE_HEADS}),
]  # fmt: skip
BY_NAME = {case.name: case for case in CASES}
ALTERNATING = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
WINDOWED = [
    *(case for case in CASES if case.name in ("mistral-tied", "qwen2-window", "qwen3-window")),
    Case("mixtral-window", "mixtral", {"num_local_experts": 4, "sliding_window": 4, **MOE}),
    Case("qwen2-listed", "qwen2", {**WINDOW, "layer_types": ALTERNATING}),
    Case("qwen3-listed", "qwen3", {**WINDOW, **WIDE_HEADS, "layer_types": ALTERNATING}),
    Case("qwen2_moe-window", "qwen2_moe", {**BY_NAME["qwen2_moe"].options, **WINDOW}),
    Case("qwen2_moe-window-99", "qwen2_moe", {**BY_NAME["qwen2_moe"].options, **WINDOW, "max_window_layers": 99}),
    Case("qwen2_moe-listed", "qwen2_moe", {**BY_NAME["qwen2_moe"].options, **WINDOW, "layer_types": ALTERNATING}),
    # max_window_layers and layer_types are no keys of this family: every layer has the window.
    Case("qwen3_moe-window", "qwen3_moe", {**BY_NAME["qwen3_moe"].options, **WINDOW}),
]
"""Every family that knows sliding windows, with one that is shorter than `tokens`, in every way that a config says which layers have it."""
each_case = pytest.mark.parametrize("case", CASES, ids=str)


def real_config(case: Case | Mapping[str, Any], **changes: Any) -> PreTrainedConfig:
    """The config object that transformers makes of a config.json."""
    data = {**(case.config if isinstance(case, Case) else case), **changes}
    return AutoConfig.for_model(**data)


def make(case: Case | Mapping[str, Any], *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model; slow but plain attention and experts, so that fp64 stays fp64 (see exact.py)."""
    config = real_config(case, **changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    randomize(model, seed)
    return model.to(dtype).eval()


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Every parameter random: matrices of unit gain, norm gains in 0.5 .. 1.5, biases that matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.copy_(torch.rand(p.shape, generator=generator) + 0.5)
            else:
                scale = 0.3 if name.endswith("bias") else 1.0 if "embed_tokens" in name else p.shape[-1] ** -0.5
                p.copy_(torch.randn(p.shape, generator=generator) * scale)


def save(model: PreTrainedModel, folder: Path, *, sharded: bool = False) -> Path:
    """What `save_pretrained` writes: one file, or several."""
    model.save_pretrained(folder, max_shard_size="40KB" if sharded else "50GB")
    return folder


def on_disk(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The tensors that save_pretrained would write, by their names on disk."""
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return dict(revert_weight_conversion(model, state))


def from_disk(config: Mapping[str, Any], state: Mapping[str, torch.Tensor], dtype: torch.dtype) -> PreTrainedModel:
    """What from_pretrained makes of a config.json and tensors by their names on disk."""
    real = AutoConfig.for_model(**config)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(real)]
    model, loading = model_class.from_pretrained(
        None, config=real, state_dict=dict(state), dtype=dtype, output_loading_info=True,
        attn_implementation="eager", experts_implementation="eager",
    )  # fmt: skip
    assert not any(loading[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading
    return model.eval()


def tokens(model: PreTrainedModel, length: int = 12) -> torch.Tensor:
    """Two fixed rows of tokens, longer than the sliding windows of CASES."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, model.config.vocab_size, (2, length), generator=generator)
