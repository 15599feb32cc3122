"""The one table: which tensors a model family has on disk, and what each dimension means.

Names are those of published checkpoints (what `save_pretrained` writes), never in-memory names: transformers 5 fuses experts in memory.
A tensor's dimensions read ``role:axis*axis``.

Axes    vocab, hidden, kv (key/value heads), group (query heads per kv head), head_dim, inter (FFN), expert_inter (FFN of one expert), experts.
        Query rows are ``kv*group*head_dim``: growing kv or group keeps grouped-query attention paired by construction.
Roles   out   the activation is made here: rows of a projection, the features of the embedding
        in    the activation is read here: columns of a projection, the rows of the embedding (indexed by token)
        norm  elementwise gain on the activation

A new family is its entry here and its row in the tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from hf_grow.errors import SourceError

Role = Literal["out", "in", "norm"]
Config = Mapping[str, Any]

AXES = ("vocab", "hidden", "kv", "group", "head_dim", "inter", "expert_inter", "experts")
MAX_TENSORS = 1_000_000  # a config asking for more is a mistake or an attack


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


# A predicate sees the architecture and the layer (-1 outside the blocks).
PREDICATES: dict[str, Callable[[Architecture, int], bool]] = {
    "": lambda a, i: True,
    "untied": lambda a, i: not a.tied,
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
        ),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            _EMBEDDING + _NORMS + _ATTENTION + _rows("", _QKV_BIAS) + _rows("", _FFN) + _HEAD,
            {**_DENSE, "num_key_value_heads": 32, "rms_norm_eps": 1e-6, "max_window_layers": 28, "use_sliding_window": False,
             "sliding_window": 4096},
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
        ),
    )
}  # fmt: skip

# Stored by old converters; recomputed by every loader.
DERIVED_BUFFERS = (".rotary_emb.inv_freq",)


@dataclass(frozen=True)
class Entry:
    """One tensor of one architecture."""

    name: str
    spec: TensorSpec
    layer: int
    expert: int
    shape: tuple[int, ...]

    def at(self, *, layer: int | None = None, expert: int | None = None) -> str:
        """The name of this tensor's counterpart in another layer or expert."""
        return self.spec.name.format(layer=self.layer if layer is None else layer, expert=self.expert if expert is None else expert)

    @property
    def writes_residual(self) -> bool:
        """Inside a block, what is made in `hidden` is added to the residual stream."""
        return self.layer >= 0 and self.spec.dims[0] == Dim("out", ("hidden",))


class Architecture:
    """A family bound to one config.json: sizes, predicates and the full list of tensors.

    Raises SourceError for an unknown family or for sizes that no model can have.
    """

    def __init__(self, config: Config) -> None:
        model_type = config.get("model_type")
        if not isinstance(model_type, str) or model_type not in FAMILIES:
            raise SourceError(
                f"model_type {model_type!r} is not supported.",
                hint=f"Supported families: {', '.join(FAMILIES)}.",
            )
        if config.get("quantization_config"):
            raise SourceError(
                "The checkpoint is quantized (config.json has quantization_config); growth needs the full weights.",
                hint="Use the unquantized checkpoint, or dequantize it first (model.dequantize(), then save_pretrained).",
            )
        self.family = FAMILIES[model_type]
        self.config = dict(config)
        for axis in AXES:
            self.size(axis)
        self._check_layers()
        if self.size("head_dim") % 2:
            raise SourceError(f"head_dim is {self.size('head_dim')}; rotary position embeddings need an even one.")
        if self.family.heads_divide_hidden and self.size("hidden") % self.heads:
            raise SourceError(
                f"hidden_size {self.size('hidden')} is not a multiple of num_attention_heads {self.heads}, "
                f"which {self.family.architecture} demands."
            )
        if self.layers * max(1, self.size("experts")) > MAX_TENSORS // 16:
            raise SourceError(f"config.json asks for {self.layers} layers and {self.size('experts')} experts; that is no real model.")

    def get(self, key: str) -> Any:
        """What the family's config class makes of a key: left out, its default; null, None, which is not the same."""
        spellings = (key, *(alias for alias, canonical in self.family.aliases.items() if canonical == key))
        given = [self.config[k] for k in spellings if k in self.config]
        return next((v for v in given if v is not None), None) if given else self.family.defaults.get(key)

    def _positive(self, key: str, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**40:
            raise SourceError(f"config.json: {key} must be a positive integer, got {value!r}.")
        return value

    def _check_layers(self) -> None:
        """Switches, and keys that speak of single layers: what would be misread later, or fail far from here."""

        def refuse(key: str, wanted: str) -> None:
            raise SourceError(f"config.json: {key} must be {wanted}, got {str(self.get(key))[:80]}.")

        def whole(value: Any) -> bool:
            return isinstance(value, int) and not isinstance(value, bool)

        for key, default in self.family.defaults.items():
            if isinstance(default, bool) and not isinstance(self.get(key), bool):
                refuse(key, "true or false")
        if self.top_k > self.size("experts"):
            refuse("num_experts_per_tok", f"at most the number of experts, {self.size('experts')}")
        if "decoder_sparse_step" in self.family.defaults:
            self._positive("decoder_sparse_step", self.get("decoder_sparse_step"))
            dense = self.get("mlp_only_layers")
            if dense is not None and not (isinstance(dense, list) and all(map(whole, dense))):
                refuse("mlp_only_layers", "a list of layers")
        if self.get("max_window_layers") is not None and not whole(self.get("max_window_layers")):
            refuse("max_window_layers", "a number of layers")
        types = self.get("layer_types")
        if types is not None and not (isinstance(types, list) and len(types) == self.layers and all(isinstance(t, str) for t in types)):
            refuse("layer_types", f"a list of {self.layers} names, one a layer")

    @cached_property
    def layers(self) -> int:
        return self._positive("num_hidden_layers", self.config.get("num_hidden_layers"))

    @cached_property
    def heads(self) -> int:
        return self._positive("num_attention_heads", self.config.get("num_attention_heads"))

    @cached_property
    def tied(self) -> bool:
        return bool(self.get("tie_word_embeddings"))

    @cached_property
    def is_moe(self) -> bool:
        return "num_local_experts" in self.family.defaults

    @property
    def top_k(self) -> int:
        return self._positive("num_experts_per_tok", self.get("num_experts_per_tok")) if self.is_moe else 0

    def is_sparse(self, layer: int) -> bool:
        """Whether a block's FFN is a mixture of experts."""
        if "mlp_only_layers" not in self.family.defaults:
            return self.is_moe
        return layer not in (self.get("mlp_only_layers") or ()) and (layer + 1) % self.get("decoder_sparse_step") == 0

    def size(self, axis: str) -> int:
        """Size of one axis; 0 for an axis this family has not."""
        if axis == "group":
            if self.heads % self.size("kv"):
                raise SourceError(
                    f"config.json: num_attention_heads {self.heads} is not a multiple of num_key_value_heads {self.size('kv')}."
                )
            return self.heads // self.size("kv")
        if not any(axis in d.axes for spec in self.family.tensors for d in spec.dims):
            return 0
        key = self.family.size_key(axis)
        value = self.get(key)
        if value is None and axis == "kv":
            value = self.heads
        if value is None and axis == "head_dim":
            value = self.size("hidden") // self.heads
        return self._positive(key, value)

    def has_norm_over(self, axis: str) -> bool:
        """Whether some norm acts over this axis (Qwen3: q_norm and k_norm over head_dim)."""
        return any(d.role == "norm" and d.axes == (axis,) for spec in self.family.tensors for d in spec.dims)

    def entries(self, spec: TensorSpec) -> Iterator[Entry]:
        for layer in range(self.layers) if "{layer}" in spec.name else (-1,):
            if not PREDICATES[spec.when](self, layer):
                continue
            for expert in range(self.size("experts")) if "{expert}" in spec.name else (-1,):
                name = spec.name.format(layer=layer, expert=expert)
                shape = tuple(math.prod(map(self.size, d.axes)) for d in spec.dims)
                yield Entry(name, spec, layer, expert, shape)

    @cached_property
    def tensors(self) -> dict[str, Entry]:
        """Every tensor of the checkpoint by its name on disk: embedding, blocks in order, final norm, head."""
        entries = [e for spec in self.family.tensors for e in self.entries(spec)]
        last = self.layers

        def place(item: tuple[int, Entry]) -> tuple[int, int]:
            index, entry = item
            if entry.layer >= 0:
                return entry.layer, index
            return (-1 if entry.spec in _EMBEDDING else last), index

        return {e.name: e for _, e in sorted(enumerate(entries), key=place)}


def portable_config(config: Config) -> dict[str, Any]:
    """`config` with every spelling that readers want: transformers 4.x and 5.x, vLLM, llama.cpp's converter.

    transformers 5 writes rope_parameters / dtype and drops rope_theta / rope_scaling / torch_dtype; 4.x ignores the new keys and then
    uses default theta without a word. head_dim is made explicit: without it, an old reader derives it from hidden_size.
    """
    arch = Architecture(config)
    out = {k: v for k, v in config.items() if k not in ("_name_or_path", "transformers_version")}
    out.setdefault("architectures", [arch.family.architecture])
    out["head_dim"] = arch.size("head_dim")
    out["num_key_value_heads"] = arch.size("kv")
    out["tie_word_embeddings"] = arch.tied
    for alias, canonical in arch.family.aliases.items():
        out[alias] = out[canonical] = arch.get(canonical)
    dtype = out.get("dtype") or out.get("torch_dtype")
    if dtype:
        out["dtype"] = out["torch_dtype"] = dtype
    out.pop("rope_scaling", None)
    return {**out, **_rope(arch)}


def _rope(arch: Architecture) -> dict[str, Any]:
    """The rotary settings in both spellings. As transformers does, rope_scaling goes before rope_parameters, and a theta inside before one outside."""
    given = arch.get("rope_scaling") or arch.get("rope_parameters") or {}
    if not isinstance(given, Mapping):
        raise SourceError(f"config.json: the rotary settings must be an object, got {str(given)[:80]}.")
    scaling = dict(given)
    theta = scaling.pop("rope_theta", arch.get("rope_theta"))
    old_type = scaling.pop("type", "default")
    scaling.setdefault("rope_type", old_type)
    plain = scaling["rope_type"] == "default"
    return {
        "rope_theta": theta,
        **({} if plain else {"rope_scaling": scaling}),  # transformers 5 warns of the key even where it is null
        "rope_parameters": {"rope_theta": theta, **({"rope_type": "default"} if plain else scaling)},
    }
