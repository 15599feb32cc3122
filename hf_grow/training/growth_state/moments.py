"""An optimizer's moments through a growth: each tensor is mapped like its weight, as a gradient or a squared gradient, under the policies of `grow_optimizer`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from hf_grow.errors import SourceError
from hf_grow.growth.axes import AxisMap, AxisRun, merge_runs
from hf_grow.growth.plan import GrowthPlan
from hf_grow.growth.tensormap import Expr, Fill, Share, Source, Sum, Take
from hf_grow.training.growth_state.optimizer_state import MomentRows, OptimizerState
from hf_grow.training.param_updates.parameter_map import parameter_map
from hf_grow.training.sharding.local_rows import by_parameter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_grow.growth.tensors import RowTensor

Policy = Literal["map", "keep-and-zero", "reset"]
SAFE_BETA2 = 0.95
"""Up to here a zeroed second moment raises first updates by at most about a tenth (measured); at 0.999 by a factor of 6.6."""


def empty_state_error() -> SourceError:
    """The error for a state without moments."""
    return SourceError("The optimizer state is empty.", hint="It was saved before the first step; grow without it.")


def grow_state(
    plan: GrowthPlan, state: OptimizerState, source: PreTrainedModel, target: PreTrainedModel, policy: Policy, beta2: float
) -> dict[str, dict[str, Any]]:
    """The state of every target parameter by its name in memory, computed when its rows are read; parameters without old moments are omitted.

    Raises SourceError for an optimizer whose state has no exact map.
    """
    from hf_grow.growth.evaluate import Evaluator
    from hf_grow.training.growth_state.grown_moments import GrownMoment, ParameterTensor
    from hf_grow.training.growth_state.optimizer_forms import QUANTITIES, read_moments, write_state

    if not state.state:
        raise empty_state_error()
    moments = OptimizerState(state.groups, {n: read_moments(s, n, tuple(source.get_parameter(n).shape)) for n, s in state.state.items()})
    places, kept = parameter_map(source), _kept_only(plan)
    parameters = by_parameter(parameter_map(target))
    shapes = {n: t.shape for n, t in plan.source.tensors.items()}
    grown: dict[str, dict[str, RowTensor]] = {}
    origins: dict[str, str] = {}
    for key in sorted({k for found in moments.state.values() for k in found}):
        quantity = QUANTITIES[key]
        zeroing = policy == "keep-and-zero" and (quantity == "grad" or beta2 <= SAFE_BETA2)
        chosen = kept if zeroing else plan
        held = MomentRows(moments, key, {n: p for n, p in places.items() if n in shapes}, shapes)
        # A tensor starts afresh if the state of a source is missing, or is that of another checkpoint.
        mapped = {
            n: e for n, e in chosen.growth.tensors.items() if not _is_fresh(plan, n) and all(s.key in held.names() for s in e.sources())
        }
        moment = GrownMoment({n: t.shape for n, t in plan.targets.items()}, mapped, Evaluator(chosen, held, quantity))
        for name, parts in parameters.items():
            first = next((n for n in parts if n in mapped and all(s.key in held.names() for s in plan.growth.tensors[n].sources())), None)
            if first is not None:
                origin = origins[name] = places[next(plan.growth.tensors[first].sources()).name].parameter
                shape = tuple(target.get_parameter(name).shape)
                grown.setdefault(name, {})[key] = ParameterTensor(shape, moments.tensor(origin, key).dtype, parts, moment)
    return {n: write_state(found, state.state[origins[n]], n) for n, found in grown.items()}


def _is_fresh(plan: GrowthPlan, name: str) -> bool:
    """Whether a tensor has no source tensor (zeros, a new router) or belongs to a new identity block, whose source moments belong to another layer."""
    entry = plan.architecture.tensors[name]
    return (entry.layer >= 0 and plan.growth.layers[entry.layer].identity) or next(plan.growth.tensors[name].sources(), None) is None


def _kept_only(plan: GrowthPlan) -> GrowthPlan:
    """The plan with maps of first copies only, unscaled; everything new is zero."""

    def first(axis: AxisMap) -> AxisMap:
        seen: set[int] = set()
        runs = []
        for source, a, b in axis.rows():
            new = source is None or source in seen or not (a and b)
            runs.append(AxisRun(None, 1, 0.0, 0.0) if new else AxisRun(source, 1, 1.0, 1.0))
            if source is not None:
                seen.add(source)
        return AxisMap(axis.source_size, merge_runs(runs), dual=False)

    def simplify(expr: Expr) -> Expr:
        # Maps without a dual add noise, or rows of another layer: all new entries.
        if isinstance(expr, Sum):
            terms = tuple(t for t in expr.terms if _reads_kept(plan, t)) or expr.terms[:1]
            return simplify(terms[0]) if len(terms) == 1 else Sum(tuple(map(simplify, terms)), (1.0,) * len(terms))
        if isinstance(expr, Share):
            return simplify(expr.of)
        return expr.map_children(simplify)

    axes = {n: first(a) for n, a in plan.growth.axes.items()}
    new = {n for n, e in plan.architecture.tensors.items() if e.layer >= 0 and plan.growth.layers[e.layer].new} | _later_experts(plan)
    tensors = {n: Fill(plan.targets[n].shape) if n in new else simplify(e) for n, e in plan.growth.tensors.items()}
    return replace(plan, growth=replace(plan.growth, axes=axes, tensors=tensors))


def _later_experts(plan: GrowthPlan) -> set[str]:
    """Expert tensors that are copies of another expert of the same layer."""
    seen: set[tuple[object, ...]] = set()
    later = set()
    for name, entry in plan.architecture.tensors.items():
        expr = plan.growth.tensors[name]
        origin = (entry.layer, tuple(s.key for s in expr.sources()), tuple(expr.axis_names()))  # another shard is no copy
        if entry.expert >= 0 and origin in seen:
            later.add(name)
        seen.add(origin)
    return later


def _reads_kept(plan: GrowthPlan, expr: Expr) -> bool:
    """Whether a term keeps old values in place: it reads a source, through no map that only adds entries."""
    if isinstance(expr, Take):
        return not expr.axis.partition("@")[0].endswith(".added") and _reads_kept(plan, expr.of)
    return isinstance(expr, Source | Sum | Share)
