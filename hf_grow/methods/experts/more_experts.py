"""More experts for an MoE model.

Copying every expert and its router row n times with n times top_k is lossless: all copies of a chosen expert are chosen and share its weight.
More experts at the same top_k changes the function, since copies of a token's first choice displace its further ones. The experts to copy are
taken in turn, listed, or chosen by utility (Expert Upcycling, arXiv 2604.19835: squared gradient norms). New experts may also come from dense
checkpoints of the same shape; this changes the function.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from hf_grow.errors import PlanError
from hf_grow.growth.axes import AxisMap, AxisRun, merge_runs
from hf_grow.growth.growth import Growth, Guarantee, LayerOrigin
from hf_grow.growth.tensormap import Concat, Expr, Fill, Noise, Share, Source, Sum, Take
from hf_grow.methods.experts.expert_options import ExpertsOptions
from hf_grow.methods.experts.routers import check_router, is_router, new_rows, router_measurements
from hf_grow.methods.experts.upcycle import dense_name
from hf_grow.model.architecture import Architecture, Entry
from hf_grow.model.config_compat import portable_config


def more_experts(arch: Architecture, options: ExpertsOptions, others: Sequence[Architecture]) -> Growth:
    """The growth of an MoE model. ``others``: architectures of the dense checkpoints in `options.experts_from`. Raises PlanError."""
    old = arch.size("experts")
    new = options.experts or old + (options.add or len(others))
    top_k = options.top_k or arch.top_k
    _check(arch, options, new, top_k)
    for i, other in enumerate(others):
        _check_donor(arch, other, (options.experts_from or ())[i])
    origins = [[*range(old), *_chosen(arch, options, layer, new - old)] for layer in range(arch.layers)]
    alike = all(o == origins[0] for o in origins)
    check_router(options, new - old if others else 0)
    target = Architecture(portable_config({**arch.config, **experts_keys(arch, new), "num_experts_per_tok": top_k}))
    rows: dict[str, AxisMap] = {}
    tensors: dict[str, Expr] = {}
    for name, entry in target.tensors.items():
        origin = origins[max(entry.layer, 0)]
        if entry.expert >= 0:
            tensors[name] = _expert(arch, entry, origin, options, len(others))
        elif is_router(entry) and others:
            tensors[name] = Concat((Source(name), new_rows(entry, new - old, options)), 0)
        elif is_router(entry) and new > old:
            axis = "router.copies" if alike else f"router.copies.{entry.layer}"
            rows[axis] = AxisMap(old, merge_runs(AxisRun(i, 1, 1.0, 1.0 / origin.count(i)) for i in origin))
            tensors[name] = _router(entry, axis, old, options)
        else:
            tensors[name] = Source(name)
    return Growth(
        method="experts",
        options=options.non_defaults(),
        config=target.config,
        tensors=tensors,
        guarantee=_guarantee(arch, options, origins, top_k, len(others)),
        layers=tuple(LayerOrigin((i,)) for i in range(arch.layers)),
        axes=rows,
        seed=options.seed,
        measurements=router_measurements(options, target),
    )


def experts_keys(arch: Architecture, count: int) -> dict[str, int]:
    """Config keys that hold the number of experts."""
    key = arch.family.size_key("experts")
    return dict.fromkeys((key, *(alias for alias, canonical in arch.family.aliases.items() if canonical == key)), count)


def _check(arch: Architecture, options: ExpertsOptions, new: int, top_k: int) -> None:
    old = arch.size("experts")
    if options.init not in ("copy", "noise") or options.shards:
        raise PlanError(
            f"--init {options.init} makes experts from a dense FFN; the source is an MoE model.", hint="Use --init copy or noise."
        )
    if options.weights:
        raise PlanError("--weights averages dense checkpoints; the source is an MoE model.")
    if sum(bool(x) for x in (options.copy_from, options.utility, options.experts_from)) > 1:
        raise PlanError("--copy-from, --utility and --experts-from each say where new experts come from; give one.")
    if new < old or (new == old and top_k == arch.top_k):
        raise PlanError(f"The source has {old} experts, top {arch.top_k}; {new} experts, top {top_k}, is not a growth.")
    if top_k > new:
        raise PlanError(f"--top-k {top_k} is more than the {new} experts.")
    if options.utility and (len(options.utility) not in (1, arch.layers) or any(len(row) != old for row in options.utility)):
        raise PlanError(f"--utility must hold {old} numbers, or {arch.layers} lists of them.")
    if options.router != "normal" and not options.experts_from:
        raise PlanError("Copied experts keep the router rows of the experts they copy; --router does not apply.")


def _check_donor(arch: Architecture, other: Architecture, ref: str) -> None:
    """Raises PlanError for a checkpoint whose FFN cannot be an expert of this model."""
    if other.is_moe:
        raise PlanError(f"{ref} is an MoE model; new experts come from dense checkpoints.")
    pairs = {"layers": (arch.layers, other.layers), "hidden": (arch.size("hidden"), other.size("hidden"))}
    pairs |= {"FFN": (arch.size("expert_inter"), other.size("inter")), "vocab": (arch.size("vocab"), other.size("vocab"))}
    for what, (mine, theirs) in pairs.items():
        if mine != theirs:
            raise PlanError(f"{ref} does not fit: {what} {theirs}, the experts here have {mine}.")
    if other.get("mlp_bias"):
        raise PlanError(f"{ref} has biases in its FFN; experts have none.")


def _chosen(arch: Architecture, options: ExpertsOptions, layer: int, count: int) -> list[int]:
    """The experts that the new experts of a layer copy."""
    old = arch.size("experts")
    wrong = [i for i in options.copy_from or () if i >= old]
    if wrong:
        raise PlanError(f"The source has experts 0-{old - 1}; not {wrong[0]}.")
    if not options.utility:
        pool = list(options.copy_from or range(old))
        return [pool[i % len(pool)] for i in range(count)]
    useful = options.utility[layer % len(options.utility)]
    copies = [1] * old
    chosen = []
    for _ in range(count):  # D'Hondt apportionment
        best = max(range(old), key=lambda i: useful[i] / copies[i])
        copies[best] += 1
        chosen.append(best)
    return chosen


def _expert(arch: Architecture, entry: Entry, origin: Sequence[int], options: ExpertsOptions, donors: int) -> Expr:
    added = entry.expert - arch.size("experts")
    if added >= 0 and donors:
        source: Expr = Source(dense_name(arch, entry), str(1 + added % donors))
        copies = 1
    else:
        source, copies = Source(entry.at(expert=origin[entry.expert])), 1 if donors else origin.count(origin[entry.expert])
    if options.init == "noise" and added >= 0:
        source = Sum((source, Noise(entry.shape, options.noise, entry.name, source)), (1.0, 1.0))
    return source if copies == 1 else Share(source, 1 / copies)


def _router(entry: Entry, axis: str, old: int, options: ExpertsOptions) -> Expr:
    source = Source(entry.name)
    rows = Take(source, 0, axis, "out")
    if not options.router_noise:
        return rows
    added = Noise((entry.shape[0] - old, entry.shape[1]), options.router_noise, entry.name, source)
    return Sum((rows, Concat((Fill((old, entry.shape[1])), added), 0)), (1.0, 1.0))


def _guarantee(arch: Architecture, options: ExpertsOptions, origins: Sequence[Sequence[int]], top_k: int, donors: int) -> Guarantee:
    if donors:
        return Guarantee(
            "changes the function", f"new experts from other checkpoints contribute wherever their router rows are among the top {top_k}"
        )
    copies = {origin.count(i) for origin in origins for i in range(arch.size("experts"))}
    even = copies == {top_k // arch.top_k} and top_k % arch.top_k == 0
    added = [f"noise of {n:g} standard deviations" for n in (options.noise if options.init == "noise" else 0, options.router_noise) if n]
    if even and not added:
        return Guarantee(
            "lossless", "every expert and its router row is copied as often as top_k grows, so all copies of a chosen one are chosen"
        )
    if even:
        return Guarantee("changes the function", f"new experts carry {' and '.join(added)}; without it this would be lossless")
    n = max(2, math.ceil(len(origins[0]) / arch.size("experts")))
    if top_k == arch.top_k:
        why = f"copies of a token's first choices take the places of its further ones among the top {top_k}"
    else:
        why = f"copies are not as many as top_k grows ({arch.top_k} to {top_k}), so experts get other weights"
    return Guarantee("changes the function", f"{why}; lossless would be --experts {n * arch.size('experts')} --top-k {n * arch.top_k}")
