"""What a growth method returns: the target config and an expression over the source for every target tensor. No weights, no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from hf_grow.errors import PlanError
from hf_grow.growth.axes import AxisMap
from hf_grow.growth.tensormap import Expr, Noise, Orthogonal, Replace, Subset, Take, substitute
from hf_grow.model.architecture import Architecture
from hf_grow.options import Options

GuaranteeKind = Literal["lossless", "changes the function"]


@dataclass(frozen=True)
class Guarantee:
    """lossless: source and target compute the same function in real arithmetic. ``because``: why, or what changes."""

    kind: GuaranteeKind
    because: str

    @property
    def lossless(self) -> bool:
        return self.kind == "lossless"


@dataclass(frozen=True)
class LayerOrigin:
    """Where a target layer comes from: source layers and their weights (several if averaged).

    ``new``: not the first copy of its source layer. ``identity``: adds zero to the residual stream.
    """

    sources: tuple[int, ...]
    weights: tuple[float, ...] = (1.0,)
    new: bool = False
    identity: bool = False


@dataclass(frozen=True)
class Measurement:
    """Numbers that must be measured on the source's weights before a growth can be written: those of some of its `Values` nodes."""

    kind: str
    """A key of `hf_grow.convert.measure.MEASUREMENTS`."""
    layers: Mapping[str, int]
    """Key of a `Values` node -> layer of the source in which it is measured."""
    parameters: Mapping[str, Any]
    """Keyword arguments of the measuring function."""
    source: str = ""
    """Label of the checkpoint to measure on, as in `Source.checkpoint`; empty for the main one."""


@dataclass(frozen=True)
class CandidateTable:
    """The target shapes that a method ranked, as text for the terminal."""

    title: str
    columns: tuple[str, ...]
    source: tuple[str, ...]
    """The source's row."""
    rows: tuple[tuple[str, ...], ...]
    """A row for each candidate, best first."""
    chosen: int
    """Number of the candidate that the growth makes, from 1."""
    hint: str
    """How to choose another."""


@dataclass(frozen=True)
class Growth:
    """One growth of one architecture, independent of weights. Guarantees nothing until `make_plan` has checked it."""

    method: str
    options: Mapping[str, Any]
    """The options that differ from their defaults, enough to build the growth again."""
    config: Mapping[str, Any]
    """The target's config.json."""
    tensors: Mapping[str, Expr]
    """Every target tensor by its name on disk, in checkpoint order."""
    guarantee: Guarantee
    layers: tuple[LayerOrigin, ...]
    axes: Mapping[str, AxisMap] = field(default_factory=dict)
    """The axis maps that `Take` nodes refer to, by name."""
    dropped: Mapping[str, str] = field(default_factory=dict)
    """Source tensors that the target does not use, with the reason."""
    warnings: tuple[str, ...] = ()
    seed: int = 0
    """Seed of all random nodes."""
    data: Mapping[str, str] = field(default_factory=dict)
    """Numbers of `Values` nodes by key: float16, little-endian, base64. Empty until measured."""
    measurements: tuple[Measurement, ...] = ()
    """What must still be measured; `hf_grow.convert.measure.measure` puts the results into `data`."""
    candidates: CandidateTable | None = None
    """What the method chose the target from, if it ranked several."""


def compose(first: Growth, second: Growth) -> Growth:
    """The growth that does `first`, then `second`, as one map without an intermediate checkpoint.

    Exact, since expressions are substituted. Random keys and axis maps of the second step are renamed so that they do not collide.
    Raises PlanError if the second step needs measurements: only the first one reads a checkpoint that exists.
    """
    if second.measurements:
        raise PlanError(f"{second.method} needs measurements of the source ({second.measurements[0].kind}), so it must be the first step.")
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
        measurements=first.measurements,
    )


def _through(earlier: tuple[LayerOrigin, ...], layer: LayerOrigin) -> LayerOrigin:
    """The origin of a second-step layer in terms of the first step's source."""
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
    """A growth method, as the command line and the plan table use it."""

    name: str
    kind: Literal["depth", "width", "experts", "hybrid"]
    summary: str
    paper: str
    guarantee: str
    """Summary for the method table; a concrete growth states its own guarantee."""
    options: type[Options]
    build: Callable[..., Growth]
    """(source architecture, options[, architectures of additional sources]) -> Growth. Raises PlanError."""
    for_size: Callable[[Architecture, int], Options | None]
    """(source architecture, number of parameters) -> the options that come closest, or None if the method cannot."""
    checks_own_options: bool = False
    """Whether `build` rejects options without effect itself, as a pipeline does for each of its steps."""
