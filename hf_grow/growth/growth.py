"""What a growth method returns: the target config and, for every tensor of the target, an expression over the source.

Nothing here knows a method by name, reads a weight or imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from hf_grow.growth.axes import AxisMap
from hf_grow.growth.tensormap import Expr, Noise, Orthogonal, Replace, Subset, Take, Values, substitute
from hf_grow.model.architecture import Architecture
from hf_grow.options import Options

GuaranteeKind = Literal["lossless", "changes the function"]


@dataclass(frozen=True)
class Guarantee:
    """lossless: source and target compute the same function in real arithmetic. ``because`` says why, or what changes."""

    kind: GuaranteeKind
    because: str

    @property
    def lossless(self) -> bool:
        return self.kind == "lossless"


@dataclass(frozen=True)
class LayerOrigin:
    """Where one target layer comes from: source layers and their weights (several when averaged).

    ``new``: not the first appearance of its source. ``identity``: adds nothing to the residual stream yet.
    """

    sources: tuple[int, ...]
    weights: tuple[float, ...] = (1.0,)
    new: bool = False
    identity: bool = False


@dataclass(frozen=True)
class Growth:
    method: str
    options: Mapping[str, Any]
    """The options as asked for, so that the growth can be run again."""
    config: Mapping[str, Any]
    """The target's config.json."""
    tensors: Mapping[str, Expr]
    """Every tensor of the target, in the order of its table."""
    guarantee: Guarantee
    layers: tuple[LayerOrigin, ...]
    axes: Mapping[str, AxisMap] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)
    """Source tensors that do not go into the target, with the reason."""
    warnings: tuple[str, ...] = ()
    seed: int = 0
    data: Mapping[str, str] = field(default_factory=dict)
    """Numbers of `Values` nodes by their key: float16, little endian, base64. Empty until they are measured."""

    def unmeasured(self) -> list[str]:
        """The keys of `Values` nodes whose numbers are not there yet."""
        return sorted({v.key for e in self.tensors.values() for v in _values(e)} - self.data.keys())


def _values(expr: Expr) -> Iterator[Values]:
    if isinstance(expr, Values):
        yield expr
    for child in expr.children():
        yield from _values(child)


def compose(first: Growth, second: Growth) -> Growth:
    """The growth that does `first`, then `second`, as one map: no intermediate checkpoint, one pass over the weights.

    Exact by substitution. Noise and axis maps of the second step get names of their own where the two would be confused.
    """
    clash = {n: f"{n}@{first.method}+{second.method}" for n in first.axes.keys() & second.axes.keys() if first.axes[n] != second.axes[n]}

    def rename(expr: Expr) -> Expr:
        if isinstance(expr, Noise | Orthogonal | Subset | Replace):
            expr = replace(expr, key=f"{first.method}+{second.method}/{second.seed}/{expr.key}")
        if isinstance(expr, Take) and expr.axis in clash:
            expr = replace(expr, axis=clash[expr.axis])
        return expr.map_children(rename)

    tensors = {name: substitute(rename(e), first.tensors) for name, e in second.tensors.items()}
    read = {s.key for e in tensors.values() for s in e.sources()}
    unread = {s.key for e in first.tensors.values() for s in e.sources() if not s.checkpoint} - read
    weakest = first.guarantee if not first.guarantee.lossless else second.guarantee
    return Growth(
        method=f"{first.method}+{second.method}",
        options={"steps": [step for g in (first, second) for step in g.options.get("steps") or [{"method": g.method, **g.options}]]},
        config=second.config,
        tensors=tensors,
        guarantee=Guarantee(weakest.kind, "; then ".join(dict.fromkeys((first.guarantee.because, second.guarantee.because)))),
        layers=tuple(_through(first.layers, layer) for layer in second.layers),
        axes={**first.axes, **{clash.get(n, n): a for n, a in second.axes.items()}},
        dropped={**first.dropped, **dict.fromkeys(sorted(unread), f"not used by {second.method}")},
        warnings=first.warnings + second.warnings,
        seed=first.seed,
        data={**first.data, **second.data},
    )


def _through(earlier: tuple[LayerOrigin, ...], layer: LayerOrigin) -> LayerOrigin:
    """The origin of a layer of the second step, told in layers of the first step's source."""
    inner = [earlier[i] for i in layer.sources]
    parts = [(s, w * v) for o, v in zip(inner, layer.weights, strict=True) for s, w in zip(o.sources, o.weights, strict=True)]
    return LayerOrigin(
        tuple(s for s, _ in parts),
        tuple(w for _, w in parts),
        new=layer.new or any(o.new for o in inner),
        identity=layer.identity or all(o.identity for o in inner),
    )


@dataclass(frozen=True)
class Method:
    """A growth method, as the command line and the plan table know it."""

    name: str
    kind: Literal["depth", "width", "experts", "hybrid"]
    summary: str
    paper: str
    guarantee: str
    """In a few words, for the method table; the plan of a concrete growth states its own."""
    options: type[Options]
    build: Callable[..., Growth]
    """From the source's architecture and the options; and from the architectures of further sources, where the options name some."""
    for_size: Callable[[Architecture, int], Options | None]
    """The options that come nearest to a number of parameters, or None where the method has no way there."""
