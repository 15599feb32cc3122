"""The architecture of one config.json: axis sizes, conditions, and the full list of tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hf_grow.errors import SourceError
from hf_grow.model.families import FAMILIES
from hf_grow.model.family import AXES, MAX_LAYERS, MAX_TENSORS, PREDICATES, Config, Dim, TensorSpec
from hf_grow.model.unsupported import explain_unsupported

OUTPUT_FLAGS = ("return_dict", "output_attentions", "output_hidden_states")
"""Config keys of every family that control what a model returns."""


@dataclass(frozen=True)
class Entry:
    """One tensor of one architecture. ``layer`` and ``expert`` are -1 outside blocks and experts."""

    name: str
    spec: TensorSpec
    layer: int
    expert: int
    shape: tuple[int, ...]

    def at(self, *, layer: int | None = None, expert: int | None = None) -> str:
        """The name of the same tensor in another layer or expert."""
        return self.spec.name.format(layer=self.layer if layer is None else layer, expert=self.expert if expert is None else expert)

    @property
    def writes_residual(self) -> bool:
        """Whether the output is added to the residual stream: block tensors that produce `hidden`."""
        return self.layer >= 0 and self.spec.dims[0] == Dim("out", ("hidden",))


class Architecture:
    """A family bound to one config.json: axis sizes, conditions and the full list of tensors.

    Raises SourceError for an unsupported family, a quantized checkpoint, and values that are invalid or implausible.
    """

    def __init__(self, config: Config) -> None:
        model_type = config.get("model_type")
        if not isinstance(model_type, str) or model_type not in FAMILIES:
            why, nearest = explain_unsupported(config, FAMILIES)
            raise SourceError(
                f"model_type {model_type!r} is not supported: {why}.",
                hint=f"The nearest supported family is {nearest}. Supported families: {', '.join(FAMILIES)}.",
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
        if config.get("max_position_embeddings") is not None:
            self._positive("max_position_embeddings", config["max_position_embeddings"])
        if self.size("head_dim") % 2:
            raise SourceError(f"head_dim is {self.size('head_dim')}; rotary position embeddings need an even size.")
        if self.family.heads_divide_hidden and self.size("hidden") % self.heads:
            raise SourceError(
                f"hidden_size {self.size('hidden')} is not a multiple of num_attention_heads {self.heads}, "
                f"as {self.family.architecture} requires."
            )
        if self.layers > MAX_LAYERS or self.layers * max(1, self.size("experts")) > MAX_TENSORS // 16:
            raise SourceError(
                f"config.json describes {self.layers} layers and {self.size('experts')} experts, more than any real model has."
            )

    def get(self, key: str) -> Any:
        """The value of a config key as the family's config class reads it: the default if missing, but None if null."""
        spellings = (key, *(alias for alias, canonical in self.family.aliases.items() if canonical == key))
        given = [self.config[k] for k in spellings if k in self.config]
        return next((v for v in given if v is not None), None) if given else self.family.defaults.get(key)

    def _positive(self, key: str, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**40:
            raise SourceError(f"config.json: {key} must be a positive integer, got {value!r}.")
        return value

    def _check_layers(self) -> None:
        """Raises SourceError for switches and per-layer keys of the wrong type, which would be misread or fail later."""

        def reject(key: str, wanted: str) -> None:
            raise SourceError(f"config.json: {key} must be {wanted}, got {str(self.get(key))[:80]}.")

        def is_int(value: Any) -> bool:
            return isinstance(value, int) and not isinstance(value, bool)

        for key, default in self.family.defaults.items():
            if isinstance(default, bool) and not isinstance(self.get(key), bool):
                reject(key, "true or false")
        for key in OUTPUT_FLAGS:
            if not isinstance(self.get(key), bool | None):
                reject(key, "true or false")
        if self.top_k > self.size("experts"):
            reject("num_experts_per_tok", f"at most the number of experts, {self.size('experts')}")
        if "decoder_sparse_step" in self.family.defaults:
            self._positive("decoder_sparse_step", self.get("decoder_sparse_step"))
            dense = self.get("mlp_only_layers")
            if dense is not None and not (isinstance(dense, list) and all(map(is_int, dense))):
                reject("mlp_only_layers", "a list of layers")
        if self.family.sliding and not (self.get("sliding_window") is None or is_int(self.get("sliding_window"))):
            reject("sliding_window", "a number of positions")
        ends = self.get("max_window_layers")
        if not is_int(ends) and (ends is not None or ("max_window_layers" in self.family.defaults and self.get("use_sliding_window"))):
            reject("max_window_layers", "a number of layers")
        types = self.get("layer_types")
        if types is not None and not (isinstance(types, list) and len(types) == self.layers and all(isinstance(t, str) for t in types)):
            reject("layer_types", f"a list of {self.layers} names, one per layer")

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
        return self.family.size_key("experts") in self.family.defaults

    @property
    def top_k(self) -> int:
        return self._positive("num_experts_per_tok", self.get("num_experts_per_tok")) if self.is_moe else 0

    def is_sparse(self, layer: int) -> bool:
        """Whether the FFN of this block has experts."""
        if "mlp_only_layers" not in self.family.defaults:
            return self.is_moe
        return layer not in (self.get("mlp_only_layers") or ()) and (layer + 1) % self.get("decoder_sparse_step") == 0

    @cached_property
    def layer_types(self) -> list[str] | None:
        """The attention of each block, as the family's config class reads or derives it; None: all blocks of the family attend alike."""
        if "max_window_layers" not in self.family.defaults:
            return None
        given: list[str] | None = self.get("layer_types")
        return given or ["sliding_attention" if self._slides(i) else "full_attention" for i in range(self.layers)]

    def _slides(self, layer: int) -> bool:
        """Whether the attention of this block has a sliding window where config.json has no layer_types."""
        return self.family.sliding is not None and PREDICATES[self.family.sliding](self, layer)

    def window(self, layer: int) -> int | None:
        """Positions that the attention of this block reaches back at most, its own included; None without a sliding window."""
        types = self.layer_types
        slides = self._slides(layer) if types is None else types[layer] == "sliding_attention" and bool(self.get("use_sliding_window"))
        return self.get("sliding_window") if slides else None

    def size(self, axis: str) -> int:
        """Size of an axis of `AXES`; 0 if the family does not have it. Raises SourceError for an invalid value."""
        if axis == "group":
            if self.heads % self.size("kv"):
                raise SourceError(
                    f"config.json: num_attention_heads {self.heads} is not a multiple of num_key_value_heads {self.size('kv')}."
                )
            return self.heads // self.size("kv")
        if not any(axis in d.axes for spec in self.family.tensors for d in spec.dims):
            return 0
        if axis == "one":
            return 1
        key = self.family.size_key(axis)
        value = self.get(key)
        if value is None and axis == "kv":
            value = self.heads
        if value is None and axis == "head_dim":
            value = self.size("hidden") // self.heads
        return self._positive(key, value)

    def has_norm_over(self, axis: str) -> bool:
        """Whether a norm acts over this axis (Qwen3: q_norm and k_norm over head_dim)."""
        return any(d.role == "norm" and d.axes == (axis,) for spec in self.family.tensors for d in spec.dims)

    def entries(self, spec: TensorSpec) -> Iterator[Entry]:
        """The tensors of one row of the table, by layer and expert."""
        for layer in range(self.layers) if "{layer}" in spec.name else (-1,):
            if not PREDICATES[spec.when](self, layer):
                continue
            for expert in range(self.size("experts")) if "{expert}" in spec.name else (-1,):
                name = spec.name.format(layer=layer, expert=expert)
                shape = tuple(math.prod(map(self.size, d.axes)) for d in spec.dims)
                yield Entry(name, spec, layer, expert, shape)

    @property
    def count(self) -> int:
        """Number of tensors, without listing them."""
        total = 0
        for spec in self.family.tensors:
            places = (
                sum(PREDICATES[spec.when](self, i) for i in range(self.layers))
                if "{layer}" in spec.name
                else PREDICATES[spec.when](self, -1)
            )
            total += places * (self.size("experts") if "{expert}" in spec.name else 1)
        return total

    @cached_property
    def tensors(self) -> dict[str, Entry]:
        """Every tensor by its name on disk: embedding, blocks in order, final norm, head."""
        entries = [e for spec in self.family.tensors for e in self.entries(spec)]
        last = self.layers

        def place(item: tuple[int, Entry]) -> tuple[int, int]:
            index, entry = item
            if entry.layer >= 0:
                return entry.layer, index
            return (-1 if entry.spec.dims[0] == Dim("in", ("vocab",)) else last), index

        return {e.name: e for _, e in sorted(enumerate(entries), key=place)}
