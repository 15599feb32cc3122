"""Growing the optimizer state with the weights, so that training resumes on the larger model where the smaller one stopped.

A Trainer checkpoint holds AdamW's moments by position, under FSDP by name. They get their names, go through the same map as the weights
(exp_avg as a gradient, exp_avg_sq as a squared gradient: see tensormap), and are written in the same form for the larger model. Step counts are kept.

    map             m' and v' by the dual maps (Shen et al. 2022, "Staged Training", for copies; exact where B^T A = I and no noise was added)
    keep-and-zero   old entries keep their state, new ones start at zero, which also tells copies apart (SPARKLING, arXiv 2602.02472: "[S, 0]").
                    With beta2 above 0.95 v is mapped all the same: a zero v with an old step count makes the first updates several times too large.
    reset           no moments; the groups and the schedule continue
"""

from __future__ import annotations

import inspect
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from hf_grow.common.safe_files import read_bytes
from hf_grow.errors import ExecutionError, InputError, SourceError
from hf_grow.growth.plan import GrowthPlan
from hf_grow.model.meta_model import meta_model, trainer_param_groups
from hf_grow.training.growth_state import trajectory
from hf_grow.training.growth_state.moments import Policy, grow_state
from hf_grow.training.growth_state.optimizer_files import (
    NAMES,
    SCALER,
    SCHEDULER,
    TRAINER_STATE,
    by_name,
    initial_state,
    missing_optimizer_error,
    optimizer_file,
    read_optimizer,
)
from hf_grow.training.growth_state.state_files import DATA_STATE

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from transformers import PreTrainedModel

COPIED_FILES = (SCHEDULER, SCALER, DATA_STATE)
"""Copied along with the random state of every process."""
SOURCE_KEYS = ("best_model_checkpoint", "best_metric", "best_global_step", "trial_name", "trial_params")
"""Keys of trainer_state.json about the source model; the grown model has no best checkpoint yet."""


@dataclass(frozen=True)
class GrownState:
    """Counts for the report."""

    policy: Policy
    mapped: int
    fresh: int
    step: int


def check_trainer_checkpoint(folder: Path, policy: Policy = "map") -> None:
    """Raises SourceError if the folder holds no training state that this policy can grow."""
    if optimizer_file(folder) is None and not (policy == "reset" and (folder / TRAINER_STATE).is_file()):
        raise missing_optimizer_error(folder)


def grow_trainer_state(
    folder: Path,
    out: Path,
    plan: GrowthPlan,
    policy: Policy = "map",
    *,
    names: Sequence[Sequence[str]] | None = None,
    exact_steps: bool = False,
) -> GrownState:
    """Writes the grown optimizer state, scheduler.pt, trainer_state.json and random state of Trainer checkpoint `folder` into `out`.

    ``names``: the parameter names of each group, where the optimizer was not created by Trainer and its groups hold no names.
    ``exact_steps``: groups with the learning rates of `trajectory.step_factors`, for an optimizer created from `trajectory.param_groups`.
    Raises SourceError if the state is not AdamW's, or does not fit the plan's source.
    """
    check_trainer_checkpoint(folder, policy)
    if folder.resolve() == out.resolve():
        raise InputError(f"The grown state cannot be written to {folder}: it is read from there.", hint="Choose another folder.")
    for name in (*COPIED_FILES, *(p.name for p in folder.glob("rng_state*.pth"))):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)  # positions, not parameters: the schedule and the data order continue
    _write_trainer_state(folder, out)
    file = optimizer_file(folder)
    if file is None:  # reset: hf-grow train continues the schedule alone
        return GrownState(policy, 0, 0, 0)
    groups, state = read_optimizer(file, mmap=True)
    is_named = file.name == NAMES
    names = [list(g["params"]) for g in groups] if is_named else names
    target = meta_model(plan.growth.config)
    grown, fresh_count, step, grown_names = _grow(plan, groups, state, target, policy, names)
    if exact_steps:
        groups, grown_names = _split_groups(out, groups, grown_names, trajectory.step_factors(plan))
    at = 0
    for group, members in zip(groups, grown_names, strict=True):
        group["params"] = list(range(at, at + len(members)))
        at += len(members)
        if "param_names" in group:
            group["param_names"] = list(members)
    numbers = {name: i for i, name in enumerate(n for group in grown_names for n in group)}
    by_number: dict[int, dict[str, Any]] = {numbers[n]: s for n, s in grown.items() if n in numbers}
    if is_named and grown:  # torch requires a state of every parameter in this form
        by_number |= {i: initial_state(tuple(target.get_parameter(n).shape)) for n, i in numbers.items() if i not in by_number}
    whole = {"state": by_number, "param_groups": groups}
    _save(by_name(groups, by_number, grown_names) if is_named else whole, out / file.name)
    return GrownState(policy, len(grown), fresh_count, step)


def _grow(
    plan: GrowthPlan,
    groups: Sequence[Mapping[str, Any]],
    state: Mapping[Any, Mapping[str, Any]],
    target: PreTrainedModel,
    policy: Policy,
    names: Sequence[Sequence[str]] | None,
) -> tuple[dict[str, dict[str, Any]], int, int, list[list[str]]]:
    """The grown state by parameter name, how many parameters start without moments, the step count, and the names of the parameters of each group."""
    source = meta_model(plan.source.config)
    keys = _state_keys(groups, state, source, names)
    grown: dict[str, dict[str, Any]] = {}
    fresh_count = step = 0
    if policy != "reset":
        beta2 = max(float(g.get("betas", (0, 0.999))[1]) for g in groups)
        grown, fresh_count, step = grow_state(plan, {n: state[i] for n, i in keys.items() if i in state}, source, target, policy, beta2)
    return grown, fresh_count, step, _grown_names(groups, source, target, plan, names)


def grow_optimizer(
    optimizer: Optimizer, plan: GrowthPlan, grown: PreTrainedModel, *, source: PreTrainedModel | None = None, policy: Policy = "map"
) -> Optimizer:
    """An Adam or AdamW optimizer over the parameters of `grown`, with the moments of `optimizer` grown as `hf-grow --with-optimizer` grows them.

    ``grown``: of ``hf_grow.grow_model(model, plan)``. ``source``: the model that `optimizer` trains; by default its parameters are identified by
    their order (Trainer's two groups, or one group of all) or by the names in its groups. ``policy``: map, keep-and-zero or reset. `optimizer`
    is not changed; a scheduler is not grown. Raises InputError for another optimizer, SourceError for a state that does not fit the plan.
    """
    import torch

    if not isinstance(optimizer, torch.optim.Adam):
        raise InputError(
            f"Cannot grow the state of {type(optimizer).__name__}: only Adam and AdamW are supported.", hint="Create a new optimizer."
        )
    if policy not in get_args(Policy):
        raise InputError(f"There is no policy {policy!r}.", hint=f"Policies: {', '.join(get_args(Policy))}.")
    names = None
    if source is not None:
        own = {id(p): n for n, p in source.named_parameters()}
        if any(id(p) not in own for g in optimizer.param_groups for p in g["params"]):
            raise InputError("The optimizer has parameters that are not those of `source`.", hint="Pass the model that it trains.")
        names = [[own[id(p)] for p in g["params"]] for g in optimizer.param_groups]
    saved = optimizer.state_dict()
    state = {i: {k: v.detach().cpu() if isinstance(v, torch.Tensor) else v for k, v in s.items()} for i, s in saved["state"].items()}
    moments, _, _, grown_names = _grow(plan, saved["param_groups"], state, meta_model(plan.growth.config), policy, names)
    parameters = dict(grown.named_parameters())
    if missing := next((n for members in grown_names for n in members if n not in parameters), None):
        raise InputError(f"The grown model has no parameter {missing}.", hint="Pass hf_grow.grow_model(model, plan).")
    settings = [{k: v for k, v in g.items() if k not in ("params", "param_names")} for g in optimizer.param_groups]
    groups = [{**g, "params": [parameters[n] for n in members]} for g, members in zip(settings, grown_names, strict=True)]
    accepted = inspect.signature(type(optimizer)).parameters
    new_optimizer = type(optimizer)(groups, **{k: v for k, v in optimizer.defaults.items() if k in accepted})
    numbers = {n: i for i, n in enumerate(n for members in grown_names for n in members)}
    new_optimizer.load_state_dict({**new_optimizer.state_dict(), "state": {numbers[n]: s for n, s in moments.items() if n in numbers}})
    return new_optimizer


def _write_trainer_state(folder: Path, out: Path) -> None:
    """trainer_state.json without keys about the smaller model: its best checkpoint would be loaded by name into the larger one."""
    if not (folder / TRAINER_STATE).is_file():
        return
    try:
        state = json.loads(read_bytes(folder / TRAINER_STATE))  # not read_json: its losses may be NaN
        callbacks = state.get("stateful_callbacks") or {}
    except (ValueError, RecursionError, AttributeError) as error:
        raise SourceError(f"{folder / TRAINER_STATE} cannot be read: {' '.join(str(error).split())[:200]}.") from None
    state |= {k: None for k in SOURCE_KEYS if k in state}
    if isinstance(callbacks, dict) and "stateful_callbacks" in state:
        state["stateful_callbacks"] = {k: v for k, v in callbacks.items() if k != "EarlyStoppingCallback"}  # its patience too
    (out / TRAINER_STATE).write_text(json.dumps(state, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _save(state: Mapping[str, Any], path: Path) -> None:
    import torch

    try:
        torch.save(dict(state), path)
    except RuntimeError as error:  # raised by torch when the disk is full
        raise ExecutionError(
            f"The optimizer state could not be written to {path}: {str(error).splitlines()[0]}.",
            hint="Free some disk space; the model itself is written. Continue with --resume.",
        ) from None


def _split_groups(
    out: Path, groups: Sequence[Mapping[str, Any]], names: Sequence[Sequence[str]], factors: Mapping[str, trajectory.StepFactors]
) -> tuple[list[dict[str, Any]], list[list[str]]]:
    """Splits every group by its parameters' factors, and the scheduler's lists of learning rates alike."""
    import torch

    new_groups, new_names, origin, lr_factors = [], [], [], []
    for i, (group, members) in enumerate(zip(groups, names, strict=True)):
        for f, chosen in trajectory.split_by_factors(members, factors).items():
            rates = {k: group[k] * f.lr for k in ("lr", "initial_lr") if k in group}
            new_groups.append(
                {**group, **rates, "weight_decay": group["weight_decay"] / f.lr, "eps": group["eps"] * f.eps, "param_names": []}
            )
            new_names.append(chosen)
            origin.append(i)
            lr_factors.append(f.lr)
    if (out / SCHEDULER).is_file():
        schedule = torch.load(out / SCHEDULER, map_location="cpu", weights_only=True)
        for key, value in schedule.items():
            if isinstance(value, list) and len(value) == len(groups):
                is_rate = key in ("base_lrs", "_last_lr")
                schedule[key] = [value[i] * lr if is_rate else value[i] for i, lr in zip(origin, lr_factors, strict=True)]
        torch.save(schedule, out / SCHEDULER)
    return new_groups, new_names


def _candidates(
    groups: Sequence[Mapping[str, Any]], model: PreTrainedModel, names: Sequence[Sequence[str]] | None
) -> list[list[list[str]]]:
    """Possible assignments of this model's parameters to the groups."""
    if names is not None:
        return [[list(g) for g in names]]
    if all("param_names" in g for g in groups):
        return [[list(g["param_names"]) for g in groups]]
    return [trainer_param_groups(model), [[n for n, _ in model.named_parameters()]]]


def _state_keys(
    groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Any], model: PreTrainedModel, names: Sequence[Sequence[str]] | None
) -> dict[str, Any]:
    """Parameter name -> its key in the saved state. Raises SourceError if no known order fits by count and shape."""
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    for candidate in _candidates(groups, model, names):
        if [len(c) for c in candidate] != [len(g["params"]) for g in groups]:
            continue
        keys = {n: i for members, g in zip(candidate, groups, strict=True) for n, i in zip(members, g["params"], strict=True)}
        if all(
            n in shapes and (i not in state or tuple(state[i]["exp_avg"].shape) == shapes[n])
            for n, i in keys.items()
            if i not in state or "exp_avg" in state[i]
        ):
            return keys
    raise SourceError(
        f"The optimizer has groups of {[len(g['params']) for g in groups]} parameters, which are not those of the model ({len(shapes)}).",
        hint="Was another model trained, or only part of it? For custom groups, create the optimizer from named_parameters(), so that their names are saved.",
    )


def _grown_names(
    groups: Sequence[Mapping[str, Any]],
    source: PreTrainedModel,
    target: PreTrainedModel,
    plan: GrowthPlan,
    names: Sequence[Sequence[str]] | None,
) -> list[list[str]]:
    """The target's parameters in groups like the source's: Trainer's own, all in one, or each where its origin was."""
    if names is None and not all("param_names" in g for g in groups):
        return trainer_param_groups(target) if len(groups) == 2 else [[n for n, _ in target.named_parameters()]]
    group_of = {n: i for i, members in enumerate(_candidates(groups, source, names)[0]) for n in members}
    out: list[list[str]] = [[] for _ in groups]
    for name, _ in target.named_parameters():
        match = re.search(r"\.layers\.(\d+)\.", name)
        origin = name if match is None else name.replace(match[0], f".layers.{plan.growth.layers[int(match[1])].sources[0]}.", 1)
        if origin not in group_of:
            raise InputError(f"No parameter group of the optimizer contains {origin}, from which {name} grows.")
        out[group_of[origin]].append(name)
    return out


def grow_checkpoint_state(folder: Path, plan: GrowthPlan, policy: Policy, *, exact_steps: bool = False) -> Callable[[Path], set[str]]:
    """For `execute`: a function that writes the grown state into the unfinished output folder and returns the names of the files."""

    def write(out: Path) -> set[str]:
        before = {p.name for p in out.iterdir()}
        grow_trainer_state(folder, out, plan, policy, exact_steps=exact_steps)
        return {p.name for p in out.iterdir()} - before

    return write
