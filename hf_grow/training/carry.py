"""Growing the optimizer state with the weights, so that training resumes on the larger model where the smaller one stopped.

A Trainer checkpoint holds AdamW's moments by position. Here they get their names, go through the same map as the weights (exp_avg as a gradient,
exp_avg_sq as a squared gradient: see tensormap), and are put back by position for the larger model. Step counts stay.

    map             m' and v' by the dual maps (Shen et al. 2022, "Staged Training", for copies; exact where B^T A = I and no noise was added)
    keep-and-zero   old entries keep their state, new ones start at zero, which also tells copies apart (SPARKLING, arXiv 2602.02472: "[S, 0]").
                    With beta2 above 0.95 v is mapped all the same: a zero v beside an old step count makes first updates several times too large.
    reset           no optimizer state; the schedule goes on
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hf_grow.axes import AxisMap, Run, joined
from hf_grow.errors import ExecutionError, InputError, SourceError
from hf_grow.planning import GrowthPlan, TensorInfo
from hf_grow.tensormap import Expr, Fill, Quantity, Share, Source, Sum, Take
from hf_grow.training import trajectory
from hf_grow.training.skeleton import memory_names, skeleton, trainer_groups

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

Policy = Literal["map", "keep-and-zero", "reset"]
OPTIMIZER, SCHEDULER, STATE = "optimizer.pt", "scheduler.pt", "trainer_state.json"
MOMENTS: dict[str, Quantity] = {"exp_avg": "grad", "exp_avg_sq": "grad2"}
SAFE_BETA2 = 0.95
"""Up to here a zeroed second moment raises first updates by at most about a tenth (measured); at 0.999 by a factor of 6.6."""


@dataclass(frozen=True)
class Carried:
    """What was done, for the report."""

    policy: Policy
    mapped: int
    fresh: int
    step: int


def check_trainer_checkpoint(folder: Path) -> None:
    """Raises SourceError if the folder holds no optimizer state that can be grown."""
    if (folder / OPTIMIZER).is_file():
        return
    if any(folder.glob("global_step*")):
        raise SourceError(
            f"{folder} holds DeepSpeed state.", hint="Convert it with its zero_to_fp32.py, then grow with --optimizer-policy reset."
        )
    if any(folder.glob("optimizer_*")) or any(folder.glob("pytorch_model_fsdp*")):
        raise SourceError(f"{folder} holds sharded FSDP state.", hint="Save with a full state dict, or grow with --optimizer-policy reset.")
    raise SourceError(f"{folder} has no {OPTIMIZER}.", hint="Give a folder that Trainer saved, such as checkpoint-500.")


def carry(
    folder: Path,
    out: Path,
    plan: GrowthPlan,
    policy: Policy = "map",
    *,
    names: Sequence[Sequence[str]] | None = None,
    exact_steps: bool = False,
) -> Carried:
    """Writes the grown optimizer.pt, scheduler.pt, trainer_state.json and random state of Trainer checkpoint `folder` into `out`.

    ``names``: the parameter names of each group, where the optimizer was not made by Trainer and its groups carry no names.
    ``exact_steps``: groups with the learning rates of `trajectory.rule`, for an optimizer made from `trajectory.groups`.
    Raises SourceError if the state is none of AdamW's, or does not fit the plan's source.
    """
    import torch

    check_trainer_checkpoint(folder)
    if folder.resolve() == out.resolve():
        raise InputError(f"The grown state cannot be written over {folder}: it is read from there.", hint="Choose another folder.")
    for name in (STATE, SCHEDULER, *(p.name for p in folder.glob("rng_state*.pth"))):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)  # positions, not parameters: the schedule and the data order go on
    if policy == "reset":
        return Carried(policy, 0, 0, 0)
    try:
        saved = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True, mmap=True)
        groups, state = saved["param_groups"], saved["state"]
    except Exception as error:  # whatever a damaged or hostile file raises under weights_only
        raise SourceError(f"{folder / OPTIMIZER} cannot be read: {str(error).splitlines()[0]}") from None
    source, target = skeleton(plan.source.config), skeleton(plan.growth.config)
    layout = _layout(groups, state, source, names)
    beta2 = max(float(g.get("betas", (0, 0.999))[1]) for g in groups)
    grown, fresh, step = grow_state(plan, {n: state[i] for n, i in layout.items() if i in state}, source, target, policy, beta2)
    names_after = _names_after(groups, source, target, plan, names)
    if exact_steps:
        groups, names_after = _split_groups(out, groups, names_after, trajectory.rule(plan))
    numbers = {name: i for i, name in enumerate(n for group in names_after for n in group)}
    at = 0
    for group, members in zip(groups, names_after, strict=True):
        group["params"] = list(range(at, at + len(members)))
        at += len(members)
        if "param_names" in group:
            group["param_names"] = list(members)
    try:
        torch.save({"state": {numbers[n]: s for n, s in grown.items() if n in numbers}, "param_groups": groups}, out / OPTIMIZER)
    except RuntimeError as error:  # how torch tells of a full disk
        raise ExecutionError(
            f"The optimizer state could not be written to {out / OPTIMIZER}: {str(error).splitlines()[0]}.",
            hint="Free some space; the model itself is written. Go on with --resume.",
        ) from None
    return Carried(policy, len(grown), fresh, step)


def _split_groups(
    out: Path, groups: Sequence[Mapping[str, Any]], names: Sequence[Sequence[str]], rule: Mapping[str, trajectory.Steps]
) -> tuple[list[dict[str, Any]], list[list[str]]]:
    """Every group in as many as it has different steps, and the schedule's lists of learning rates likewise."""
    import torch

    new_groups, new_names, origin, factors = [], [], [], []
    for i, (group, members) in enumerate(zip(groups, names, strict=True)):
        for steps, chosen in trajectory.by_steps(members, rule):
            rates = {k: group[k] * steps.lr for k in ("lr", "initial_lr") if k in group}
            new_groups.append(
                {**group, **rates, "weight_decay": group["weight_decay"] / steps.lr, "eps": group["eps"] * steps.eps, "param_names": []}
            )
            new_names.append(chosen)
            origin.append(i)
            factors.append(steps.lr)
    if (out / SCHEDULER).is_file():
        schedule = torch.load(out / SCHEDULER, map_location="cpu", weights_only=True)
        for key, value in schedule.items():
            if isinstance(value, list) and len(value) == len(groups):
                rate = key in ("base_lrs", "_last_lr")
                schedule[key] = [value[i] * f if rate else value[i] for i, f in zip(origin, factors, strict=True)]
        torch.save(schedule, out / SCHEDULER)
    return new_groups, new_names


def grow_state(
    plan: GrowthPlan,
    state: Mapping[str, Mapping[str, Tensor]],
    source: PreTrainedModel,
    target: PreTrainedModel,
    policy: Policy,
    beta2: float,
) -> tuple[dict[str, dict[str, Tensor]], int, int]:
    """The state of every parameter of the target by its name in memory; parameters that start afresh are left out.

    Returns it with the number of fresh parameters and the step count. Raises SourceError for an optimizer other than Adam(W).
    """
    import torch

    from hf_grow.evaluate import Evaluator, HeldTensors
    from hf_grow.in_memory import disk_names

    if not state:
        raise SourceError("The optimizer state is empty.", hint="It was saved before the first step; grow without it.")
    if any(not MOMENTS.keys() <= s.keys() for s in state.values()):
        raise SourceError(f"The optimizer state has {sorted(next(iter(state.values())))}; AdamW's has step, exp_avg and exp_avg_sq.")
    step = next(iter(state.values()))["step"]
    kept = _kept_only(plan)
    found: dict[str, dict[str, Tensor]] = {}
    fresh_on_disk: set[str] = set()
    for moment, quantity in MOMENTS.items():
        held = disk_names(source, {n: s[moment] for n, s in state.items()})
        zeroing = policy == "keep-and-zero" and (moment == "exp_avg" or beta2 <= SAFE_BETA2)
        chosen = kept if zeroing else plan
        evaluator = Evaluator(chosen, HeldTensors(held), quantity)
        on_disk = {}
        for name, info in plan.targets.items():
            expr = chosen.growth.tensors[name]
            if _is_fresh(plan, name) or not all(s.key in held for s in expr.sources()):
                fresh_on_disk.add(name)
                on_disk[name] = torch.zeros(info.shape)
            else:
                on_disk[name] = evaluator.whole(expr, TensorInfo("F32", info.shape))
        for name, value in memory_names(target, on_disk).items():
            found.setdefault(name, {"step": step.clone()})[moment] = value
    fresh = {n for n, origin in _origins(target, plan).items() if origin <= fresh_on_disk}
    return {n: s for n, s in found.items() if n not in fresh}, len(fresh), int(step)


def _is_fresh(plan: GrowthPlan, name: str) -> bool:
    """What is made of nothing old (zeros, a new router), and new identity blocks: their old moments belong to another place in the network."""
    entry = plan.architecture.tensors[name]
    return (entry.layer >= 0 and plan.growth.layers[entry.layer].identity) or next(plan.growth.tensors[name].sources(), None) is None


def _kept_only(plan: GrowthPlan) -> GrowthPlan:
    """The plan whose maps carry first appearances only, unscaled; everything new is zero."""

    def first(axis: AxisMap) -> AxisMap:
        seen: set[int] = set()
        runs = []
        for source, a, b in axis.rows():
            new = source is None or source in seen or not (a and b)
            runs.append(Run(None, 1, 0.0, 0.0) if new else Run(source, 1, 1.0, 1.0))
            if source is not None:
                seen.add(source)
        return AxisMap(axis.source_size, joined(runs), dual=False)

    def simplify(expr: Expr) -> Expr:
        # What is not dual places noise, or rows of another layer: all of it new.
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
    """Tensors of experts that copy what another expert of the same layer holds already."""
    seen: set[tuple[object, ...]] = set()
    later = set()
    for name, entry in plan.architecture.tensors.items():
        expr = plan.growth.tensors[name]
        part = (entry.layer, tuple(s.key for s in expr.sources()), tuple(expr.axis_names()))  # a shard of its own is no copy
        if entry.expert >= 0 and part in seen:
            later.add(name)
        seen.add(part)
    return later


def _reads_kept(plan: GrowthPlan, expr: Expr) -> bool:
    """Whether a term carries old values to their own places: it reads a source, through no map that only adds."""
    if isinstance(expr, Take):
        return not expr.axis.partition("@")[0].endswith(".added") and _reads_kept(plan, expr.of)
    return isinstance(expr, Source | Sum | Share)


def _candidates(
    groups: Sequence[Mapping[str, Any]], model: PreTrainedModel, names: Sequence[Sequence[str]] | None
) -> list[list[list[str]]]:
    """The ways in which this model's parameters may lie in the groups."""
    if names is not None:
        return [[list(g) for g in names]]
    if all("param_names" in g for g in groups):
        return [[list(g["param_names"]) for g in groups]]
    return [trainer_groups(model), [[n for n, _ in model.named_parameters()]]]


def _layout(
    groups: Sequence[Mapping[str, Any]], state: Mapping[int, Any], model: PreTrainedModel, names: Sequence[Sequence[str]] | None
) -> dict[str, int]:
    """Parameter name -> its number in the saved state. Raises SourceError if no known order fits by count and shape."""
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    for candidate in _candidates(groups, model, names):
        if [len(c) for c in candidate] != [len(g["params"]) for g in groups]:
            continue
        found = {n: i for members, g in zip(candidate, groups, strict=True) for n, i in zip(members, g["params"], strict=True)}
        if all(
            n in shapes and (i not in state or tuple(state[i]["exp_avg"].shape) == shapes[n])
            for n, i in found.items()
            if i not in state or "exp_avg" in state[i]
        ):
            return found
    raise SourceError(
        f"The optimizer has groups of {[len(g['params']) for g in groups]} parameters, which are not those of the model ({len(shapes)}).",
        hint="Was another model trained, or only part of it? For groups of your own, make the optimizer from named_parameters(), so that they are saved.",
    )


def _names_after(
    groups: Sequence[Mapping[str, Any]],
    source: PreTrainedModel,
    target: PreTrainedModel,
    plan: GrowthPlan,
    names: Sequence[Sequence[str]] | None,
) -> list[list[str]]:
    """The target's parameters in groups like the source's: Trainer's own, all in one, or each where its origin was."""
    if names is None and not all("param_names" in g for g in groups):
        return trainer_groups(target) if len(groups) == 2 else [[n for n, _ in target.named_parameters()]]
    group_of = {n: i for i, members in enumerate(_candidates(groups, source, names)[0]) for n in members}
    out: list[list[str]] = [[] for _ in groups]
    for name, _ in target.named_parameters():
        match = re.search(r"\.layers\.(\d+)\.", name)
        origin = name if match is None else name.replace(match[0], f".layers.{plan.growth.layers[int(match[1])].sources[0]}.", 1)
        if origin not in group_of:
            raise InputError(f"No group of the optimizer holds {origin}, from which {name} grows.")
        out[group_of[origin]].append(name)
    return out


def _origins(model: PreTrainedModel, plan: GrowthPlan) -> dict[str, set[str]]:
    """For each parameter in memory, the names on disk it is made of."""
    from hf_grow.in_memory import disk_names

    out = {}
    for name, p in model.named_parameters():
        out[name] = set(disk_names(model, {name: p})) & plan.targets.keys()
    return out


def grow_checkpoint_state(folder: Path, plan: GrowthPlan, policy: Policy, *, exact_steps: bool = False) -> Callable[[Path], set[str]]:
    """For `execute`: writes the grown state into the output before it gets its name; returns the names of the files."""

    def write(out: Path) -> set[str]:
        before = {p.name for p in out.iterdir()}
        carry(folder, out, plan, policy, exact_steps=exact_steps)
        return {p.name for p in out.iterdir()} - before

    return write
