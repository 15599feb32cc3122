"""Expert growth: dense to MoE (`upcycle`), more experts (`more_experts`), and the number of experts for a target size."""

from __future__ import annotations

from collections.abc import Sequence

from hf_grow.errors import PlanError
from hf_grow.growth.growth import Growth, Method
from hf_grow.methods.experts.expert_options import MAX_EXPERTS, ExpertsOptions
from hf_grow.methods.experts.more_experts import experts_keys, more_experts
from hf_grow.methods.experts.upcycle import UPCYCLED, upcycled, upcycled_config
from hf_grow.model.architecture import Architecture
from hf_grow.model.param_count import check_target, count_parameters, format_count
from hf_grow.options import Options


def build_experts(arch: Architecture, options: ExpertsOptions, others: Sequence[Architecture] = ()) -> Growth:
    """``others``: the architectures of the checkpoints in `options.experts_from`."""
    asked = [n for n in ("experts", "add", "to") if getattr(options, n) is not None]
    if len(asked) > 1 or not (asked or others):
        raise PlanError(
            "Say how many experts, or the size to grow to: one of --experts, --add, --to and --experts-from.",
            hint="Such as --experts 8 --top-k 2.",
        )
    _check_meaning(arch, options)
    if options.to is not None:
        if others:
            raise PlanError("--to cannot be met with --experts-from.", hint="The checkpoints say how many experts there are.")
        count = _nearest_count(arch, options.to, options)
        unit = _unit(options)
        near = [c for c in (count - unit, count, count + unit) if max(2 * unit, arch.size("experts")) <= c <= MAX_EXPERTS]
        sizes = {c: count_parameters(_sized(arch, c, 1, unit)).total for c in near}
        hint = "Reachable around it: " + ", ".join(f"{format_count(s)} ({c} experts)" for c, s in sizes.items()) + "."
        check_target(count_parameters(arch).total, options.to, sizes[count], hint=hint)
        options = options.model_copy(update={"experts": count, "to": None})
    return (more_experts if arch.is_moe else upcycled)(arch, options, others)


def _check_meaning(arch: Architecture, options: ExpertsOptions) -> None:
    """Raises PlanError for an option that does not apply."""
    given = options.non_defaults()
    shared = not arch.is_moe and UPCYCLED.get(arch.family.model_type, ("",))[0] == "qwen2_moe"
    means = {
        "noise": (options.init == "noise", "requires --init noise"),
        "drop": (options.init == "drop", "requires --init drop"),
        "shared_expert": (shared, "applies to dense sources whose MoE family has a shared expert (qwen2)"),
        "prompt_pooling": (options.router == "prompts", "requires --router prompts"),
    }
    for name, (does, why) in means.items():
        if name in given and not does:
            raise PlanError(f"--{name.replace('_', '-')} {why}.")


def _sized(arch: Architecture, count: int, top_k: int, shards: int) -> Architecture:
    """The target architecture with `count` experts."""
    if arch.is_moe:
        return Architecture({**arch.config, **experts_keys(arch, count), "num_experts_per_tok": top_k})
    if arch.family.model_type not in UPCYCLED:
        raise PlanError(f"{arch.family.architecture} has no MoE counterpart in hf-grow.")
    return Architecture(upcycled_config(arch, count, top_k, shards))


def _unit(options: ExpertsOptions) -> int:
    """The number of experts is a multiple of this."""
    return options.shards or (2 if options.init == "fine-grained" else 1)


def _nearest_count(arch: Architecture, target: int, options: ExpertsOptions) -> int:
    """The number of experts whose total is nearest to `target`; every expert adds the same."""
    unit = _unit(options)
    two, three = (count_parameters(_sized(arch, n * unit, 1, unit)).total for n in (2, 3))
    count = 2 * unit + round((target - two) / (three - two)) * unit
    return min(max(count, 2 * unit, arch.size("experts")), MAX_EXPERTS // unit * unit)


def _nearest_top_k(arch: Architecture, count: int, active: int) -> int:
    """The top_k whose active parameters are nearest to `active`. (Shards are chosen in whole groups, so they give no finer steps.)"""
    return min(range(1, count + 1), key=lambda k: abs(count_parameters(_sized(arch, count, k, 1)).active - active))


def _for_size(arch: Architecture, target: int, active: int | None = None) -> Options | None:
    """The options nearest to `target` total parameters, and to `active` ones if given."""
    try:
        count = _nearest_count(arch, target, ExpertsOptions())
        top_k = _nearest_top_k(arch, count, active) if active else min(count, arch.top_k or 2)
        options = ExpertsOptions(experts=count, top_k=top_k)
        build_experts(arch, options)
    except PlanError:
        return None
    return options


EXPERTS = Method(
    "experts", "experts", "dense to MoE, or more experts", "sparse upcycling, arXiv 2212.05055", "lossless with copies", ExpertsOptions, build_experts, _for_size
)  # fmt: skip
