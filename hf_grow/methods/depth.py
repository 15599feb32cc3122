"""Depth growth: the blocks of the target are a list of source blocks.

dus         SOLAR 10.7B (Kim et al. 2023, arXiv 2312.15166, section 2): layers [0, n-m) then [m, n), s = 2(n-m). Changes the function.
stack       StackBERT (Gong et al. 2019) and G_stack (Du et al. 2024, arXiv 2405.15319): the whole stack g times. Changes the function.
interleave  each layer repeated in place (AquilaMoE, arXiv 2408.06567; Chang et al. 2018), also by non-integer factors. Changes the function,
            less than stack.
identity    LLaMA-Pro (Wu et al. 2024, arXiv 2401.02415, section 3): evenly spread copies with zero o_proj and down_proj. Lossless: both branches
            of a new block add exactly 0 to the residual stream.
layers      any list of source layers, such as `0-23,8-31`.

Tensors that write the residual stream are found by role (`out:hidden` in the table), so new families, biases and experts need no code here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Annotated

from pydantic import Field

from hf_grow.errors import PlanError
from hf_grow.growth.growth import Growth, Guarantee, LayerOrigin, Method
from hf_grow.growth.tensormap import Expr, Fill, Noise, Source, Sum
from hf_grow.methods.layer_config import derives_layer_types, rederived
from hf_grow.model.architecture import Architecture, Entry
from hf_grow.model.config_compat import portable_config
from hf_grow.model.param_count import block_parameters, check_target, count_parameters, format_count
from hf_grow.options import Count, LayerList, Options

MAX_FACTOR = 8  # larger factors in one step have no precedent in the literature

Positive = Annotated[int, Field(ge=1)]


class DepthOptions(Options):
    """Options of every depth method."""

    noise: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Gaussian noise on the matrices of repeated layers, in standard deviations of each matrix; breaks the symmetry of copies."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the noise."""


class SizedOptions(DepthOptions):
    to: Count | None = None
    """Number of parameters to grow to, such as 10.7B; rounded to the nearest layer count."""
    layers_to: Positive | None = None
    """Number of layers to grow to."""


class DusOptions(SizedOptions):
    drop: Annotated[int, Field(ge=0)] | None = None
    """Layers dropped from the end of the first copy and the start of the second (m in the paper). Default: a quarter, as in SOLAR."""
    seam_average: Annotated[int, Field(ge=0)] = 0
    """Number of layers on each side of the seam that are weighted means of both copies."""


class StackOptions(SizedOptions):
    factor: Annotated[int, Field(ge=2, le=MAX_FACTOR)] | None = None
    """Number of copies of the whole stack (g in the paper). Default: 2."""


class InterleaveOptions(SizedOptions):
    """Default: every layer twice."""


class IdentityOptions(SizedOptions):
    """Default: a quarter more layers, as in LLaMA-Pro (32 to 40)."""

    at: LayerList | None = None
    """Source layers after which to insert a new block, such as 3,7,11 (repeat a number to insert two). Default: evenly spread."""


class LayersOptions(DepthOptions):
    layers: LayerList
    """Source layers of the target in order, such as 0-23,8-31 (inclusive)."""


def _evenly(n: int, target: int) -> list[LayerOrigin]:
    """LLaMA-Pro: the n layers in target - n groups, each followed by a new copy of its last layer."""
    extra = target - n
    after = [((k + 1) * n) // extra - 1 if extra <= n else k * n // extra for k in range(extra)]
    return _inserted(n, after)


def _inserted(n: int, after: Sequence[int]) -> list[LayerOrigin]:
    layers: list[LayerOrigin] = []
    times = Counter(after)
    for i in range(n):
        layers.append(LayerOrigin((i,)))
        layers.extend(LayerOrigin((i,), new=True, identity=True) for _ in range(times[i]))
    return layers


def from_indices(indices: Sequence[int]) -> list[LayerOrigin]:
    """The source layers with these indices; every copy after the first is new."""
    first = {i: at for at, i in reversed([*enumerate(indices)])}
    return [LayerOrigin((i,), new=at > first[i]) for at, i in enumerate(indices)]


def _crossfaded(layers: list[LayerOrigin], n: int, drop: int, width: int) -> list[LayerOrigin]:
    """Replaces the 2 * width layers around the seam by weighted means of both copies; the weight of the second rises linearly."""
    seam = n - drop
    if not width <= drop:
        raise PlanError(
            f"seam_average {width} needs layers that both copies still have: at most the {drop} dropped ones.",
            hint=f"Use --seam-average {drop} or less, or a larger --drop.",
        )
    for step in range(2 * width):
        at = seam - width + step
        second = (step + 1) / (2 * width + 1)
        layers[at] = LayerOrigin((at, at - seam + drop), (1 - second, second), new=layers[at].new)
    return layers


def _dus_layers(n: int, target: int) -> list[LayerOrigin]:
    drop = n - target // 2
    return from_indices([*range(n - drop), *range(drop, n)])


Layout = Callable[[int, int], list[LayerOrigin]]  # (source layers, target layers) -> blocks


def _target(
    arch: Architecture, options: SizedOptions, layout: Layout, reachable: Sequence[int], explicit: dict[str, int | None], default: int
) -> int:
    """The requested number of layers, from whichever option is given. Raises PlanError if the method cannot reach it."""
    asked = {k: v for k, v in {"to": options.to, "layers_to": options.layers_to, **explicit}.items() if v is not None}
    if len(asked) > 1:
        raise PlanError(f"{' and '.join('--' + k.replace('_', '-') for k in asked)} each set the number of layers; give one.")
    if options.to is None:
        target = options.layers_to or next((v for v in explicit.values() if v is not None), default)
        if target not in reachable:
            near = sorted(reachable, key=lambda r: (abs(r - target), r))[:4]
            raise PlanError(
                f"{target} layers cannot be reached from {arch.layers} by this method.",
                hint=f"Nearest layer counts: {', '.join(map(str, sorted(near)))}." if near else "",
            )
        return target
    sizes = _sizes(arch, layout, reachable)
    if not sizes:
        raise PlanError(f"A model of {arch.layers} layers cannot be grown by this method.")
    best = min(sizes, key=lambda r: abs(sizes[r] - options.to))  # type: ignore[operator]
    near = sorted(sorted(sizes, key=lambda r: abs(sizes[r] - options.to))[:5])  # type: ignore[operator]
    hint = "Reachable around it: " + ", ".join(f"{format_count(sizes[r])} ({r} layers)" for r in near) + "."
    check_target(count_parameters(arch).total, options.to, sizes[best], hint=hint)
    return best


def _sizes(arch: Architecture, layout: Layout, reachable: Sequence[int]) -> dict[int, int]:
    """Reachable number of layers -> parameters of the target."""
    blocks = block_parameters(arch)
    rest = count_parameters(arch).total - sum(blocks)
    if len(set(blocks)) == 1:
        return {r: rest + r * blocks[0] for r in reachable}
    return {r: rest + sum(blocks[o.sources[0]] for o in layout(arch.layers, r)) for r in reachable}


def _more(n: int) -> range:
    return range(n + 1, MAX_FACTOR * n + 1)


def _even(n: int) -> list[int]:
    return [s for s in range(n + 1, 2 * n + 1) if s % 2 == 0]


def _whole(n: int) -> list[int]:
    return [g * n for g in range(2, MAX_FACTOR + 1)]


def _repeat_all(n: int, target: int) -> list[LayerOrigin]:
    return from_indices([i % n for i in range(target)])


def _repeat_each(n: int, target: int) -> list[LayerOrigin]:
    return from_indices([i * n // target for i in range(target)])


def build_dus(arch: Architecture, options: DusOptions) -> Growth:
    n = arch.layers
    if options.drop is not None and 2 * options.drop >= n:
        raise PlanError(
            f"--drop {options.drop} leaves 2(n-m) = {2 * (n - options.drop)} layers of {n}: nothing grows.",
            hint=f"Use less than {n / 2:g}.",
        )
    explicit = None if options.drop is None else 2 * (n - options.drop)
    target = _target(arch, options, _dus_layers, _even(n), {"drop": explicit}, 2 * (n - n // 4))
    layers = _crossfaded(_dus_layers(n, target), n, n - target // 2, options.seam_average)
    why = (
        f"layers 0-{target // 2 - 1} are followed by a second pass through {n - target // 2}-{n - 1}; the loss is higher "
        "until pretraining has continued for a while"
    )
    return _build(arch, "dus", options, layers, Guarantee("changes the function", why))


def build_stack(arch: Architecture, options: StackOptions) -> Growth:
    n = arch.layers
    target = _target(arch, options, _repeat_all, _whole(n), {"factor": options.factor and options.factor * n}, 2 * n)
    return _build(
        arch, "stack", options, _repeat_all(n, target), Guarantee("changes the function", f"the whole stack runs {target // n} times")
    )


def build_interleave(arch: Architecture, options: InterleaveOptions) -> Growth:
    target = _target(arch, options, _repeat_each, _more(arch.layers), {}, 2 * arch.layers)
    why = "each repeated layer adds its contribution again"
    return _build(arch, "interleave", options, _repeat_each(arch.layers, target), Guarantee("changes the function", why))


def build_identity(arch: Architecture, options: IdentityOptions) -> Growth:
    n = arch.layers
    if options.at is not None:
        _check_layers(arch, options.at)
    explicit = None if options.at is None else n + len(options.at)
    target = _target(arch, options, _evenly, _more(n), {"at": explicit}, n + max(1, n // 4))
    layers = _evenly(n, target) if options.at is None else _inserted(n, options.at)
    why = "new blocks add exactly zero to the residual stream (o_proj and down_proj are zero)"
    return _build(arch, "identity", options, layers, Guarantee("lossless", why))


def build_layers(arch: Architecture, options: LayersOptions) -> Growth:
    _check_layers(arch, options.layers)
    same = options.layers == tuple(range(arch.layers))
    guarantee = Guarantee("lossless", "the same layers") if same else Guarantee("changes the function", "arbitrary list of layers")
    return _build(arch, "layers", options, from_indices(options.layers), guarantee)


def _check_layers(arch: Architecture, layers: Sequence[int]) -> None:
    wrong = sorted({i for i in layers if not 0 <= i < arch.layers})
    if wrong or not layers:
        raise PlanError(f"The source has layers 0-{arch.layers - 1}; not {', '.join(map(str, wrong)) or 'an empty list'}.")


def _build(arch: Architecture, method: str, options: DepthOptions, layers: list[LayerOrigin], guarantee: Guarantee) -> Growth:
    if wrong := [origin for origin in layers if not isinstance(origin, LayerOrigin)]:
        raise TypeError(f"The depth method {method} lists {wrong[0]!r} as a layer, which is not a LayerOrigin (from_indices makes them).")
    config = portable_config({**arch.config, "num_hidden_layers": len(layers), **rederived(arch, layers)})
    target = Architecture(config)
    used = {i for origin in layers for i in origin.sources}
    return Growth(
        method=method,
        options=options.non_defaults(),
        config=config,
        tensors={name: _tensor(arch, entry, layers, options.noise) for name, entry in target.tensors.items()},
        guarantee=guarantee,
        layers=tuple(layers),
        dropped={n: "its layer is not in the list" for n, e in arch.tensors.items() if e.layer >= 0 and e.layer not in used},
        warnings=tuple(_warnings(arch, target, layers)),
        seed=options.seed,
    )


def _tensor(arch: Architecture, entry: Entry, layers: Sequence[LayerOrigin], noise: float) -> Expr:
    if entry.layer < 0:
        return Source(entry.name)
    origin = layers[entry.layer]
    if origin.identity and entry.writes_residual:
        return Fill(entry.shape, 0.0)
    names = [entry.at(layer=i) for i in origin.sources]
    if any(name not in arch.tensors for name in names):
        raise PlanError(
            f"Layers {' and '.join(map(str, origin.sources))} cannot be averaged: one is dense, the other has experts.",
            hint="Use --seam-average 0.",
        )
    if len({arch.window(i) for i in origin.sources}) > 1:
        raise PlanError(
            f"Layers {' and '.join(map(str, origin.sources))} cannot be averaged: the attention of one has a sliding window.",
            hint="Use --seam-average 0.",
        )
    expr: Expr = Source(names[0]) if len(names) == 1 else Sum(tuple(map(Source, names)), origin.weights)
    if noise and origin.new and len(entry.shape) > 1:
        expr = Sum((expr, Noise(entry.shape, noise, entry.name, expr)), (1.0, 1.0))
    return expr


def _warnings(arch: Architecture, target: Architecture, layers: Sequence[LayerOrigin]) -> list[str]:
    out = []
    if len(layers) < arch.layers:
        out.append(f"The target is smaller than the source: {len(layers)} of {arch.layers} layers.")
    if not derives_layer_types(target):
        out.append(
            "Full and sliding attention alternate in the target: only readers of layer_types get it right "
            "(of Qwen2 and Qwen3, transformers 4.53 and later)."
        )
    return out


def _sized(
    options: type[SizedOptions], layout: Layout, reachable: Callable[[int], Sequence[int]]
) -> Callable[[Architecture, int], Options | None]:
    def nearest(arch: Architecture, target: int) -> Options | None:
        sizes = _sizes(arch, layout, reachable(arch.layers))
        return options(layers_to=min(sizes, key=lambda r: abs(sizes[r] - target))) if sizes else None

    return nearest


DEPTH_METHODS = (
    Method("dus", "depth", "depth up-scaling: layers [0, n-m), then [m, n)", "SOLAR 10.7B, arXiv 2312.15166", "changes the function", DusOptions, build_dus,
           _sized(DusOptions, _dus_layers, _even)),
    Method("stack", "depth", "the whole stack of layers g times", "G_stack, arXiv 2405.15319", "changes the function", StackOptions, build_stack,
           _sized(StackOptions, _repeat_all, _whole)),
    Method("interleave", "depth", "each layer repeated in place", "AquilaMoE, arXiv 2408.06567", "changes the function", InterleaveOptions, build_interleave,
           _sized(InterleaveOptions, _repeat_each, _more)),
    Method("identity", "depth", "new blocks that add zero, evenly spread", "LLaMA-Pro, arXiv 2401.02415", "lossless", IdentityOptions, build_identity,
           _sized(IdentityOptions, _evenly, _more)),
    Method("layers", "depth", "any list of layers, such as 0-23,8-31", "", "changes the function", LayersOptions, build_layers, lambda arch, target: None),
)  # fmt: skip
