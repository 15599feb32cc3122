"""The vocabulary of a family's tensor table: dimensions with roles and axes, conditions, and the `Family` that holds them.

Tensor names are those of published checkpoints (what `save_pretrained` writes), never in-memory names: transformers 5 fuses experts in memory.
A tensor's dimensions read ``role:axis*axis``.

Axes    vocab, hidden, kv (key/value heads), group (query heads per kv head), head_dim, inter (FFN), expert_inter (FFN of one expert),
        shared_inter (FFN of the shared expert), experts, one (size 1; never grows).
        Query rows are ``kv*group*head_dim``: growing kv or group keeps query heads with their key/value head.
Roles   out   the activation is produced here: rows of a projection, the features of the embedding
        in    the activation is read here: columns of a projection, the rows of the embedding (indexed by token)
        norm  elementwise gain on the activation
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
DERIVED_BUFFERS = (".rotary_emb.inv_freq",)
"""Suffixes of buffers that old converters stored and every loader recomputes."""

SIZE_KEYS = {
    "vocab": "vocab_size",
    "hidden": "hidden_size",
    "kv": "num_key_value_heads",
    "head_dim": "head_dim",
    "inter": "intermediate_size",
    "expert_inter": "moe_intermediate_size",
    "shared_inter": "shared_expert_intermediate_size",
    "experts": "num_local_experts",
}
"""Config key that holds the size of an axis, unless a family says otherwise."""


@dataclass(frozen=True)
class Dim:
    """One dimension of a tensor: what it does to an activation, and the axes whose product is its size (slowest first)."""

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
    """One row of a family's table. ``name`` may hold {layer} and {expert}; ``when`` is a key of PREDICATES."""

    name: str
    dims: tuple[Dim, ...]
    when: str


def rows(table: Mapping[str, str], *, when: str = "") -> tuple[TensorSpec, ...]:
    """Table rows from ``{tensor name: dimensions}``, all under one condition."""
    return tuple(TensorSpec(name, tuple(map(Dim.parse, dims.split())), when) for name, dims in table.items())


class ModelFacts(Protocol):
    """What a predicate may ask of a model (`Architecture` implements it)."""

    @property
    def tied(self) -> bool: ...
    def get(self, key: str) -> Any: ...
    def is_sparse(self, layer: int) -> bool: ...


PREDICATES: dict[str, Callable[[ModelFacts, int], bool]] = {
    "": lambda a, i: True,
    "untied": lambda a, i: not a.tied,
    "qkv_bias": lambda a, i: bool(a.get("qkv_bias")),
    "attention_bias": lambda a, i: bool(a.get("attention_bias")),
    "mlp_bias": lambda a, i: bool(a.get("mlp_bias")),
    "sparse": lambda a, i: a.is_sparse(i),
    "dense": lambda a, i: not a.is_sparse(i),
    "window": lambda a, i: a.get("sliding_window") is not None,
    "window_if_used": lambda a, i: bool(a.get("use_sliding_window")),
    "window_after_first": lambda a, i: (
        bool(a.get("use_sliding_window")) and a.get("sliding_window") is not None and i >= a.get("max_window_layers")
    ),
    "window_alternating": lambda a, i: bool(a.get("use_sliding_window")) and i % 2 == 0 and i < a.get("max_window_layers"),
}
"""Conditions on a tensor's existence, or on a layer's sliding window, given the model and the layer (-1 outside the blocks)."""


@dataclass(frozen=True)
class Family:
    """A model family: its tensors on disk and how its config is read."""

    model_type: str
    architecture: str
    tensors: tuple[TensorSpec, ...]
    defaults: Mapping[str, Any]
    """What the family's config class assumes for a key that config.json leaves out (None: derived)."""
    sizes: Mapping[str, str] = field(default_factory=dict)
    """Config keys that hold an axis, where they differ from `SIZE_KEYS`."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other spelling of a config key -> the key used here; both are written, for old and new readers."""
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Tensor names of transformers 5's in-memory layout, which some programs also store -> the table rows that the tensor holds:
    [experts, parts * rows, columns], for each expert its parts in this order. A single row without {expert} is only renamed."""
    sliding: str | None = None
    """The condition on which a layer's attention has a sliding window, where config.json has no layer_types; None: none has."""
    heads_divide_hidden: bool = False
    """The config class requires hidden_size % num_attention_heads == 0, even with an explicit head_dim."""

    def size_key(self, axis: str) -> str:
        return self.sizes.get(axis, SIZE_KEYS[axis])
