"""The optimizer and the schedule of a checkpoint, fitted to those of this run: any form, any number of processes, groups divided in another way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_grow.errors import SourceError
from hf_grow.model.meta_model import trainer_param_groups
from hf_grow.training.growth_state.optimizer_files import POSITIONS, SCHEDULER
from hf_grow.training.growth_state.optimizer_sources import optimizer_path, read_optimizer
from hf_grow.training.growth_state.optimizer_state import OptimizerState, materialized
from hf_grow.training.growth_state.state_files import read_torch_state
from hf_grow.training.param_updates.parameter_map import bare, parameters
from hf_grow.training.param_updates.updates import GROUP_KIND
from hf_grow.training.sharding.local_rows import local_tensor, whole_parameters
from hf_grow.training.sharding.row_source import HeldRows


def by_name(
    groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Any], names: Sequence[Sequence[str]]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Groups and state by position as those by parameter name. ``names``: of the parameters of each group."""
    name_of = {i: n for g, members in zip(groups, names, strict=True) for i, n in zip(g["params"], members, strict=True)}
    named = [{**g, "params": list(members)} for g, members in zip(groups, names, strict=True)]
    return named, {name_of[i]: s for i, s in state.items()}


def regroup(groups: Sequence[Mapping[str, Any]], names: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """Groups by parameter name as those that hold the parameters `names`, with the same settings. Raises ValueError, KeyError where they differ."""
    settings = {n: {k: v for k, v in g.items() if k not in _PARAMETER_KEYS} for g in groups for n in g["params"]}
    for members in names:
        different = next((n for n in members if settings[n] != settings[members[0]]), None)
        if different is not None:
            raise ValueError(f"it has {members[0]} and {different} in different groups")
    return [{**(settings[members[0]] if members else groups[0]), "params": list(members)} for members in names]


def by_position(groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Any], names: Sequence[Sequence[str]]) -> dict[str, Any]:
    """A state by name as one by position, for an optimizer whose groups hold the parameters `names`. Raises as `regroup` does."""
    numbered, at = [], 0
    for group in regroup(groups, names):
        count = len(group["params"])
        numbered.append({**group, "params": list(range(at, at + count))})
        at += count
    flat = [n for members in names for n in members]
    return {"state": {i: state[n] for i, n in enumerate(flat) if n in state}, "param_groups": numbered}


_LABELS = ("param_names", "name", GROUP_KIND)


_PARAMETER_KEYS = ("params", *_LABELS)
"""Keys of a group that describe its parameters, not their update."""


def load_optimizer(path: Path, model: Any, optimizer: Any) -> None:
    """Loads a checkpoint's state (`optimizer_path`) into the optimizer of a model, sharded (FSDP2) or not; groups need not be divided alike.

    Of a sharded parameter only the rows of this process are read. Raises SourceError where the state does not fit.
    """
    groups, state = read_optimizer(path, model)
    if path.name == POSITIONS:
        names = {p: n for n, p in parameters(model).items()}
        own = [[names[p] for p in g["params"]] for g in optimizer.param_groups]
        try:
            groups, state = by_name(groups, state, _saved_names(groups, model, own))
        except ValueError as error:
            raise _unfit(path, error) from None
    load_named(OptimizerState(groups, state), model, optimizer, path)


def load_named(saved: OptimizerState, model: Any, optimizer: Any, path: Path) -> None:
    """Loads a state by parameter name. ``path``: where it came from, for the error. Raises SourceError where it does not fit."""
    names = {p: n for n, p in parameters(model).items()}
    own = [[names[p] for p in g["params"]] for g in optimizer.param_groups]
    groups, state = saved.groups, saved.state
    try:
        held = {n: {k: _local(v, p, f"{k} of {n}") for k, v in state[n].items()} for p, n in names.items() if n in state}
        loaded = by_position(groups, held, own)
        labels = [{k: g[k] for k in _LABELS if k in g} for g in optimizer.param_groups]
        loaded["param_groups"] = [{**g, **keys} for g, keys in zip(loaded["param_groups"], labels, strict=True)]
        optimizer.load_state_dict(loaded)
    except (ValueError, KeyError, RuntimeError) as error:
        raise _unfit(path, error) from None


def _unfit(path: Path, error: Exception) -> SourceError:
    return SourceError(
        f"{path} is not the state of this optimizer: {' '.join(str(error).split())[:200]}.",
        hint="It belongs to other parameters or groups (those of --exact-steps fit trajectory.param_groups only). Grow with --optimizer-policy reset.",
    )


def _local(value: Any, p: Any, name: str) -> Any:
    """A value of the state of a parameter; a tensor sharded as the parameter is. Raises ValueError for one that cannot be."""
    from hf_grow.checkpoint.torch_files import SubclassTensor, map_tensors

    if not hasattr(p, "placements") or not getattr(value, "shape", ()):
        return map_tensors(value, materialized)
    if isinstance(value, SubclassTensor):
        raise ValueError(f"{name} is a {value.kind.__name__}, which cannot be sharded as the parameter is")
    if tuple(value.shape) != tuple(p.shape):
        raise ValueError(f"{name} has shape {list(value.shape)}, the parameter {list(p.shape)}, which is sharded")
    return local_tensor(p, whole_parameters({name: value.shape}), HeldRows({name: value}), value.dtype, p.device)


def _saved_names(groups: Sequence[Mapping[str, Any]], model: Any, own: list[list[str]]) -> list[list[str]]:
    """The parameter names of a state by position: those it holds, else the optimizer's own, else Trainer's. Raises ValueError where none fits."""
    if all(g.get("param_names") for g in groups):
        return [list(g["param_names"]) for g in groups]
    frozen = {bare(n) for n, p in model.named_parameters() if not p.requires_grad}
    all_names = [[bare(n) for n in g] for g in trainer_param_groups(model)]
    sizes = [len(g["params"]) for g in groups]
    for names in (own, [[n for n in g if n not in frozen] for g in all_names], all_names):
        if [len(n) for n in names] == sizes:
            return names
    raise ValueError(f"its groups have {sizes} parameters, those of this optimizer {[len(n) for n in own]}")


SETTINGS = {
    "learning_rate": ("initial_lr", None), "weight_decay": ("weight_decay", None), "adam_beta1": ("betas", 0), "adam_beta2": ("betas", 1),
    "adam_epsilon": ("eps", None),
}  # fmt: skip
"""TrainingArguments -> key and index in a parameter group. (A scheduler stores its peak learning rate as initial_lr.)"""


IMPLEMENTATION = ("fused", "foreach", "capturable", "differentiable")
"""Keys of a group that always come from this run, never from the checkpoint."""


def load_optimizer_and_scheduler(
    folder: Path, model: Any, optimizer: Any, scheduler: Any, given: frozenset[str], grown: OptimizerState | None = None
) -> dict[str, tuple[float, str]]:
    """Loads moments, groups and schedule of a checkpoint, as far as they exist.

    Where the checkpoint's settings differ from this run's arguments, those in ``given`` are this run's, the others the checkpoint's. Shape and
    length of the schedule are always this run's. Returns what differed: argument -> (value that holds, 'recipe' or 'checkpoint').
    ``grown``: the state of a smaller model's checkpoint, grown; loaded in its place. Raises SourceError for a state that does not fit.
    """
    own = [dict(g) for g in optimizer.param_groups]
    file = optimizer_path(folder)
    if grown is not None:
        load_named(grown, model, optimizer, folder)
    elif file is not None:
        load_optimizer(file, model, optimizer)
    if (folder / SCHEDULER).is_file():
        schedule = read_torch_state(folder / SCHEDULER)
        rates = schedule.get("base_lrs", ())
        if file is None and len(rates) == len(own):  # as loaded groups would have it
            for group, peak, rate in zip(optimizer.param_groups, rates, schedule["_last_lr"], strict=True):
                group |= {"initial_lr": peak, "lr": rate}
        count = len(schedule.get("_last_lr", own))
        if count != len(own):  # other groups: `apply_settings` sets the learning rates
            schedule = {k: [v[0]] * len(own) if isinstance(v, list) and len(v) == count else v for k, v in schedule.items()}
        scheduler.load_state_dict(schedule)
    return apply_settings(optimizer, scheduler, own, given)


def apply_settings(optimizer: Any, scheduler: Any, own: Sequence[Mapping[str, Any]], given: frozenset[str]) -> dict[str, tuple[float, str]]:
    """Puts this run's settings back into loaded groups, as `load_optimizer_and_scheduler` says. ``own``: the groups as they were before."""
    differing: dict[str, tuple[float, str]] = {}
    for group, ours in zip(optimizer.param_groups, own, strict=True):
        group |= {k: v for k, v in ours.items() if k in IMPLEMENTATION or not group["params"]}
        for name, (key, at) in SETTINGS.items():
            if key not in group or key not in ours:
                continue
            theirs, mine = (g[key] if at is None else g[key][at] for g in (group, ours))
            if theirs == mine:
                continue
            differing.setdefault(name, (float(mine), "recipe") if name in given else (float(theirs), "checkpoint"))
            if name not in given:
                continue
            group[key] = mine if at is None else tuple(mine if i == at else old for i, old in enumerate(group[key]))
    if hasattr(scheduler, "lr_lambdas"):  # as it will compute them at its next step
        scheduler.base_lrs = [g["initial_lr"] for g in optimizer.param_groups]
        factors = [f(scheduler.last_epoch) for f in scheduler.lr_lambdas]
        scheduler._last_lr = [b * f for b, f in zip(scheduler.base_lrs, factors, strict=True)]
        for group, rate in zip(optimizer.param_groups, scheduler._last_lr, strict=True):
            group["lr"] = rate
    return differing
