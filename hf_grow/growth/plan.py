"""The plan: a growth bound to one source checkpoint, checked, with its sizes. Pure: no weights, no torch.

`make_plan` refuses whatever cannot work before a byte is written: a source that does not match the table of its family, a target tensor
whose expression has another shape than the table says, a source tensor that would be lost without a word, an axis map that is not exact
in a growth that claims to be.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from hf_grow.errors import PlanError, SourceError
from hf_grow.growth.axes import AxisMap
from hf_grow.growth.growth import Growth, Guarantee, LayerOrigin
from hf_grow.growth.tensormap import Expr, Scope, Shape, Share, Source
from hf_grow.growth.tensormap_json import from_json, to_json
from hf_grow.model.architecture import Architecture
from hf_grow.model.family import DERIVED_BUFFERS
from hf_grow.model.param_count import ModelSize, count_parameters, extrapolation_warnings

FORMAT = 1
"""Version of growth.json. Raised when an older reader would misunderstand a newer file."""

# Bytes of one value, by the names safetensors uses.
DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}
DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@dataclass(frozen=True)
class TensorInfo:
    dtype: str
    shape: Shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class SourceInfo:
    """What the plan knows of a source checkpoint: everything in its config and headers, nothing of its weights."""

    ref: str
    """Folder or Hub id, as given by the user."""
    revision: str
    """Commit on the Hub; empty for a folder."""
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Weight files: size, and what identifies their content (sha256 where the Hub gives it)."""
    history: tuple[Mapping[str, Any], ...] = ()
    """Earlier growths of this checkpoint, oldest first."""
    donors: Mapping[str, SourceInfo] = field(default_factory=dict)
    """Further source checkpoints by the label that `Source.checkpoint` calls them."""
    head: Literal["", "equal", "own"] = ""
    """A stored head that config.json ties: 'equal' to the embedding, or its 'own', which `config` then says; empty where none was compared."""

    @cached_property
    def architecture(self) -> Architecture:
        return Architecture(self.config)

    @property
    def nbytes(self) -> int:
        """Weights of this checkpoint alone."""
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def refs(self) -> str:
        """The checkpoint, and the further ones beside it, for people."""
        return ", ".join([self.ref, *(other.ref for other in self.donors.values())])

    @cached_property
    def by_key(self) -> Mapping[str, TensorInfo]:
        """The tensors of all source checkpoints by `Source.key`."""
        more = {Source(n, label).key: t for label, other in self.donors.items() for n, t in other.tensors.items()}
        return {**self.tensors, **more}

    @cached_property
    def scope_shapes(self) -> Mapping[str, Shape]:
        return {key: t.shape for key, t in self.by_key.items()}

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {
            "ref": self.ref,
            "revision": self.revision,
            "config": dict(self.config),
            "files": {k: dict(v) for k, v in self.files.items()},
            "tensors": {n: [t.dtype, list(t.shape)] for n, t in self.tensors.items()},
            "history": [dict(h) for h in self.history],
        }
        return data | ({"others": {label: other.to_json() for label, other in self.donors.items()}} if self.donors else {})

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> SourceInfo:
        tensors = {n: _info(d, shape) for n, (d, shape) in data["tensors"].items()}
        files = {k: dict(v) for k, v in data["files"].items()}
        others = {str(label): SourceInfo.from_json(other) for label, other in data.get("others", {}).items()}
        return SourceInfo(data["ref"], data["revision"], dict(data["config"]), tensors, files, tuple(map(dict, data["history"])), others)


@dataclass(frozen=True)
class GrowthPlan:
    source: SourceInfo
    growth: Growth
    targets: Mapping[str, TensorInfo]
    """Shape and dtype of every tensor to write, in the order of the table."""

    @cached_property
    def architecture(self) -> Architecture:
        return Architecture(self.growth.config)

    @property
    def guarantee(self) -> Guarantee:
        return self.growth.guarantee

    @cached_property
    def sizes(self) -> tuple[ModelSize, ModelSize]:
        """Sizes of source and target."""
        return count_parameters(self.source.architecture), count_parameters(self.architecture)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.targets.values())

    @property
    def source_nbytes(self) -> int:
        """Weights of all source checkpoints."""
        return sum(t.nbytes for t in self.source.by_key.values())

    def copies(self) -> dict[str, str]:
        """Targets that are byte copies -> the key of the source tensor."""
        bare = {name: e.of if isinstance(e, Share) else e for name, e in self.growth.tensors.items()}
        return {n: e.key for n, e in bare.items() if isinstance(e, Source) and self.targets[n] == self.source.by_key[e.key]}

    @cached_property
    def fingerprint(self) -> str:
        """Changes with anything that changes the output's bytes; tells whether a partial output belongs to this plan."""
        data = {k: v for k, v in self.to_json().items() if k != "hf_grow"}
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
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
        """The plan stored in a growth.json. Raises SourceError for a file that holds none."""
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
                SourceInfo.from_json(data["source"]), growth, {n: _info(d, shape) for n, (d, shape, _) in t["tensors"].items()}
            )
            _check_names(plan)
            return plan
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise SourceError(f"growth.json is damaged: {error!r}.") from None


def _check_names(plan: GrowthPlan) -> None:
    """Raises ValueError for a stored plan whose map reads or makes tensors that it does not tell of, or whose names are no text."""
    arch = plan.architecture
    if arch.count != len(plan.targets) or arch.tensors.keys() != plan.targets.keys():
        raise ValueError(f"its config wants {arch.count} tensors, and it tells of {len(plan.targets)} others")
    for name, expr in plan.growth.tensors.items():
        lost = {s.key for s in expr.sources()} - plan.source.by_key.keys() | set(expr.axis_names()) - plan.growth.axes.keys()
        if lost:
            raise ValueError(f"{name} is made of {min(lost)}, which is not there")
    if not all(isinstance(text, str) for text in (plan.growth.method, plan.source.ref, plan.source.revision, *plan.growth.warnings)):
        raise ValueError("its method, source and warnings must be text")


def _info(dtype: Any, shape: Any) -> TensorInfo:
    if dtype not in DTYPE_BYTES or not isinstance(shape, list) or not all(isinstance(n, int) for n in shape):
        raise ValueError(f"{str(dtype)[:40]} {str(shape)[:40]} is no tensor")
    return TensorInfo(dtype, tuple(shape))


def check_source(source: SourceInfo) -> dict[str, str]:
    """The source tensors that are there but not in the table, with the reason why they may go. Raises SourceError for any other mismatch."""
    if (count := source.architecture.count) > 2 * len(source.tensors) + 100:
        raise SourceError(
            f"config.json of {source.ref} describes {count} tensors ({source.architecture.layers} layers), and its weights are {len(source.tensors)}.",
            hint="Check num_hidden_layers, the number of experts, and that every shard is there.",
        )
    expected = source.architecture.tensors
    extra: dict[str, str] = {}
    unknown = []
    for name in source.tensors.keys() - expected.keys():
        if name.endswith(DERIVED_BUFFERS):
            extra[name] = "a buffer that every loader computes"
        elif name == HEAD and source.architecture.tied:
            later = "tied to the embedding (tie_word_embeddings); compared when the weights are read, and kept if it differs"
            extra[name] = "equal to the embedding, to which it is tied" if source.head else later
        else:
            unknown.append(name)
    missing = [n for n in expected if n not in source.tensors]
    if missing or unknown:
        lines = []
        if missing:
            lines.append(f"{len(missing)} missing: {_some(missing)}")
        if unknown:
            lines.append(f"{len(unknown)} unknown: {_some(sorted(unknown))}")
        raise SourceError(
            f"The weights of {source.ref} do not match its config.json "
            f"({source.architecture.family.architecture}, {source.architecture.layers} layers): {'; '.join(lines)}.",
            hint="Check num_hidden_layers, tie_word_embeddings and that every shard is there; "
            "a checkpoint of the base model without its head must be saved as ...ForCausalLM first.",
        )
    for name, entry in expected.items():
        if source.tensors[name].shape != entry.shape:
            raise SourceError(f"{name} has shape {list(source.tensors[name].shape)}, but config.json makes it {list(entry.shape)}.")
    return extra


def untied_head_warning(ref: str) -> str:
    """What there is to know of a checkpoint whose config.json ties a head that is no copy of the embedding."""
    return (
        f"config.json of {ref} ties the head to the embedding, but the stored {HEAD} differs. It is kept and the result is untied, as "
        "transformers 5 loads it; transformers 4 used the embedding instead. (To have that, remove the stored head.)"
    )


def make_plan(source: SourceInfo, growth: Growth) -> GrowthPlan:
    """Binds and checks. Raises SourceError if the source is not what its config says, PlanError if the growth does not fit it."""
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
        raise PlanError(f"The growth and the target config differ in {_some(sorted(growth.tensors.keys() ^ expected.keys()))}.")
    for name, expr in growth.tensors.items():
        try:
            shape = expr.shape(scope)
        except (LookupError, ValueError) as error:
            raise PlanError(f"{name} cannot be built: {error}") from None
        if shape != expected[name].shape:
            raise PlanError(f"{name} would have shape {list(shape)}, but the target config makes it {list(expected[name].shape)}.")
    lost = source.tensors.keys() - {s.key for e in growth.tensors.values() for s in e.sources()} - growth.dropped.keys()
    if lost:
        raise PlanError(f"These source tensors would be lost: {_some(sorted(lost))}.")
    if growth.guarantee.lossless:
        inexact = [n for n, a in growth.axes.items() if a.dual and not a.is_exact()]
        if inexact:
            raise PlanError(f"The growth claims to be lossless, but the axis maps {_some(inexact)} are not exact.")
    dtypes = _Dtypes(source)
    return GrowthPlan(source, growth, {n: TensorInfo(dtypes.of(n, e, growth), expected[n].shape) for n, e in growth.tensors.items()})


class _Dtypes:
    """The dtype of a target tensor: that of the first source it reads; else of its namesakes in other layers; else the commonest."""

    def __init__(self, source: SourceInfo) -> None:
        self.source = source
        entries = source.architecture.tensors
        self.by_template = {entries[n].spec.name: t.dtype for n, t in source.tensors.items() if n in entries}
        self.commonest = Counter(t.dtype for t in source.tensors.values()).most_common(1)[0][0]
        self.templates: dict[str, str] = {}

    def of(self, name: str, expr: Expr, growth: Growth) -> str:
        first = next(expr.sources(), None)
        if first is not None and first.key in self.source.by_key:
            return self.source.by_key[first.key].dtype
        if not self.templates:
            self.templates = {n: e.spec.name for n, e in Architecture(growth.config).tensors.items()}
        return self.by_template.get(self.templates[name], self.commonest)


def training_lists(plan: GrowthPlan) -> dict[str, Any]:
    """What a trainer may treat apart: layers that are new, routers, and experts that were there before or were not (by index)."""
    old, new = plan.source.architecture, plan.architecture
    lists: dict[str, Any] = {"new_layers": [i for i, layer in enumerate(plan.growth.layers) if layer.new or layer.identity]}
    if new.is_moe:
        kept = old.size("experts") if old.is_moe else 0
        lists["routers"] = [n for n, e in new.tensors.items() if any(d.axes == ("experts",) for d in e.spec.dims)]
        lists["old_experts"] = list(range(kept))
        lists["new_experts"] = list(range(kept, new.size("experts")))
    return lists


def _some(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
