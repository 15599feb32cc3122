"""The one table: which tensors a model family has on disk, and what each dimension means.

Names are those of published checkpoints (what `save_pretrained` writes), never in-memory names: transformers 5 fuses experts in memory.
A tensor's dimensions read ``role:axis*axis``.

Axes    vocab, hidden, kv (key/value heads), group (query heads per kv head), head_dim, inter (FFN), expert_inter (FFN of one expert),
        shared_inter (FFN of the expert that every token passes), experts, one (a single number a token: it never grows).
        Query rows are ``kv*group*head_dim``: growing kv or group keeps grouped-query attention paired by construction.
Roles   out   the activation is made here: rows of a projection, the features of the embedding
        in    the activation is read here: columns of a projection, the rows of the embedding (indexed by token)
        norm  elementwise gain on the activation

A new family is its entry here and its row in the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Role = Literal["out", "in", "norm"]
Config = Mapping[str, Any]

AXES = ("vocab", "hidden", "kv", "group", "head_dim", "inter", "expert_inter", "shared_inter", "experts", "one")
FFN_AXES = ("inter", "expert_inter", "shared_inter")
MAX_TENSORS, MAX_LAYERS = 1_000_000, 10_000  # a config asking for more is a mistake or an attack


@dataclass(frozen=True)
class Dim:
    role: Role
    axes: tuple[str, ...]

    @staticmethod
    def parse(text: str) -> Dim:
        role, _, axes = text.partition(":")
        dim = Dim(role, tuple(axes.split("*")))  # type: ignore[arg-type]
        assert role in ("out", "in", "norm") and not set(dim.axes) - set(AXES), text
        return dim


@dataclass(frozen=True)
class TensorSpec:
    """One row of the table. ``name`` may hold {layer} and {expert}; ``when`` names a predicate of PREDICATES."""

    name: str
    dims: tuple[Dim, ...]
    when: str


def _rows(when: str, table: dict[str, str]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name, tuple(map(Dim.parse, dims.split())), when) for name, dims in table.items())


class Facts(Protocol):
    """What a predicate may ask of a model (`Architecture` answers)."""

    @property
    def tied(self) -> bool: ...
    def get(self, key: str) -> Any: ...
    def is_sparse(self, layer: int) -> bool: ...


# A predicate sees the model and the layer (-1 outside the blocks).
PREDICATES: dict[str, Callable[[Facts, int], bool]] = {
    "": lambda a, i: True,
    "untied": lambda a, i: not a.tied,
    "qkv_bias": lambda a, i: bool(a.get("qkv_bias")),
    "attention_bias": lambda a, i: bool(a.get("attention_bias")),
    "mlp_bias": lambda a, i: bool(a.get("mlp_bias")),
    "sparse": lambda a, i: a.is_sparse(i),
    "dense": lambda a, i: not a.is_sparse(i),
}

_EMBEDDING = _rows("", {"model.embed_tokens.weight": "in:vocab out:hidden"})
_HEAD = _rows("", {"model.norm.weight": "norm:hidden"}) + _rows("untied", {"lm_head.weight": "out:vocab in:hidden"})
_BLOCK = "model.layers.{layer}."
_NORMS = _rows("", {_BLOCK + "input_layernorm.weight": "norm:hidden", _BLOCK + "post_attention_layernorm.weight": "norm:hidden"})
_ATTENTION = _rows(
    "",
    {
        _BLOCK + "self_attn.q_proj.weight": "out:kv*group*head_dim in:hidden",
        _BLOCK + "self_attn.k_proj.weight": "out:kv*head_dim in:hidden",
        _BLOCK + "self_attn.v_proj.weight": "out:kv*head_dim in:hidden",
        _BLOCK + "self_attn.o_proj.weight": "out:hidden in:kv*group*head_dim",
    },
)
_QKV_BIAS = {
    _BLOCK + "self_attn.q_proj.bias": "out:kv*group*head_dim",
    _BLOCK + "self_attn.k_proj.bias": "out:kv*head_dim",
    _BLOCK + "self_attn.v_proj.bias": "out:kv*head_dim",
}
_QKVO_BIAS = {**_QKV_BIAS, _BLOCK + "self_attn.o_proj.bias": "out:hidden"}
_QK_NORM = _rows("", {_BLOCK + "self_attn.q_norm.weight": "norm:head_dim", _BLOCK + "self_attn.k_norm.weight": "norm:head_dim"})
_FFN = {
    _BLOCK + "mlp.gate_proj.weight": "out:inter in:hidden",
    _BLOCK + "mlp.up_proj.weight": "out:inter in:hidden",
    _BLOCK + "mlp.down_proj.weight": "out:hidden in:inter",
}
_FFN_BIAS = {
    _BLOCK + "mlp.gate_proj.bias": "out:inter",
    _BLOCK + "mlp.up_proj.bias": "out:inter",
    _BLOCK + "mlp.down_proj.bias": "out:hidden",
}
_MIXTRAL_EXPERTS = {
    _BLOCK + "block_sparse_moe.gate.weight": "out:experts in:hidden",
    _BLOCK + "block_sparse_moe.experts.{expert}.w1.weight": "out:expert_inter in:hidden",
    _BLOCK + "block_sparse_moe.experts.{expert}.w2.weight": "out:hidden in:expert_inter",
    _BLOCK + "block_sparse_moe.experts.{expert}.w3.weight": "out:expert_inter in:hidden",
}
_QWEN_EXPERTS = {
    _BLOCK + "mlp.gate.weight": "out:experts in:hidden",
    _BLOCK + "mlp.experts.{expert}.gate_proj.weight": "out:expert_inter in:hidden",
    _BLOCK + "mlp.experts.{expert}.up_proj.weight": "out:expert_inter in:hidden",
    _BLOCK + "mlp.experts.{expert}.down_proj.weight": "out:hidden in:expert_inter",
}
_SHARED_EXPERT = {
    _BLOCK + "mlp.shared_expert.gate_proj.weight": "out:shared_inter in:hidden",
    _BLOCK + "mlp.shared_expert.up_proj.weight": "out:shared_inter in:hidden",
    _BLOCK + "mlp.shared_expert.down_proj.weight": "out:hidden in:shared_inter",
    _BLOCK + "mlp.shared_expert_gate.weight": "out:one in:hidden",
}
_FUSED_QWEN_EXPERTS = {
    _BLOCK + "mlp.experts.gate_up_proj": (_BLOCK + "mlp.experts.{expert}.gate_proj.weight", _BLOCK + "mlp.experts.{expert}.up_proj.weight"),
    _BLOCK + "mlp.experts.down_proj": (_BLOCK + "mlp.experts.{expert}.down_proj.weight",),
}
_FUSED_MIXTRAL_EXPERTS = {
    _BLOCK + "mlp.gate.weight": (_BLOCK + "block_sparse_moe.gate.weight",),
    _BLOCK + "mlp.experts.gate_up_proj": (
        _BLOCK + "block_sparse_moe.experts.{expert}.w1.weight",
        _BLOCK + "block_sparse_moe.experts.{expert}.w3.weight",
    ),
    _BLOCK + "mlp.experts.down_proj": (_BLOCK + "block_sparse_moe.experts.{expert}.w2.weight",),
}


@dataclass(frozen=True)
class Family:
    model_type: str
    architecture: str
    tensors: tuple[TensorSpec, ...]
    defaults: Mapping[str, Any]
    """What the family's config class assumes for a key that config.json leaves out (None: derived)."""
    sizes: Mapping[str, str] = field(default_factory=dict)
    """Config keys that hold an axis, where they differ from `_SIZE_KEYS`."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other spelling of a config key -> the key used here; both are written, for readers old and new."""
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Names of the layout that transformers 5 has in memory, which some programs also store -> the rows of the table that lie in such a tensor:
    [experts, parts * rows, columns], for each expert its parts in this order; a single row without {expert} is merely named otherwise."""
    heads_divide_hidden: bool = False
    """The config class refuses hidden_size % num_attention_heads != 0, even with an explicit head_dim."""

    def size_key(self, axis: str) -> str:
        return self.sizes.get(axis, _SIZE_KEYS[axis])


_SIZE_KEYS = {
    "vocab": "vocab_size",
    "hidden": "hidden_size",
    "kv": "num_key_value_heads",
    "head_dim": "head_dim",
    "inter": "intermediate_size",
    "expert_inter": "moe_intermediate_size",
    "shared_inter": "shared_expert_intermediate_size",
    "experts": "num_local_experts",
}

_DENSE = {"tie_word_embeddings": False, "head_dim": None, "rope_theta": 10000.0}

FAMILIES: dict[str, Family] = {
    f.model_type: f
    for f in (
        Family(
            "llama",
            "LlamaForCausalLM",
            _EMBEDDING + _NORMS + _ATTENTION + _rows("attention_bias", _QKVO_BIAS)
            + _rows("", _FFN) + _rows("mlp_bias", _FFN_BIAS) + _HEAD,
            {**_DENSE, "num_key_value_heads": None, "attention_bias": False, "mlp_bias": False, "rms_norm_eps": 1e-6},
            heads_divide_hidden=True,
        ),
        Family(
            "mistral",
            "MistralForCausalLM",
            _EMBEDDING + _NORMS + _ATTENTION + _rows("", _FFN) + _HEAD,
            {**_DENSE, "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "sliding_window": 4096},
        ),
        Family(
            "mixtral",
            "MixtralForCausalLM",
            _EMBEDDING + _NORMS + _ATTENTION + _rows("sparse", _MIXTRAL_EXPERTS) + _HEAD,
            {**_DENSE, "rope_theta": 1e6, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "num_local_experts": 8, "num_experts_per_tok": 2},
            sizes={"expert_inter": "intermediate_size"},
            fused=_FUSED_MIXTRAL_EXPERTS,
        ),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            _EMBEDDING + _NORMS + _ATTENTION + _rows("", _QKV_BIAS) + _rows("", _FFN) + _HEAD,
            {**_DENSE, "num_key_value_heads": 32, "rms_norm_eps": 1e-6, "max_window_layers": 28, "use_sliding_window": False,
             "sliding_window": 4096},
        ),
        Family(
            "qwen2_moe",
            "Qwen2MoeForCausalLM",
            _EMBEDDING + _NORMS + _ATTENTION + _rows("qkv_bias", _QKV_BIAS)
            + _rows("dense", _FFN) + _rows("sparse", {**_QWEN_EXPERTS, **_SHARED_EXPERT}) + _HEAD,
            {**_DENSE, "num_key_value_heads": 16, "qkv_bias": True, "rms_norm_eps": 1e-6, "moe_intermediate_size": 1408,
             "shared_expert_intermediate_size": 5632, "max_window_layers": 28, "use_sliding_window": False, "sliding_window": 4096,
             "num_experts": 60, "num_experts_per_tok": 4, "norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
            sizes={"experts": "num_experts"},
            fused=_FUSED_QWEN_EXPERTS,
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            _EMBEDDING + _NORMS + _ATTENTION + _QK_NORM + _rows("attention_bias", _QKVO_BIAS) + _rows("", _FFN) + _HEAD,
            {**_DENSE, "num_key_value_heads": 32, "head_dim": 128, "attention_bias": False, "rms_norm_eps": 1e-6,
             "max_window_layers": 28, "use_sliding_window": False, "sliding_window": 4096},
        ),
        Family(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            _EMBEDDING + _NORMS + _ATTENTION + _QK_NORM + _rows("attention_bias", _QKVO_BIAS)
            + _rows("dense", _FFN) + _rows("sparse", _QWEN_EXPERTS) + _HEAD,
            {**_DENSE, "num_key_value_heads": 4, "attention_bias": False, "rms_norm_eps": 1e-6, "moe_intermediate_size": 768, "use_sliding_window": False,
             "num_local_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": False, "decoder_sparse_step": 1,
             "mlp_only_layers": []},
            aliases={"num_experts": "num_local_experts"},
            fused=_FUSED_QWEN_EXPERTS,
        ),
    )
}  # fmt: skip

# Stored by old converters; recomputed by every loader.
DERIVED_BUFFERS = (".rotary_emb.inv_freq",)
