"""Width growth: every dimension of every tensor is mapped by its activation space, W' = A_out W B_in^T (see activation_maps).

tile          copies of the hidden state, then zeros; whole heads and units copied or null (LEMON's form, arXiv 2310.07999). Lossless for every size.
pad           the hidden state padded with zeros only. Lossless.
lemon         tile with scaled rms_norm_eps and an elementwise split of copies (LEMON, Wang et al. 2024, section 4). Lossless.
fpi           bert2BERT function-preserving initialization (Chen et al. 2022, ACL long 151, section 3.2): coordinates copied in turn, columns
              divided by the number of copies. Under RMSNorm lossless only if all are copied equally often.
aki           bert2BERT advanced knowledge initialization (section 3.3): added rows come from the next layer. Changes the function so much that
              the loss starts at the level of an untrained model (docs/methods.md). With --lossless (derived here): tile, whose null heads and FFN
              units have the input weights of the next layer's.
net2net       Net2WiderNet (Chen et al. 2016, arXiv 1511.05641, section 3.2): random duplication. Under RMSNorm as fpi.
hypercloning  whole tiles by an integer factor (Samragh et al. 2024, arXiv 2409.12903). Lossless; optional noise of opposite sign in the copies.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from hf_grow.errors import PlanError, SourceError
from hf_grow.growth.axes import AxisMap
from hf_grow.growth.growth import Growth, Guarantee, LayerOrigin, Method
from hf_grow.methods.width.activation_maps import HiddenSpaces, duplicated_hidden, ffn_space, tiled_hidden
from hf_grow.methods.width.attention_maps import head_dim_space, head_spaces
from hf_grow.methods.width.width_maps import Symmetry, WidthMaps
from hf_grow.methods.width.width_options import AkiOptions, CopyOptions, ExactOptions, HyperCloningOptions, LemonOptions, WidthOptions
from hf_grow.methods.width.width_search import Widths, check_widths, nearest_widths, width_warnings, widths_of
from hf_grow.model.architecture import Architecture
from hf_grow.model.config_compat import portable_config
from hf_grow.model.family import FFN_AXES
from hf_grow.options import Options


def _asked(arch: Architecture, options: WidthOptions) -> Widths:
    """The requested widths. Raises PlanError for contradictory options and for dimensions that the family does not have."""
    explicit = {
        "hidden": options.hidden,
        "inter": options.intermediate,
        "expert_inter": options.expert_intermediate,
        "shared_inter": options.shared_intermediate,
        "heads": options.heads,
        "kv": options.kv_heads,
        "head_dim": options.head_dim,
    }
    if options.intermediate and not arch.size("inter"):  # Mixtral has only the FFN of its experts
        if options.expert_intermediate:
            raise PlanError(
                f"{arch.family.architecture} has only the FFN of its experts: --intermediate and --expert-intermediate are the same; give one."
            )
        explicit["expert_inter"], explicit["inter"] = options.intermediate, None
    if options.expert_intermediate and not arch.size("expert_inter"):
        raise PlanError(f"{arch.family.architecture} has no experts; --expert-intermediate does not apply.")
    if options.shared_intermediate and not arch.size("shared_inter"):
        raise PlanError(f"{arch.family.architecture} has no shared expert; --shared-intermediate does not apply.")
    given = {k: v for k, v in explicit.items() if v is not None}
    if sum(x is not None for x in (options.to, options.factor)) + bool(set(given) - {"head_dim"}) > 1 and (options.to or given):
        raise PlanError("--to, --factor and explicit sizes each set the widths; give one kind.")
    old = widths_of(arch)
    if options.to is not None:
        return nearest_widths(arch, options.to, head_dim=options.head_dim)
    if options.factor is not None:
        return old.scaled(options.factor, options.head_dim)
    if not given:
        raise PlanError("Nothing to grow.", hint="Give --factor 2, --to 13B, or sizes such as --hidden 5120 --intermediate 16384.")
    return old.changed(**given)


def _build(
    arch: Architecture,
    method: str,
    options: WidthOptions,
    shape: Widths,
    hidden: HiddenSpaces,
    symmetry: Symmetry,
    strength: float,
    kind: str,
) -> Growth:
    old = widths_of(arch)
    head_dim = head_dim_space(old.head_dim, shape.head_dim, normed=arch.has_norm_over("head_dim"))
    above = kind == "lossless aki"
    null = {
        axis: above or options.ffn == "null" or (options.ffn == "auto" and getattr(shape, axis) < 2 * getattr(old, axis))
        for axis in FFN_AXES
    }
    heads = head_spaces(old.heads, old.kv, shape.heads, shape.kv, head_dim, null=above or options.new_heads == "null", above=above)
    check_widths(arch, shape)
    if shape.head_dim != old.head_dim:
        _check_rope(arch)
    config = _config(arch, shape, hidden.eps, head_dim.theta)
    width = WidthMaps(
        arch=arch,
        hidden=hidden,
        heads=heads,
        head_dim=head_dim,
        ffn={
            axis: ffn_space(axis, arch.size(axis), getattr(shape, axis), null=null[axis], above=above)
            for axis in FFN_AXES
            if arch.size(axis)
        },
        symmetry=symmetry,
        strength=strength,
        next_layer=kind == "aki",
    )
    axes: dict[str, AxisMap] = {}
    tensors = {name: width.tensor(entry, axes) for name, entry in arch.tensors.items()}
    return Growth(
        method=method,
        options=options.non_defaults(),
        config=config,
        tensors=tensors,
        guarantee=_guarantee(arch, shape, hidden, kind),
        layers=tuple(LayerOrigin((i,)) for i in range(arch.layers)),
        axes=axes,
        warnings=tuple(width_warnings(arch, shape)),
        seed=options.seed,
    )


def _config(arch: Architecture, shape: Widths, eps: float, theta: float) -> dict[str, Any]:
    changes: dict[str, Any] = {"hidden_size": shape.hidden, "num_attention_heads": shape.heads}
    for axis in ("kv", "head_dim", *FFN_AXES):
        if arch.size(axis):
            changes[arch.family.size_key(axis)] = getattr(shape, axis)
    config: dict[str, Any] = {**arch.config, **changes}
    if eps != 1.0:
        config["rms_norm_eps"] = arch.get("rms_norm_eps") * eps
    try:
        config = portable_config(config)
    except SourceError as error:
        raise PlanError(f"The target config cannot be built: {error.message}", hint=error.hint) from None
    if theta != 1.0:  # rope_theta^(d'/d) keeps the frequencies of the old pairs, which move to the front slots
        raised = float(config["rope_theta"]) ** theta
        config |= {"rope_theta": raised, "rope_parameters": {**config["rope_parameters"], "rope_theta": raised}}
    return config


def _check_rope(arch: Architecture) -> None:
    """Raises PlanError for rotary scaling that depends on a pair's index, since growth preserves only frequencies."""
    rope = arch.get("rope_scaling") or arch.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise PlanError(
            f"head_dim cannot grow exactly under {kind} rotary scaling.", hint="Remove --head-dim and grow the number of heads."
        )


def _guarantee(arch: Architecture, shape: Widths, hidden: HiddenSpaces, kind: str) -> Guarantee:
    old = widths_of(arch)
    if kind == "aki" and shape != old:
        why = "AKI takes added rows from the next layer, also in writers of the residual stream; --lossless keeps the function"
        return Guarantee("changes the function", why)
    if not hidden.lossless:
        whole = max(2, round(shape.hidden / old.hidden)) * old.hidden
        instead = "the method tile at any size" if kind == "net2net" else f"--hidden {whole}, or the method tile at any size"
        why = (
            f"hidden_size {old.hidden} -> {shape.hidden} copies some coordinates more often than others, which changes the RMSNorm; "
            f"for a lossless growth use {instead}"
        )
        return Guarantee("changes the function", why)
    if shape == old:
        return Guarantee("lossless", "nothing changes")
    reasons = []
    if shape.hidden != old.hidden:
        copies, pad = divmod(shape.hidden, old.hidden)
        reasons.append(f"hidden is {copies} x {old.hidden}" + (f" and {pad} zeros, compensated in RMSNorm" if pad else ""))
    if (shape.heads, shape.kv) != (old.heads, old.kv):
        reasons.append(
            f"heads {old.heads}/{old.kv} -> {shape.heads}/{shape.kv} keep their kv heads"
            + (", new ones have the input weights of the next layer's and add zero" if kind == "lossless aki" else "")
        )
    if any(getattr(shape, axis) != getattr(old, axis) for axis in FFN_AXES):
        reasons.append(
            "new FFN units have the input weights of the next layer's and add zero"
            if kind == "lossless aki"
            else "new FFN units are copies that share their output weights, or add zero"
        )
    if shape.head_dim != old.head_dim:
        reasons.append("every old rotary pair keeps its frequency")
    return Guarantee("lossless", "; ".join(reasons))


def build_exact(method: str) -> Any:
    def build(arch: Architecture, options: ExactOptions) -> Growth:
        shape, old = _asked(arch, options), arch.size("hidden")
        copies = 1 if method == "pad" else max(1, shape.hidden // old)
        if options.rms_mode == "eps" and shape.hidden != copies * old and arch.has_norm_over("head_dim"):
            raise PlanError(
                "--rms-mode eps changes rms_norm_eps, which the q and k norms of this family share: not exact.",
                hint="Use --rms-mode scale.",
            )
        _no_smaller(shape.hidden, old)
        hidden = tiled_hidden(old, shape.hidden, copies, mode=options.rms_mode)
        return _build(arch, method, options, shape, hidden, options.symmetry, options.strength, "exact")

    return build


def build_hypercloning(arch: Architecture, options: HyperCloningOptions) -> Growth:
    shape, old = _asked(arch, options), widths_of(arch)
    if old.kv == 1 and options.kv_heads is None:  # as in the paper's code: multi-query attention stays multi-query
        shape = shape.changed(kv=1)
    uneven = [a for a in ("hidden", *FFN_AXES, "heads", "kv") if getattr(shape, a) % max(1, getattr(old, a))]
    if uneven or shape.head_dim != old.head_dim:
        raise PlanError(
            f"HyperCloning grows by integer factors and keeps head_dim; {', '.join(uneven) or 'head_dim'} would not.",
            hint="Use --method tile.",
        )
    hidden = tiled_hidden(old.hidden, shape.hidden, shape.hidden // old.hidden, mode="scale")
    copies = options.model_copy(update={"ffn": "copies"})
    strength = 0.0 if options.noise_db is None else 10 ** (-options.noise_db / 20)
    growth = _build(arch, "hypercloning", copies, shape, hidden, "noise" if strength else "none", strength, "exact")
    return replace(growth, options=options.non_defaults())


def build_copies(method: str) -> Any:
    def build(arch: Architecture, options: CopyOptions) -> Growth:
        shape, old = _asked(arch, options), arch.size("hidden")
        if isinstance(options, AkiOptions) and options.fixed_kv:
            shape = shape.changed(kv=arch.size("kv"))
        _no_smaller(shape.hidden, old)
        if isinstance(options, AkiOptions) and options.lossless:
            for name in ("ffn", "new_heads"):
                if name in options.model_fields_set:
                    raise PlanError(
                        f"--{name.replace('_', '-')} does not apply with --lossless: new units come from the next layer and add zero."
                    )
            exact = ExactOptions.model_fields
            hidden = tiled_hidden(old, shape.hidden, max(1, shape.hidden // old), mode="scale")
            return _build(arch, method, options, shape, hidden, exact["symmetry"].default, exact["strength"].default, "lossless aki")
        if method == "net2net":
            draw = random.Random(f"{options.seed}/net2net/hidden")
            sources = [*range(old), *(draw.randrange(old) for _ in range(shape.hidden - old))]
        else:
            sources = [i % old for i in range(shape.hidden)]
        return _build(arch, method, options, shape, duplicated_hidden(old, sources), "none", 0.0, method)

    return build


def _no_smaller(new: int, old: int) -> None:
    if new < old:
        raise PlanError(f"hidden_size cannot shrink: {old} -> {new}.")


def explicit_sizes(arch: Architecture, shape: Widths) -> dict[str, int]:
    """The explicit width options for `shape`, without those that change nothing."""
    names = {
        "hidden": "hidden",
        "inter": "intermediate",
        "expert_inter": "expert_intermediate",
        "shared_inter": "shared_intermediate",
        "heads": "heads",
        "kv": "kv_heads",
    }
    old = widths_of(arch)
    changed = {n: getattr(shape, a) for a, n in names.items() if getattr(shape, a) != getattr(old, a)}
    if "expert_intermediate" in changed and not old.inter:
        changed["intermediate"] = changed.pop("expert_intermediate")
    return changed


def _for_size(options: type[WidthOptions], *, whole: bool) -> Any:
    def nearest(arch: Architecture, target: int) -> Options | None:
        try:
            shape = nearest_widths(arch, target, whole=whole, strict=False)
        except PlanError:
            return None
        changed = explicit_sizes(arch, shape)
        return options(**changed) if changed else None

    return nearest


def _method(
    name: str, summary: str, paper: str, guarantee: str, options: type[WidthOptions], build: Any, *, listed: bool = False
) -> Method:
    """``listed``: shown by `hf-grow plan`; the others reach the same sizes."""
    search = _for_size(options, whole=name == "hypercloning") if listed else lambda arch, target: None
    return Method(name, "width", summary, paper, guarantee, options, build, search)


WIDTH_METHODS = (
    _method("tile", "copies, then zeros; any size", "LEMON, arXiv 2310.07999", "lossless", ExactOptions, build_exact("tile"), listed=True),
    _method("pad", "zero padding; any size", "", "lossless", ExactOptions, build_exact("pad")),
    _method("lemon", "tile with scaled eps and an uneven split", "LEMON, arXiv 2310.07999", "lossless", LemonOptions, build_exact("lemon")),
    _method("fpi", "coordinates copied in turn", "bert2BERT, ACL 2022 long 151", "lossless at whole factors", CopyOptions, build_copies("fpi")),
    _method("aki", "added rows from the next layer", "bert2BERT, ACL 2022 long 151", "changes the function; not with --lossless", AkiOptions, build_copies("aki"), listed=True),
    _method("net2net", "random duplication", "Net2Net, arXiv 1511.05641", "FFN and heads only", CopyOptions, build_copies("net2net")),
    _method("hypercloning", "whole tiles, noise in dB", "HyperCloning, arXiv 2409.12903", "lossless", HyperCloningOptions, build_hypercloning, listed=True),
)  # fmt: skip
