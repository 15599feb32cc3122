"""The plan: a growth bound to one source checkpoint, checked, with sizes. Needs no weights and no torch.

`make_plan` rejects, before anything is written: a source whose tensors do not match its config, expressions whose shapes do not match the
target config, source tensors that would be lost without being listed as dropped, and lossless growths with axis maps that are not exact.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from hf_grow.errors import PlanError, SourceError
from hf_grow.growth.axes import AxisMap
from hf_grow.growth.growth import Growth, Guarantee, LayerOrigin
from hf_grow.growth.source_info import SourceInfo, TensorInfo
from hf_grow.growth.tensormap import Expr, Scope, Share, Source
from hf_grow.growth.tensormap_json import from_json, to_json
from hf_grow.model.architecture import Architecture
from hf_grow.model.family import DERIVED_BUFFERS
from hf_grow.model.param_count import ModelSize, count_parameters, extrapolation_warnings

FORMAT = 1
"""Version of growth.json, increased when an older reader would misunderstand a newer file."""

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@dataclass(frozen=True)
class GrowthPlan:
    """A growth bound to its source; made by `make_plan` or read by `from_json`."""

    source: SourceInfo
    growth: Growth
    targets: Mapping[str, TensorInfo]
    """Dtype and shape of every target tensor, in checkpoint order."""

    @cached_property
    def architecture(self) -> Architecture:
        return Architecture(self.growth.config)

    @property
    def guarantee(self) -> Guarantee:
        return self.growth.guarantee

    @cached_property
    def sizes(self) -> tuple[ModelSize, ModelSize]:
        """Parameter counts of source and target."""
        return count_parameters(self.source.architecture), count_parameters(self.architecture)

    @property
    def nbytes(self) -> int:
        """Bytes of the target's weights."""
        return sum(t.nbytes for t in self.targets.values())

    @property
    def source_nbytes(self) -> int:
        """Bytes of the weights of all source checkpoints."""
        return sum(t.nbytes for t in self.source.by_key.values())

    def copies(self) -> dict[str, str]:
        """Target tensors that are byte copies -> `Source.key`."""
        bare = {name: e.of if isinstance(e, Share) else e for name, e in self.growth.tensors.items()}
        return {n: e.key for n, e in bare.items() if isinstance(e, Source) and self.targets[n] == self.source.by_key[e.key]}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that determines the output, to recognize a partial output of the same plan."""
        data = {k: v for k, v in self.to_json().items() if k != "hf_grow"}
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """The plan as growth.json stores it (docs/growth-json.md)."""
        g = self.growth
        return {
            "format": FORMAT,
            "source": self.source.to_json(),
            "growth": {
                "method": g.method,
                "options": dict(g.options),
                "seed": g.seed,
                "guarantee": asdict(g.guarantee),
                "layers": [asdict(layer) for layer in g.layers],
                "axes": {n: a.to_json() for n, a in g.axes.items()},
                "dropped": dict(g.dropped),
                "warnings": list(g.warnings),
                **({"data": dict(g.data)} if g.data else {}),
            },
            "target": {
                "config": dict(g.config),
                "tensors": {n: [t.dtype, list(t.shape), to_json(g.tensors[n])] for n, t in self.targets.items()},
            },
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> GrowthPlan:
        """The plan in a growth.json, which is untrusted. Raises SourceError."""
        if "format" not in data:
            raise SourceError("growth.json is damaged: it does not say its format.")
        if data["format"] != FORMAT:
            raise SourceError(f"growth.json has format {data.get('format')!r}; this version reads {FORMAT}.", hint="Update hf-grow.")
        try:
            g, t = data["growth"], data["target"]
            layers = tuple(LayerOrigin(tuple(o["sources"]), tuple(o["weights"]), bool(o["new"]), bool(o["identity"])) for o in g["layers"])
            growth = Growth(
                method=g["method"],
                options=dict(g["options"]),
                config=dict(t["config"]),
                tensors={n: from_json(e) for n, (_, _, e) in t["tensors"].items()},
                guarantee=Guarantee(**g["guarantee"]),
                layers=layers,
                axes={n: AxisMap.from_json(a) for n, a in g["axes"].items()},
                dropped=dict(g["dropped"]),
                warnings=tuple(g["warnings"]),
                seed=g["seed"],
                data={str(k): str(v) for k, v in g.get("data", {}).items()},
            )
            plan = GrowthPlan(
                SourceInfo.from_json(data["source"]),
                growth,
                {n: TensorInfo.from_json(d, shape) for n, (d, shape, _) in t["tensors"].items()},
            )
            _check_names(plan)
            return plan
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise SourceError(f"growth.json is damaged: {error!r}.") from None


def _check_names(plan: GrowthPlan) -> None:
    """Raises ValueError for a stored plan that reads or makes tensors it does not list, or with texts of other types."""
    arch = plan.architecture
    if arch.count != len(plan.targets) or arch.tensors.keys() != plan.targets.keys():
        raise ValueError(f"its config describes {arch.count} tensors, and it lists {len(plan.targets)} others")
    for name, expr in plan.growth.tensors.items():
        unknown = {s.key for s in expr.sources()} - plan.source.by_key.keys() | set(expr.axis_names()) - plan.growth.axes.keys()
        if unknown:
            raise ValueError(f"{name} is made of {min(unknown)}, which does not exist")
    if not all(isinstance(text, str) for text in (plan.growth.method, plan.source.ref, plan.source.revision, *plan.growth.warnings)):
        raise ValueError("its method, source and warnings must be text")


def check_source(source: SourceInfo) -> dict[str, str]:
    """The tensors of a source that its config does not list but that may be dropped, with the reason. Raises SourceError for any other mismatch."""
    if (count := source.architecture.count) > 2 * len(source.tensors) + 100:
        raise SourceError(
            f"config.json of {source.ref} describes {count} tensors ({source.architecture.layers} layers), but the files have {len(source.tensors)}.",
            hint="Check num_hidden_layers, the number of experts, and that no shard is missing.",
        )
    expected = source.architecture.tensors
    extra: dict[str, str] = {}
    unknown = []
    for name in source.tensors.keys() - expected.keys():
        if name.endswith(DERIVED_BUFFERS):
            extra[name] = "a buffer that loaders recompute"
        elif name == HEAD and source.architecture.tied:
            later = "tied to the embedding (tie_word_embeddings); compared when the weights are read, and kept if it differs"
            extra[name] = "equal to the embedding, to which it is tied" if source.head else later
        else:
            unknown.append(name)
    missing = [n for n in expected if n not in source.tensors]
    if missing or unknown:
        lines = []
        if missing:
            lines.append(f"{len(missing)} missing: {_first_names(missing)}")
        if unknown:
            lines.append(f"{len(unknown)} unknown: {_first_names(sorted(unknown))}")
        raise SourceError(
            f"The weights of {source.ref} do not match its config.json "
            f"({source.architecture.family.architecture}, {source.architecture.layers} layers): {'; '.join(lines)}.",
            hint="Check num_hidden_layers, tie_word_embeddings and that no shard is missing; "
            "a base model without a head must be saved as ...ForCausalLM first.",
        )
    for name, entry in expected.items():
        if source.tensors[name].shape != entry.shape:
            raise SourceError(f"{name} has shape {list(source.tensors[name].shape)}, but config.json implies {list(entry.shape)}.")
    return extra


def untied_head_warning(ref: str) -> str:
    """Warning for a checkpoint whose config.json ties a head that differs from the embedding."""
    return (
        f"config.json of {ref} ties the head to the embedding, but the stored {HEAD} differs. It is kept and the result is untied, as "
        "transformers 5 loads it; transformers 4 used the embedding instead. (For that, remove the stored head.)"
    )


def make_plan(source: SourceInfo, growth: Growth) -> GrowthPlan:
    """Binds a growth to its source and checks both. Raises SourceError if the source does not match its config, PlanError if the growth does
    not fit the source or its own target config.
    """
    extra = check_source(source)
    for other in source.donors.values():
        check_source(other)
    own = [untied_head_warning(s.ref) for s in (source, *source.donors.values()) if s.head == "own"]
    growth = replace(growth, dropped={**growth.dropped, **extra}, warnings=(*growth.warnings, *own))
    scope = Scope(source.scope_shapes, growth.axes)
    try:
        target = Architecture(growth.config)
    except SourceError as error:
        raise PlanError(f"The target config cannot be built: {error.message}", hint=error.hint) from None
    expected = target.tensors
    growth = replace(growth, warnings=(*growth.warnings, *extrapolation_warnings(source.architecture, target)))
    if growth.tensors.keys() != expected.keys():
        raise PlanError(f"The growth and the target config differ in {_first_names(sorted(growth.tensors.keys() ^ expected.keys()))}.")
    for name, expr in growth.tensors.items():
        try:
            shape = expr.shape(scope)
        except (LookupError, ValueError) as error:
            raise PlanError(f"{name} cannot be built: {error}") from None
        if shape != expected[name].shape:
            raise PlanError(f"{name} would have shape {list(shape)}, but the target config implies {list(expected[name].shape)}.")
    lost = source.tensors.keys() - {s.key for e in growth.tensors.values() for s in e.sources()} - growth.dropped.keys()
    if lost:
        raise PlanError(f"These source tensors would be lost: {_first_names(sorted(lost))}.")
    if growth.guarantee.lossless:
        inexact = [n for n, a in growth.axes.items() if a.dual and not a.is_exact()]
        if inexact:
            raise PlanError(f"The growth claims to be lossless, but the axis maps {_first_names(inexact)} are not exact.")
    dtypes = _Dtypes(source)
    return GrowthPlan(source, growth, {n: TensorInfo(dtypes.of(n, e, growth), expected[n].shape) for n, e in growth.tensors.items()})


class _Dtypes:
    """Dtype of a target tensor: that of the first source tensor it reads, else of the same tensor in other layers, else the most common one."""

    def __init__(self, source: SourceInfo) -> None:
        self.source = source
        entries = source.architecture.tensors
        self.by_template = {entries[n].spec.name: t.dtype for n, t in source.tensors.items() if n in entries}
        self.most_common = Counter(t.dtype for t in source.tensors.values()).most_common(1)[0][0]
        self.templates: dict[str, str] = {}

    def of(self, name: str, expr: Expr, growth: Growth) -> str:
        first = next(expr.sources(), None)
        if first is not None and first.key in self.source.by_key:
            return self.source.by_key[first.key].dtype
        if not self.templates:
            self.templates = {n: e.spec.name for n, e in Architecture(growth.config).tensors.items()}
        return self.by_template.get(self.templates[name], self.most_common)


def training_lists(plan: GrowthPlan) -> dict[str, Any]:
    """What a trainer may treat separately: new layers, routers, old and new experts (by index or name). Stored in growth.json."""
    old, new = plan.source.architecture, plan.architecture
    lists: dict[str, Any] = {"new_layers": [i for i, layer in enumerate(plan.growth.layers) if layer.new or layer.identity]}
    if new.is_moe:
        kept = old.size("experts") if old.is_moe else 0
        lists["routers"] = [n for n, e in new.tensors.items() if any(d.axes == ("experts",) for d in e.spec.dims)]
        lists["old_experts"] = list(range(kept))
        lists["new_experts"] = list(range(kept, new.size("experts")))
    return lists


def _first_names(names: list[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
