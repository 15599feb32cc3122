"""Dense to mixture of experts.

copy          sparse upcycling (Komatsuzaki et al. 2023, arXiv 2212.05055): every expert is the dense FFN. With renormalised top-k weights the
              output is that FFN for any router and any k: lossless.
noise         copies with Gaussian noise. Changes the function slightly.
drop          Drop-Upcycling (Nakamura et al. 2025, arXiv 2502.19261, section 3): in every expert the same share r of intermediate units, one
              index set for its three matrices, is re-initialized from N(mean, std) of the replaced values. Changes the function.
fine-grained  G shards of the FFN as experts, G of them a virtual group with one router row, top_k = m G (He et al. 2024, arXiv 2410.07524,
              section 3). With renormalised weights down_proj must be multiplied by G (derived here): then lossless.
several       Branch-Train-MiX (Sukhbaatar et al. 2024, arXiv 2403.07816, section 3.2): the FFNs of several dense checkpoints become the experts,
              everything else is averaged. Changes the function.

A family with a shared expert (qwen2_moe) adds it for every token, times sigmoid(gate x), which is 1/2 for a zero gate: either the shared expert
is the FFN and the others have half its down_proj, or its down_proj is zero and the others are the FFN. Both sum to the FFN.

With even routing an expert gets 1/E of the dense FFN's gradient (`Share`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_grow.errors import PlanError
from hf_grow.growth.axes import AxisMap, AxisRun, merge_runs, select
from hf_grow.growth.growth import Growth, Guarantee, LayerOrigin
from hf_grow.growth.tensormap import Expr, Fill, Noise, Replace, Share, Source, Subset, Sum, Take
from hf_grow.methods.experts.expert_options import ExpertsOptions
from hf_grow.methods.experts.routers import check_router, new_rows, router_measurements
from hf_grow.model.architecture import Architecture, Entry
from hf_grow.model.config_compat import portable_config

_SAME = {"gate_proj": "gate_proj", "down_proj": "down_proj", "up_proj": "up_proj"}
_MIXTRAL = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}

# Dense family -> MoE family, its architecture, and for each expert tensor the dense one it comes from.
UPCYCLED: dict[str, tuple[str, str, dict[str, str]]] = {
    "llama": ("mixtral", "MixtralForCausalLM", _MIXTRAL),
    "mistral": ("mixtral", "MixtralForCausalLM", _MIXTRAL),
    "qwen2": ("qwen2_moe", "Qwen2MoeForCausalLM", _SAME),
    "qwen3": ("qwen3_moe", "Qwen3MoeForCausalLM", _SAME),
}


def dense_name(arch: Architecture, entry: Entry) -> str:
    """The dense FFN tensor that corresponds to an expert tensor of the MoE model `arch`."""
    part = entry.name.split(".")[-2]
    return f"model.layers.{entry.layer}.mlp.{_MIXTRAL.get(part, part)}.weight"


def upcycled(arch: Architecture, options: ExpertsOptions, others: Sequence[Architecture]) -> Growth:
    """The growth of a dense model. ``others``: architectures of the checkpoints in `options.experts_from`. Raises PlanError."""
    if arch.family.model_type not in UPCYCLED:
        raise PlanError(f"{arch.family.architecture} has no MoE counterpart in hf-grow.", hint=f"These have: {', '.join(UPCYCLED)}.")
    foreign = [n for n in ("copy_from", "add", "utility", "router_noise") if getattr(options, n)]
    if foreign:
        raise PlanError(f"--{foreign[0].replace('_', '-')} applies to MoE sources; this one is dense.")
    weights = _average(arch, options, others)
    experts = options.experts or (len(weights) if others else 0)
    shards = _shards(arch, options, experts)
    if experts % len(weights):
        raise PlanError(f"{experts} experts cannot be divided evenly among {len(weights)} checkpoints.")
    top_k = options.top_k or 2 * shards
    if top_k > experts or top_k % shards:
        what = f"a multiple of the {shards} shards, at most {experts}" if shards > 1 else f"at most the {experts} experts"
        raise PlanError(f"--top-k {top_k} must be {what}.")
    check_router(options, experts // shards)
    target = Architecture(upcycled_config(arch, experts, top_k, shards))
    made = _Upcycling(arch, options, target.size("experts"), shards, weights, target.size("shared_inter") > 0)
    return Growth(
        method="experts",
        options=options.non_defaults(),
        config=target.config,
        tensors={name: made.tensor(entry) for name, entry in target.tensors.items()},
        guarantee=_guarantee(options, shards, len(weights), target.size("shared_inter") > 0),
        layers=tuple(LayerOrigin((i,)) for i in range(arch.layers)),
        axes=made.axes,
        warnings=tuple(_notes(options, others)),
        seed=options.seed,
        measurements=router_measurements(options, target),
    )


def _average(arch: Architecture, options: ExpertsOptions, others: Sequence[Architecture]) -> tuple[float, ...]:
    """Normalized weight of each checkpoint in the average. Raises PlanError for checkpoints that cannot be merged."""
    for i, other in enumerate(others):
        ref = (options.experts_from or ())[i]
        if other.family is not arch.family:
            raise PlanError(f"{ref} is {other.family.architecture}; the source is {arch.family.architecture}.")
        for key in ("num_hidden_layers", "tie_word_embeddings", "rms_norm_eps", "rope_parameters", "rope_theta", "sliding_window"):
            mine, theirs = (portable_config(a.config).get(key, a.get(key)) for a in (arch, other))
            if mine != theirs:
                raise PlanError(f"{ref} has {key} {theirs}, the source {mine}; they cannot be merged.")
        sizes = {a: (arch.size(a), other.size(a)) for a in ("vocab", "hidden", "kv", "group", "head_dim", "inter")}
        for axis, (mine, theirs) in sizes.items():
            if mine != theirs:
                raise PlanError(f"{ref} has another shape: {axis} {theirs}, the source {mine}.")
    weights = options.weights or (1.0,) * (1 + len(others))
    if options.weights and not others:
        raise PlanError("--weights averages several checkpoints.", hint="Name the others with --experts-from.")
    if len(weights) != 1 + len(others) or not sum(weights):
        raise PlanError(f"--weights needs {1 + len(others)} numbers, the source's first, that are not all zero.")
    return tuple(w / sum(weights) for w in weights)


def _shards(arch: Architecture, options: ExpertsOptions, experts: int) -> int:
    if options.init != "fine-grained":
        if options.shards:
            raise PlanError("--shards requires --init fine-grained.")
        return 1
    shards = options.shards or 2
    if arch.size("inter") % shards or experts % shards:
        raise PlanError(
            f"{shards} shards must divide the FFN's {arch.size('inter')} units and the {experts} experts.",
            hint="Choose --shards and --experts accordingly.",
        )
    if options.experts_from:
        raise PlanError("--init fine-grained makes shards of one FFN; --experts-from names several.")
    return shards


def upcycled_config(arch: Architecture, experts: int, top_k: int, shards: int) -> dict[str, Any]:
    """The target config with all values explicit, since the defaults of the two families differ (eps, theta, window, kv heads)."""
    model_type, architecture, _ = UPCYCLED[arch.family.model_type]
    biased = [key for key in ("attention_bias", "mlp_bias") if arch.get(key)]
    if biased and model_type == "mixtral":
        raise PlanError(f"{architecture} has no biases; the source has {' and '.join(biased)}.")
    if arch.get("use_sliding_window"):
        raise PlanError(f"{architecture} does not support a sliding window in some layers only, as the source has.")
    inter = arch.size("inter") // shards
    config = {
        k: v for k, v in portable_config(arch.config).items() if k not in ("mlp_bias", "auto_map", "layer_types", "max_window_layers")
    }
    config |= {
        "model_type": model_type,
        "architectures": [architecture],
        "rms_norm_eps": arch.get("rms_norm_eps"),
        "sliding_window": arch.window(0),  # that of every layer; a key that the source's family ignores is none
        "num_experts_per_tok": top_k,
        "router_aux_loss_coef": 0.01,
        "output_router_logits": False,
    }
    if model_type == "mixtral":
        config |= {"num_local_experts": experts, "intermediate_size": inter}
        config.pop("attention_bias", None)
        return portable_config(config)
    config |= {
        "num_experts": experts,
        "moe_intermediate_size": inter,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": False,
        "sliding_window": None,
    }
    if model_type == "qwen2_moe":
        config |= {"qkv_bias": True, "shared_expert_intermediate_size": arch.size("inter")}
    else:
        config["num_local_experts"] = experts
    return portable_config(config)


class _Upcycling:
    """Builds the expressions of one upcycling; collects their axis maps in `axes`."""

    def __init__(
        self, arch: Architecture, options: ExpertsOptions, experts: int, shards: int, weights: tuple[float, ...], has_shared: bool
    ) -> None:
        self.arch, self.options, self.experts, self.shards, self.weights = arch, options, experts, shards, weights
        self.down = 0.5 if has_shared and options.shared_expert == "half" else 1.0
        """Fraction of the FFN's output that the routed experts contribute."""
        self.axes: dict[str, AxisMap] = {}

    def tensor(self, entry: Entry) -> Expr:
        if entry.name in self.arch.tensors:
            return self._averaged(entry.name)
        if ".shared_expert" in entry.name:
            return self._shared(entry)
        return self._router(entry) if entry.expert < 0 else self._expert(entry)

    def _averaged(self, name: str) -> Expr:
        if len(self.weights) == 1:
            return Source(name)
        return Sum(tuple(Source(name, str(i) if i else "") for i in range(len(self.weights))), self.weights)

    def _shared(self, entry: Entry) -> Expr:
        if entry.shape[0] == 1:  # the gate: sigmoid(0) is one half
            return Fill(entry.shape, 0.0)
        if self.options.shared_expert == "zero" and "down_proj" in entry.name:
            return Fill(entry.shape, 0.0)
        return Share(self._averaged(dense_name(self.arch, entry)), 1 - self.down)

    def _router(self, entry: Entry) -> Expr:
        """Router rows; for fine-grained experts one row per virtual group, repeated for its shards."""
        groups = self.experts // self.shards
        rows = new_rows(entry, groups, self.options)
        if self.shards == 1:
            return rows
        self.axes["router.groups"] = AxisMap(
            groups, merge_runs(AxisRun(g, 1) for g in range(groups) for _ in range(self.shards)), dual=False
        )
        return Take(rows, 0, "router.groups", "out")

    def _expert(self, entry: Entry) -> Expr:
        """An expert tensor with the gradient share 1/E of even routing; `Sum` applies the gain of down_proj to gradients as well."""
        origin = entry.expert % len(self.weights)
        source = Source(dense_name(self.arch, entry), str(origin) if origin else "")
        dim = 1 if source.name.endswith("down_proj.weight") else 0
        made = self._initial(entry, source, dim)
        gain = self.shards * self.down
        if dim == 0:
            return Share(made, self.shards * self.down / self.experts)
        return Share(made if gain == 1 else Sum((made,), (gain,)), 1 / (self.experts * gain))

    def _initial(self, entry: Entry, source: Source, dim: int) -> Expr:
        if self.shards > 1:
            size, name = self.arch.size("inter") // self.shards, f"shard{entry.expert % self.shards}"
            start = entry.expert % self.shards * size
            self.axes[name] = _undual(select(self.arch.size("inter"), range(start, start + size)))
            return Take(source, dim, name, "out")
        if self.options.init == "noise":
            return Sum((source, Noise(entry.shape, self.options.noise, entry.name, source)), (1.0, 1.0))
        return self._dropped(entry, source, dim) if self.options.init == "drop" else source

    def _dropped(self, entry: Entry, source: Source, dim: int) -> Expr:
        """Re-initializes a random subset of units, the same for the three matrices of an expert, from N(mean, std) of the replaced values."""
        count = int(self.options.drop * self.arch.size("inter"))
        if not count:
            return source
        units = f"drop.{entry.layer}.{entry.expert}"
        size = tuple(count if d == dim else n for d, n in enumerate(entry.shape))
        redrawn = Noise(size, 1.0, entry.name, Subset(source, dim, count, units), centered=False)
        return Replace(source, redrawn, dim, units)


def _undual(axis: AxisMap) -> AxisMap:
    return AxisMap(axis.source_size, axis.runs, dual=False)


def _guarantee(options: ExpertsOptions, shards: int, checkpoints: int, has_shared: bool) -> Guarantee:
    if checkpoints > 1:
        why = f"the experts come from {checkpoints} checkpoints, and all other tensors are averages"
        return Guarantee("changes the function", why)
    if options.init == "copy":
        what = "all experts are the dense FFN"
        if has_shared:
            what += (
                " with half its down_proj, the shared one does the other half"
                if options.shared_expert == "half"
                else ", the shared one adds zero"
            )
        return Guarantee("lossless", f"{what}, and the weights of the chosen ones add up to one")
    if options.init == "fine-grained":
        if options.router == "zeros":
            return Guarantee("changes the function", "with a router of zeros the chosen experts need not be whole groups of shards")
        return Guarantee(
            "lossless", f"whole groups of {shards} shards are chosen, and down_proj times {shards} makes up for their shared weight"
        )
    if options.init == "noise":
        return Guarantee("changes the function", f"every expert carries noise of {options.noise:g} standard deviations")
    return Guarantee("changes the function", f"{options.drop:.0%} of every expert's units are re-initialized")


def _notes(options: ExpertsOptions, others: Sequence[Architecture]) -> list[str]:
    notes = ["For training, set output_router_logits=True: without it the auxiliary loss that balances the experts is off."]
    if options.router == "zeros":
        notes.append(
            "With a zero router every token goes to the same experts, and the router gets no gradient from the language-modeling loss."
        )
    if options.init == "copy" and not others:
        notes.append("Equal experts differ only by the tokens they get; --init noise breaks the symmetry sooner.")
    return notes
