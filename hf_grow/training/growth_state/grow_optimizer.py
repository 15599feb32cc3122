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
from hf_grow.training.growth_state.moments import Policy, empty_state_error, grow_state
from hf_grow.training.growth_state.optimizer_files import (
    NAMES,
    POSITIONS,
    SCALER,
    SCHEDULER,
    TRAINER_STATE,
    missing_optimizer_error,
)
from hf_grow.training.growth_state.optimizer_sources import named_state, open_optimizer, optimizer_path
from hf_grow.training.growth_state.optimizer_state import OptimizerState, in_memory, materialized
from hf_grow.training.growth_state.state_files import DATA_STATE, read_torch_state

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


def check_trainer_checkpoint(folder: Path, policy: Policy = "map", plan: GrowthPlan | None = None) -> None:
    """Raises SourceError if the folder holds no training state that this policy can grow.

    ``plan``: also opens the optimizer state, without reading its tensors, and checks that it fits.
    """
    path = optimizer_path(folder)
    if path is None and not (policy == "reset" and (folder / TRAINER_STATE).is_file()):
        raise missing_optimizer_error(folder)
    if path is not None and plan is not None and policy != "reset":
        from hf_grow.training.growth_state.optimizer_forms import form_of

        state = open_optimizer(path, meta_model(plan.source.config)).state
        if not state:
            raise empty_state_error()
        for name, held in state.items():
            form_of(held, name)


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
    Raises SourceError if the state cannot be grown, or does not fit the plan's source.
    """
    check_trainer_checkpoint(folder, policy)
    if folder.resolve() == out.resolve():
        raise InputError(f"The grown state cannot be written to {folder}: it is read from there.", hint="Choose another folder.")
    for name in (*COPIED_FILES, *(p.name for p in folder.glob("rng_state*.pth"))):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)  # positions, not parameters: the schedule and the data order continue
    _write_trainer_state(folder, out)
    path = optimizer_path(folder)
    if path is None:  # reset: hf-grow train continues the schedule alone
        return GrownState(policy, 0, 0, 0)
    source, target = meta_model(plan.source.config), meta_model(plan.growth.config)
    grown = _grow(plan, open_optimizer(path, source, names), source, target, policy)
    if exact_steps:
        if any("exp_avg" not in s or "exp_avg_sq" not in s for s in grown.state.values()):
            raise InputError("--exact-steps holds for AdamW alone: its update does not depend on the scale of gradients.")
        grown = _split_groups(out, grown, trajectory.step_factors(plan))
    count = sum(len(g["params"]) for g in grown.groups)
    step = max((int(grown.number(n)) for n, s in grown.state.items() if "step" in s), default=0)
    # All forms by name become one file: that of FSDP with FULL_STATE_DICT.
    _save(
        _by_position(grown) if path.name == POSITIONS else _by_name(grown, target), out / (POSITIONS if path.name == POSITIONS else NAMES)
    )
    return GrownState(policy, len(grown.state), count - len(grown.state) if grown.state else 0, step)


def grown_optimizer_state(folder: Path, plan: GrowthPlan, policy: Policy) -> OptimizerState | None:
    """The grown optimizer state of a checkpoint, computed as its rows are read; None where the checkpoint has none and `policy` is reset.

    Raises SourceError as `grow_trainer_state` does.
    """
    check_trainer_checkpoint(folder, policy)
    path = optimizer_path(folder)
    if path is None:
        return None
    source, target = meta_model(plan.source.config), meta_model(plan.growth.config)
    return _grow(plan, open_optimizer(path, source), source, target, policy)


def _grow(plan: GrowthPlan, state: OptimizerState, source: PreTrainedModel, target: PreTrainedModel, policy: Policy) -> OptimizerState:
    """The state of the grown model's optimizer; its tensors are computed when their rows are read."""
    moments: Mapping[str, Any] = {}
    if policy != "reset":
        beta2 = max(float(g.get("betas", (0, 0.999))[1]) for g in state.groups)
        moments = grow_state(plan, state, source, target, policy, beta2)
    names = _grown_names(state.groups, source, target, plan)
    groups = [{**g, "params": members} for g, members in zip(state.groups, names, strict=True)]
    placed = {n for members in names for n in members}
    return OptimizerState(groups, {n: s for n, s in moments.items() if n in placed})


def _by_position(state: OptimizerState) -> dict[str, Any]:
    """As Trainer's optimizer.pt holds it."""
    groups, at = [], 0
    for group in state.groups:
        members = group["params"]
        named = {"param_names": list(members)} if "param_names" in group else {}
        groups.append({**group, **named, "params": list(range(at, at + len(members)))})
        at += len(members)
    numbers = {n: i for i, n in enumerate(n for g in state.groups for n in g["params"])}
    return {"state": {numbers[n]: s for n, s in state.state.items()}, "param_groups": groups}


def _by_name(state: OptimizerState, target: PreTrainedModel) -> dict[str, Any]:
    """As accelerate's optimizer.bin holds it, which torch wants with a state of every parameter."""
    from hf_grow.training.growth_state.optimizer_forms import initial_state

    named = [{**g, **({"param_names": list(g["params"])} if "param_names" in g else {})} for g in state.groups]
    whole = dict(state.state)
    for group in state.groups:
        # In the form that others of the group have, of as many dimensions where there are any.
        held = sorted((n for n in group["params"] if n in state.state), key=lambda n: target.get_parameter(n).dim())
        for name in (n for n in group["params"] if held and n not in state.state):
            p = target.get_parameter(name)
            like = min(held, key=lambda n: abs(target.get_parameter(n).dim() - p.dim()))
            whole[name] = initial_state(tuple(p.shape), state.state[like], name)
    return {"state": whole, "param_groups": named}


def grow_optimizer(
    optimizer: Optimizer, plan: GrowthPlan, grown: PreTrainedModel, *, source: PreTrainedModel | None = None, policy: Policy = "map"
) -> Optimizer:
    """An optimizer like `optimizer` over the parameters of `grown`, with its moments grown as `hf-grow --with-optimizer` grows them.

    AdamW (also of bitsandbytes and torchao), SGD, Muon, Lion and Adafactor; of two optimizers that share a model, each is grown alone.

    ``grown``: of ``hf_grow.grow_model(model, plan)``. ``source``: the model that `optimizer` trains; by default its parameters are identified by
    their order (Trainer's two groups, or one group of all) or by the names in its groups. ``policy``: map, keep-and-zero or reset. `optimizer`
    is not changed; a scheduler is not grown. Raises SourceError for a state that cannot be grown, or does not fit the plan.
    """
    from hf_grow.checkpoint.torch_files import map_tensors

    if policy not in get_args(Policy):
        raise InputError(f"There is no policy {policy!r}.", hint=f"Policies: {', '.join(get_args(Policy))}.")
    names = None
    if source is not None:
        own = {id(p): n for n, p in source.named_parameters()}
        if any(id(p) not in own for g in optimizer.param_groups for p in g["params"]):
            raise InputError("The optimizer has parameters that are not those of `source`.", hint="Pass the model that it trains.")
        names = [[own[id(p)] for p in g["params"]] for g in optimizer.param_groups]
    saved = optimizer.state_dict()
    held = {i: map_tensors(s, in_memory) for i, s in saved["state"].items()}
    small, large = meta_model(plan.source.config), meta_model(plan.growth.config)
    grown_state = _grow(plan, named_state(saved["param_groups"], held, small, names), small, large, policy)
    grown_names = [g["params"] for g in grown_state.groups]
    parameters = dict(grown.named_parameters())
    if missing := next((n for members in grown_names for n in members if n not in parameters), None):
        raise InputError(f"The grown model has no parameter {missing}.", hint="Pass hf_grow.grow_model(model, plan).")
    settings = [{k: v for k, v in g.items() if k not in ("params", "param_names")} for g in optimizer.param_groups]
    groups = [{**g, "params": [parameters[n] for n in members]} for g, members in zip(settings, grown_names, strict=True)]
    settings_of_all = {**vars(optimizer), **optimizer.defaults}  # torchao keeps its block size beside the groups
    accepted = [*inspect.signature(type(optimizer)).parameters][1:]
    new_optimizer = type(optimizer)(groups, **{k: settings_of_all[k] for k in accepted if k in settings_of_all})
    new_state = map_tensors(_by_position(grown_state)["state"], materialized)
    new_optimizer.load_state_dict({**new_optimizer.state_dict(), "state": new_state})
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
    from hf_grow.checkpoint.torch_files import save_torch_file

    try:
        save_torch_file(state, path)
    except (RuntimeError, OSError) as error:  # RuntimeError: raised by torch when the disk is full
        raise ExecutionError(
            f"The optimizer state could not be written to {path}: {str(error).splitlines()[0]}.",
            hint="Free some disk space; the model itself is written. Continue with --resume.",
        ) from None


def _split_groups(out: Path, state: OptimizerState, factors: Mapping[str, trajectory.StepFactors]) -> OptimizerState:
    """Splits every group by its parameters' factors, and the scheduler's lists of learning rates alike."""
    import torch

    new_groups, origin, lr_factors = [], [], []
    for i, group in enumerate(state.groups):
        for f, chosen in trajectory.split_by_factors(group["params"], factors).items():
            rates: dict[str, Any] = {k: group[k] * f.lr for k in ("lr", "initial_lr") if k in group}
            settings: dict[str, Any] = {"weight_decay": group["weight_decay"] / f.lr, "eps": group["eps"] * f.eps, "param_names": []}
            new_groups.append({**group, **rates, **settings, "params": chosen})
            origin.append(i)
            lr_factors.append(f.lr)
    if (out / SCHEDULER).is_file():
        schedule = read_torch_state(out / SCHEDULER)
        for key, value in schedule.items():
            if isinstance(value, list) and len(value) == len(state.groups):
                is_rate = key in ("base_lrs", "_last_lr")
                schedule[key] = [value[i] * lr if is_rate else value[i] for i, lr in zip(origin, lr_factors, strict=True)]
        torch.save(schedule, out / SCHEDULER)
    return OptimizerState(new_groups, state.state)


def _grown_names(
    groups: Sequence[Mapping[str, Any]], source: PreTrainedModel, target: PreTrainedModel, plan: GrowthPlan
) -> list[list[str]]:
    """The target's parameters in groups like the source's: Trainer's own, all in one, or each where its origin was."""
    held = [sorted(g["params"]) for g in groups]
    if held == [sorted(g) for g in trainer_param_groups(source)]:
        return trainer_param_groups(target)
    every = [n for n, _ in target.named_parameters()]
    if len(groups) == 1 and held[0] == sorted(n for n, _ in source.named_parameters()):
        return [every]
    group_of, own = {n: i for i, g in enumerate(groups) for n in g["params"]}, {n for n, _ in source.named_parameters()}
    out: list[list[str]] = [[] for _ in groups]
    for name in every:
        match = re.search(r"\.layers\.(\d+)\.", name)
        origin = name if match is None else name.replace(match[0], f".layers.{plan.growth.layers[int(match[1])].sources[0]}.", 1)
        if origin in group_of:
            out[group_of[origin]].append(name)
        elif origin not in own:  # else it is frozen, or trained by another optimizer
            raise InputError(f"No parameter group of the optimizer contains {origin}, from which {name} grows.")
    return out


def grow_checkpoint_state(folder: Path, plan: GrowthPlan, policy: Policy, *, exact_steps: bool = False) -> Callable[[Path], set[str]]:
    """For `execute`: a function that writes the grown state into the unfinished output folder and returns the names of the files."""

    def write(out: Path) -> set[str]:
        before = {p.name for p in out.iterdir()}
        grow_trainer_state(folder, out, plan, policy, exact_steps=exact_steps)
        return {p.name for p in out.iterdir()} - before

    return write
