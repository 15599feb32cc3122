"""Experts: a dense model into a mixture of experts, and more experts for a mixture.

copy          sparse upcycling (Komatsuzaki et al. 2023, arXiv 2212.05055): every expert is the dense FFN. With renormalised top-k weights the
              output is that FFN whatever the router says: lossless for any router and any k.
noise         copies with Gaussian noise. Changes the function, a little.
drop          Drop-Upcycling (Nakamura et al. 2025, arXiv 2502.19261, section 3): in every expert the same share r of intermediate units, one
              index set for its three matrices, is redrawn from N(mean, std) of what it replaces. Changes the function.
fine-grained  G shards of the FFN as experts, G of them a virtual group with one router row, top_k = m G (He et al. 2024, arXiv 2410.07524,
              section 3). With renormalised weights down_proj must be multiplied by G (derived here): then lossless.

From a mixture: n times the experts **and** n times top_k, as copies with their router rows, is lossless, since all copies of a chosen expert are
chosen and share its weight. More experts at the same top_k changes the function: there is no router bias to keep them out with.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from hf_grow.architecture import Architecture, Entry
from hf_grow.axes import AxisMap, Run, joined, select
from hf_grow.errors import PlanError
from hf_grow.growth import Growth, Guarantee, LayerOrigin, Method
from hf_grow.methods.sizing import measure
from hf_grow.portable import portable_config
from hf_grow.recipe import LayerList, Options, Size
from hf_grow.tensormap import Expr, Fill, Noise, Source, Sum, Take

# Dense family -> its family of experts, and for each tensor of an expert the one it comes from.
UPCYCLED: dict[str, tuple[str, str, dict[str, str]]] = {
    "llama": ("mixtral", "MixtralForCausalLM", {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}),
    "mistral": ("mixtral", "MixtralForCausalLM", {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}),
    "qwen3": ("qwen3_moe", "Qwen3MoeForCausalLM", {"gate_proj": "gate_proj", "down_proj": "down_proj", "up_proj": "up_proj"}),
}
MOST_EXPERTS = 1024

Positive = Annotated[int, Field(ge=1)]


class ExpertsOptions(Options):
    """From dense to experts, or to more experts."""

    experts: Annotated[int, Field(ge=2, le=MOST_EXPERTS)] | None = None
    """Number of experts of the target."""
    to: Size | None = None
    """Total parameters to grow to, instead of a number of experts."""
    top_k: Positive | None = None
    """Experts a token passes through. Default: 2 from dense (times the shards, fine-grained); the source's from a mixture."""
    init: Literal["copy", "noise", "drop", "fine-grained"] = "copy"
    """What the experts begin as: copies of the FFN, noisy copies, copies with redrawn units (Drop-Upcycling), or shards of it."""
    noise: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Noise of init noise, in standard deviations of each matrix."""
    drop: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of intermediate units redrawn by init drop (r of the paper)."""
    shards: Annotated[int, Field(ge=2)] | None = None
    """Shards of the FFN for init fine-grained (G of the paper); the number of experts must be a multiple."""
    router: Literal["normal", "zeros"] = "normal"
    """New router: normal with router_std, or zeros (then every token goes to the same experts, and the router learns nothing at first)."""
    router_std: Annotated[float, Field(gt=0, le=1)] = 0.02
    """Standard deviation of a normal router."""
    copy_from: LayerList | None = None
    """From a mixture: the experts that are copied for the new ones, such as 0,3,5, in turn. Default: all in turn."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of everything random."""


def build_experts(arch: Architecture, options: ExpertsOptions) -> Growth:
    if (options.experts is None) == (options.to is None):
        raise PlanError("Say how many experts, or the size to grow to: one of --experts and --to.", hint="Such as --experts 8 --top-k 2.")
    if options.to is not None:
        count = _nearest_count(arch, options.to, options)
        options = options.model_copy(update={"experts": count, "to": None})
    return _more(arch, options) if arch.is_moe else _upcycled(arch, options)


# From dense


def _upcycled(arch: Architecture, options: ExpertsOptions) -> Growth:
    if arch.family.model_type not in UPCYCLED:
        raise PlanError(f"{arch.family.architecture} has no family of experts here.", hint=f"These have: {', '.join(UPCYCLED)}.")
    if options.copy_from:
        raise PlanError("--copy-from chooses among the experts of a mixture; the source is dense.")
    experts = options.experts or 0
    shards = _shards(arch, options)
    top_k = options.top_k or 2 * shards
    if top_k > experts or top_k % shards:
        what = f"a multiple of the {shards} shards, at most {experts}" if shards > 1 else f"at most the {experts} experts"
        raise PlanError(f"--top-k {top_k} must be {what}.")
    config = _upcycled_config(arch, experts, top_k, shards)
    axes: dict[str, AxisMap] = {}
    names = UPCYCLED[arch.family.model_type][2]
    tensors = {name: _upcycled_tensor(arch, entry, names, options, shards, axes) for name, entry in Architecture(config).tensors.items()}
    return Growth(
        method="experts",
        options=options.given(),
        config=config,
        tensors=tensors,
        guarantee=_dense_guarantee(options, shards),
        layers=tuple(LayerOrigin((i,)) for i in range(arch.layers)),
        axes=axes,
        warnings=tuple(_training_notes(options)),
        seed=options.seed,
    )


def _shards(arch: Architecture, options: ExpertsOptions) -> int:
    if options.init != "fine-grained":
        if options.shards:
            raise PlanError("--shards belongs to --init fine-grained.")
        return 1
    shards = options.shards or 2
    if arch.size("inter") % shards or (options.experts or 0) % shards:
        raise PlanError(
            f"{shards} shards must divide the FFN's {arch.size('inter')} units and the {options.experts} experts.",
            hint="Choose --shards and --experts accordingly.",
        )
    return shards


def _upcycled_config(arch: Architecture, experts: int, top_k: int, shards: int) -> dict[str, Any]:
    """Everything explicit: the defaults of the two families differ (eps, theta, window, kv heads)."""
    model_type, architecture, _ = UPCYCLED[arch.family.model_type]
    biased = [key for key in ("attention_bias", "mlp_bias") if arch.get(key)]
    if biased and model_type == "mixtral":
        raise PlanError(f"{architecture} has no biases; the source has {' and '.join(biased)}.")
    if arch.get("use_sliding_window"):
        raise PlanError(f"{architecture} cannot look through a sliding window in some layers only, as the source does.")
    inter = arch.size("inter") // shards
    config = {
        k: v for k, v in portable_config(arch.config).items() if k not in ("mlp_bias", "auto_map", "layer_types", "max_window_layers")
    }
    config |= {
        "model_type": model_type,
        "architectures": [architecture],
        "rms_norm_eps": arch.get("rms_norm_eps"),
        "sliding_window": arch.get("sliding_window"),
        "num_local_experts": experts,
        "num_experts_per_tok": top_k,
        "router_aux_loss_coef": 0.01,
        "output_router_logits": False,
    }
    if model_type == "mixtral":
        config |= {"intermediate_size": inter}
        config.pop("attention_bias", None)
    else:
        config |= {
            "moe_intermediate_size": inter,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "use_sliding_window": False,
        }
        config["sliding_window"] = None
    return portable_config(config)


def _upcycled_tensor(
    arch: Architecture, entry: Entry, names: dict[str, str], options: ExpertsOptions, shards: int, axes: dict[str, AxisMap]
) -> Expr:
    if entry.name in arch.tensors:
        return Source(entry.name)
    if entry.expert < 0:
        return _router(entry, options, shards, axes)
    part = entry.name.split(".")[-2]
    source = Source(f"model.layers.{entry.layer}.mlp.{names[part]}.weight")
    dim = 1 if names[part] == "down_proj" else 0
    if shards > 1:
        return _shard(arch, source, dim, entry.expert % shards, shards, axes)
    if options.init == "noise":
        return Sum((source, Noise(entry.shape, options.noise, entry.name, source)), (1.0, 1.0))
    return _dropped(arch, entry, source, dim, options, axes) if options.init == "drop" else source


def _router(entry: Entry, options: ExpertsOptions, shards: int, axes: dict[str, AxisMap]) -> Expr:
    """A new router; under fine-grained experts one row for each virtual group, repeated for its shards."""
    if options.router == "zeros":
        return Fill(entry.shape, 0.0)
    groups = entry.shape[0] // shards
    rows = Noise((groups, entry.shape[1]), options.router_std, entry.name)
    if shards == 1:
        return rows
    axes["router.groups"] = AxisMap(groups, joined(Run(g, 1) for g in range(groups) for _ in range(shards)), dual=False)
    return Take(rows, 0, "router.groups", "out")


def _shard(arch: Architecture, source: Source, dim: int, shard: int, shards: int, axes: dict[str, AxisMap]) -> Expr:
    inter = arch.size("inter")
    size, name = inter // shards, f"shard{shard}"
    axes[name] = _undual(select(inter, range(shard * size, (shard + 1) * size)))
    taken = Take(source, dim, name, "out")
    return Sum((taken,), (float(shards),)) if dim == 1 else taken  # the weights of a group add up to 1/G of what they must


def _dropped(arch: Architecture, entry: Entry, source: Source, dim: int, options: ExpertsOptions, axes: dict[str, AxisMap]) -> Expr:
    """The kept units, plus the redrawn ones in their places; one index set for the three matrices of an expert."""
    inter = arch.size("inter")
    draw = random.Random(f"{options.seed}/drop/{entry.layer}/{entry.expert}")
    gone = sorted(draw.sample(range(inter), int(options.drop * inter)))
    if not gone:
        return source
    away, prefix = set(gone), f"drop.{entry.layer}.{entry.expert}"
    axes[f"{prefix}.kept"] = AxisMap(inter, joined(Run(None, 1, 0, 0) if i in away else Run(i, 1) for i in range(inter)), dual=False)
    axes[f"{prefix}.gone"] = _undual(select(inter, gone))
    place = {unit: at for at, unit in enumerate(gone)}
    axes[f"{prefix}.placed"] = AxisMap(
        len(gone), joined(Run(place[i], 1) if i in away else Run(None, 1, 0, 0) for i in range(inter)), dual=False
    )
    size = list(entry.shape)
    size[dim] = len(gone)
    replaced = Take(source, dim, f"{prefix}.gone", "out")
    redrawn = Noise(tuple(size), 1.0, entry.name, replaced, centered=False)
    return Sum((Take(source, dim, f"{prefix}.kept", "out"), Take(redrawn, dim, f"{prefix}.placed", "out")), (1.0, 1.0))


def _undual(axis: AxisMap) -> AxisMap:
    return AxisMap(axis.source_size, axis.runs, dual=False)


def _dense_guarantee(options: ExpertsOptions, shards: int) -> Guarantee:
    if options.init == "copy":
        return Guarantee("lossless", "all experts are the dense FFN, and the weights of the chosen ones add up to one")
    if options.init == "fine-grained":
        if options.router == "zeros":
            return Guarantee("changes the function", "with a router of zeros the chosen experts need not be whole groups of shards")
        return Guarantee(
            "lossless", f"whole groups of {shards} shards are chosen, and down_proj times {shards} makes up for their shared weight"
        )
    if options.init == "noise":
        return Guarantee("changes the function", f"every expert carries noise of {options.noise:g} standard deviations")
    return Guarantee("changes the function", f"{options.drop:.0%} of every expert's units are redrawn")


def _training_notes(options: ExpertsOptions) -> list[str]:
    notes = ["For training, set output_router_logits=True: without it the auxiliary loss that balances the experts is off."]
    if options.router == "zeros":
        notes.append(
            "With a router of zeros every token goes to the same experts, and the language model's gradient on the router is zero."
        )
    if options.init == "copy":
        notes.append("Equal experts get equal gradients up to their tokens; a little noise (--init noise) tells them apart sooner.")
    return notes


# From a mixture


def _more(arch: Architecture, options: ExpertsOptions) -> Growth:
    old, new = arch.size("experts"), options.experts or 0
    top_k = options.top_k or arch.top_k
    if options.init not in ("copy", "noise") or options.shards:
        raise PlanError(f"--init {options.init} makes experts of a dense FFN; the source is a mixture.", hint="Use --init copy or noise.")
    if new < old or (new == old and top_k == arch.top_k):
        raise PlanError(f"The source has {old} experts, top {arch.top_k}; {new} experts, top {top_k}, are no growth.")
    if top_k > new:
        raise PlanError(f"--top-k {top_k} is more than the {new} experts.")
    chosen = _copied_experts(old, new, options.copy_from)
    config = portable_config(
        {**arch.config, **dict.fromkeys(("num_local_experts", *arch.family.aliases), new), "num_experts_per_tok": top_k}
    )
    origin = [*range(old), *chosen]
    rows = {"router.copies": AxisMap(old, joined(Run(i, 1) for i in origin), dual=False)}
    tensors: dict[str, Expr] = {}
    for name, entry in Architecture(config).tensors.items():
        if entry.expert >= 0:
            source = Source(entry.at(expert=origin[entry.expert]))
            noisy = options.init == "noise" and entry.expert >= old
            tensors[name] = Sum((source, Noise(entry.shape, options.noise, name, source)), (1.0, 1.0)) if noisy else source
        elif entry.spec.dims[0].axes == ("experts",):
            tensors[name] = Take(Source(name), 0, "router.copies", "out")
        else:
            tensors[name] = Source(name)
    return Growth(
        method="experts",
        options=options.given(),
        config=config,
        tensors=tensors,
        guarantee=_mixture_guarantee(arch, options, origin, top_k),
        layers=tuple(LayerOrigin((i,)) for i in range(arch.layers)),
        axes=rows if new > old else {},
        warnings=(),
        seed=options.seed,
    )


def _copied_experts(old: int, new: int, chosen: Sequence[int] | None) -> list[int]:
    wrong = [i for i in chosen or () if i >= old]
    if wrong:
        raise PlanError(f"The source has experts 0-{old - 1}; not {wrong[0]}.")
    pool = list(chosen or range(old))
    return [pool[i % len(pool)] for i in range(new - old)]


def _mixture_guarantee(arch: Architecture, options: ExpertsOptions, origin: Sequence[int], top_k: int) -> Guarantee:
    copies = {origin.count(i) for i in range(arch.size("experts"))}
    if copies == {top_k // arch.top_k} and top_k % arch.top_k == 0 and options.init == "copy":
        return Guarantee(
            "lossless", "every expert and its router row is copied as often as top_k grows, so all copies of a chosen one are chosen"
        )
    if options.init == "noise" and copies == {top_k // arch.top_k}:
        return Guarantee(
            "changes the function", f"new experts carry noise of {options.noise:g} standard deviations; without it this would be lossless"
        )
    n = max(2, round(len(origin) / arch.size("experts")))
    why = f"the router's choice changes; lossless would be --experts {n * arch.size('experts')} --top-k {n * arch.top_k}"
    return Guarantee("changes the function", why)


def _nearest_count(arch: Architecture, target: int, options: ExpertsOptions) -> int:
    """The number of experts whose total comes nearest to `target`; every expert adds the same."""
    unit = options.shards or (2 if options.init == "fine-grained" else 1)
    sizes = []
    for count in (2 * unit, 3 * unit):
        if arch.is_moe:
            config = {**arch.config, **dict.fromkeys(("num_local_experts", *arch.family.aliases), count), "num_experts_per_tok": 1}
        else:
            if arch.family.model_type not in UPCYCLED:
                raise PlanError(f"{arch.family.architecture} has no family of experts here.")
            config = _upcycled_config(arch, count, unit, unit)
        sizes.append(measure(Architecture(config)).total)
    each = (sizes[1] - sizes[0]) / unit
    count = 2 * unit + round((target - sizes[0]) / each / unit) * unit
    return min(max(count, 2 * unit, arch.size("experts")), MOST_EXPERTS)


def _for_size(arch: Architecture, target: int) -> Options | None:
    if not arch.is_moe and arch.family.model_type not in UPCYCLED:
        return None
    try:
        count = _nearest_count(arch, target, ExpertsOptions())
        options = ExpertsOptions(experts=count, top_k=min(count, arch.top_k or 2))
        build_experts(arch, options)
    except PlanError:
        return None
    return options


EXPERTS = Method(
    "experts", "experts", "dense to experts, or more experts", "sparse upcycling, arXiv 2212.05055", "lossless with copies", ExpertsOptions, build_experts, _for_size
)  # fmt: skip
