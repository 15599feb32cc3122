"""FLOPs of matrix products, counted from a config.json and the table of its family, without torch: 2 for each multiplication and addition.

Counted are the products that torch.utils.flop_counter counts, so that tests can hold one to the other: weights (of a mixture those of the experts
that a token is sent to), scores and values of attention, the head. Embeddings are looked up, and everything elementwise is left out.

    attention   eager and sdpa compute the scores of all pairs of positions in a row, whatever is masked: length^2. Kernels that skip what is masked
                (flash attention, flex attention) compute those that the mask lets through: causal, in the window, in the document.
    backward    what autograd computes: of each product the gradient of the weight if it trains, and of the input if something before it trains.
    recompute   what the backward pass computes again: checkpointed layers (not torch.compile's own choice), and the scores in a fused kernel.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from hf_grow.model.architecture import Architecture
from hf_grow.model.family import PREDICATES, TensorSpec

Part = Literal["projections", "attention", "mlp", "router", "experts", "shared_expert", "head"]
Window = int | None
"""Positions that a layer attends to at most; None: all before it."""
_BLOCK = "model.layers.{layer}."
_SKIPPING = ("flash", "flex")
"""In the names of attention implementations that skip masked pairs."""


@dataclass(frozen=True)
class Batch:
    """The positions of one or more forward passes, and the pairs of positions whose scores are computed in layers of each window."""

    tokens: int = 0
    pairs: Mapping[Window, int] = field(default_factory=dict)

    def __add__(self, other: Batch) -> Batch:
        return Batch(self.tokens + other.tokens, _sum(self.pairs, other.pairs))


@dataclass(frozen=True)
class Cost:
    """FLOPs of a pass over a batch: for each position, and for each pair of positions in layers of each window."""

    token: int = 0
    pair: Mapping[Window, int] = field(default_factory=dict)

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.token + other.token, _sum(self.pair, other.pair))

    def __mul__(self, times: int) -> Cost:
        return Cost(self.token * times, {w: n * times for w, n in self.pair.items()})

    def of(self, batch: Batch) -> int:
        return self.token * batch.tokens + (sum(n * batch.pairs[w] for w, n in self.pair.items()) if batch.tokens else 0)

    def rows(self, rows: int, length: int, attention: str = "eager") -> int:
        """Of rows of one document each. ``attention``: the implementation."""
        return self.of(Batch(rows * length, row_pairs(rows, length, self.pair, attention)))

    def tokens(self, tokens: int, length: int, attention: str = "eager") -> int:
        """Of about as many rows of this length as hold so many tokens."""
        return self.rows(1, length, attention) * tokens // length


def _sum(a: Mapping[Window, int], b: Mapping[Window, int]) -> dict[Window, int]:
    return {w: a.get(w, 0) + b.get(w, 0) for w in (*a, *(w for w in b if w not in a))}


def total(costs: Iterable[Cost]) -> Cost:
    """The sum."""
    return sum(costs, Cost())


@dataclass(frozen=True)
class Product:
    """The matrix products with one weight, or of attention's scores and values (``name`` is empty). ``layer``: -1 for the head."""

    layer: int
    part: Part
    name: str
    """On disk, with {expert} where it stands for the experts that a token is sent to."""
    forward: Cost
    backward: Cost
    recompute: Cost


@dataclass(frozen=True)
class ModelFlops:
    """The products of a model."""

    products: tuple[Product, ...]

    @cached_property
    def forward(self) -> Cost:
        return total(p.forward for p in self.products)

    @cached_property
    def train(self) -> Cost:
        """Forward and backward, without what is computed again."""
        return self.forward + total(p.backward for p in self.products)

    @cached_property
    def recompute(self) -> Cost:
        return total(p.recompute for p in self.products)

    @property
    def windows(self) -> frozenset[Window]:
        return frozenset(self.forward.pair)

    def generation(self, rows: int, prompt: int, new: int) -> int:
        """FLOPs of sampling ``new`` tokens after each of ``rows`` prompts, with a key/value cache and logits of last positions only."""
        head = total(p.forward for p in self.products if p.part == "head")
        pairs = {w: rows * (prompt**2 + sum(min(prompt + i, w or prompt + i) for i in range(1, new))) for w in self.windows}
        return self.forward.of(Batch(rows * (prompt + new - 1), pairs)) + head.token * rows * (1 - prompt)


@dataclass(frozen=True)
class Training:
    """How a model trains, as far as its FLOPs depend on it."""

    frozen: Collection[str] = frozenset()
    """Names on disk of the tensors that get no gradient."""
    adapters: Mapping[str, int] = field(default_factory=dict)
    """Weight on disk -> rank of its LoRA update."""
    checkpointed: Collection[int] = frozenset()
    """Layers whose activations are computed again in the backward pass."""
    embeddings_require_grad: bool = False
    """Gradients go down to the embeddings, whatever trains: transformers' way where activations are checkpointed."""
    reentrant: bool = False
    """torch.utils.checkpoint's older form, which also computes again what no gradient needs: the last product of a layer."""
    attention: str = "eager"
    """Every other implementation is fused: its backward pass computes all gradients, and the scores once more."""


def skips_masked_pairs(attention: str) -> bool:
    """Whether an attention implementation computes only the scores that are not masked (apart from the edges of its blocks)."""
    return any(name in attention for name in _SKIPPING)


def row_pairs(rows: int, length: int, windows: Iterable[Window], attention: str) -> dict[Window, int]:
    """Pairs whose scores are computed in rows of one document each, for each window."""
    skips = skips_masked_pairs(attention)
    return {w: rows * (causal_pairs(length, w) if skips else length**2) for w in windows}


def causal_pairs(length: int, window: Window = None) -> int:
    """Pairs of a position and one that it attends to, in one document."""
    full = min(length, window or length)
    return full * (full + 1) // 2 + (length - full) * full


def six_nd(tokens: int, parameters: int) -> int:
    """The usual estimate of a training's FLOPs, for comparison: 6 for each token and (active) parameter."""
    return 6 * tokens * parameters


def count_flops(config: Mapping[str, Any] | Architecture, training: Training | None = None) -> ModelFlops:
    """The products of the model of a config.json, and of its training (default: everything trains)."""
    arch = config if isinstance(config, Architecture) else Architecture(config)
    return ModelFlops(tuple(_Count(arch, training or Training()).model()))


class _Count:
    """Follows the activations through a model, and with them whether they require a gradient."""

    def __init__(self, arch: Architecture, training: Training) -> None:
        self.arch, self.training = arch, training
        self.products: list[Product] = []

    def model(self) -> list[Product]:
        specs = {s.name: s for s in self.arch.family.tensors if "{layer}" not in s.name and PREDICATES[s.when](self.arch, -1)}
        grad = self._trains(specs, "model.embed_tokens.weight") or self.training.embeddings_require_grad
        for layer in range(self.arch.layers):
            grad = self._block(layer, grad)
        head = "model.embed_tokens.weight" if self.arch.tied else "lm_head.weight"
        self._linear(specs, head, "head", -1, self._trains(specs, "model.norm.weight") or grad)
        return self.products

    def _block(self, layer: int, grad: bool) -> bool:
        """``grad``: whether the residual stream requires a gradient, before; returned: after."""
        specs = {
            s.name.removeprefix(_BLOCK): s for s in self.arch.family.tensors if "{layer}" in s.name and PREDICATES[s.when](self.arch, layer)
        }
        start = len(self.products)

        def linear(name: str, part: Part, read: bool) -> bool:
            return self._linear(specs, name, part, layer, read)

        def trains(name: str) -> bool:
            return self._trains(specs, name, layer)

        read = trains("input_layernorm.weight") or grad
        q, k, v = (linear(f"self_attn.{n}_proj.weight", "projections", read) for n in "qkv")
        q, k = q or trains("self_attn.q_norm.weight"), k or trains("self_attn.k_norm.weight")
        self._attention(layer, q, k, v)
        grad = linear("self_attn.o_proj.weight", "projections", q or k or v) or grad
        read = trains("post_attention_layernorm.weight") or grad
        for part, names in _ffn(specs).items():
            inner = [linear(n, part, read) for n in names if "in:hidden" in _dims(specs[n])]
            outer = [linear(n, part, any(inner)) for n in names if "out:hidden" in _dims(specs[n])]
            grad = any([grad, *inner, *outer])
        if layer in self.training.checkpointed and grad:
            self._recompute(start, sparse=self.arch.is_sparse(layer))
        return grad

    def _linear(self, specs: Mapping[str, TensorSpec], name: str, part: Part, layer: int, read: bool) -> bool:
        """``read``: whether the input requires a gradient; returned: whether the output does."""
        sizes = [math.prod(map(self.arch.size, d.axes)) for d in specs[name].dims]
        times = 2 * (self.arch.top_k if "{expert}" in name else 1)
        weight = self._trains(specs, name, layer)
        full = specs[name].name.replace("{layer}", str(layer))
        rank = self.training.adapters.get(full, 0)
        down, up = times * rank * sizes[1], times * rank * sizes[0]
        forward = times * math.prod(sizes)
        backward = forward * (weight + read) + down * (1 + read) + up * 2
        self.products.append(Product(layer, part, full, Cost(forward + down + up), Cost(backward), Cost()))
        return weight or read or rank > 0 or self._trains(specs, name.removesuffix("weight") + "bias", layer)

    def _attention(self, layer: int, q: bool, k: bool, v: bool) -> None:
        """Scores and values: two products of the queries' width for each pair."""
        one = Cost(0, {self.arch.window(layer): 2 * self.arch.heads * self.arch.size("head_dim")})
        fused, needed = self.training.attention != "eager", q or k or v
        backward = 4 * needed if fused else q + k + (q or k) + v
        self.products.append(Product(layer, "attention", "", one * 2, one * backward, one * (fused and needed)))

    def _recompute(self, start: int, *, sparse: bool) -> None:
        """Adds the forward pass of the layer whose products begin at ``start``.

        It stops at the last tensor that the backward pass needs. After a dense layer's last product there is none; its operands are needed, not
        its result. The outputs of experts are: they are multiplied by the router's weights.
        """
        block = self.products[start:]
        last = block[-1]
        if not (sparse or self.training.reentrant or last.backward.token):
            return  # only the last bias trains, which needs nothing
        skipped = 0
        if not (sparse or self.training.reentrant):
            rank = self.training.adapters.get(last.name)
            skipped = last.forward.token if rank is None else 2 * rank * self.arch.size("hidden")
        block = [_again(p, p.forward) for p in block]
        block[-1] = _again(last, Cost(last.forward.token - skipped))
        self.products[start:] = block

    def _trains(self, specs: Mapping[str, TensorSpec], name: str, layer: int = -1) -> bool:
        if name not in specs:
            return False
        frozen, template = self.training.frozen, specs[name].name
        experts = range(self.arch.size("experts")) if "{expert}" in template else (-1,)
        return not frozen or any(template.format(layer=layer, expert=e) not in frozen for e in experts)


def _again(product: Product, cost: Cost) -> Product:
    return Product(product.layer, product.part, product.name, product.forward, product.backward, product.recompute + cost)


def _dims(spec: TensorSpec) -> set[str]:
    return {f"{d.role}:{'*'.join(d.axes)}" for d in spec.dims} if len(spec.dims) == 2 else set()


def _ffn(specs: Mapping[str, TensorSpec]) -> dict[Part, list[str]]:
    """The weights of a block after attention, by part."""
    parts: dict[Part, list[str]] = {}
    for name, spec in specs.items():
        if name.startswith("self_attn.") or len(spec.dims) != 2:
            continue
        axes = {a for d in spec.dims for a in d.axes}
        part: Part = "router" if axes & {"experts", "one"} else "shared_expert" if "shared_inter" in axes else "mlp"
        parts.setdefault("experts" if "{expert}" in name else part, []).append(name)
    return parts
