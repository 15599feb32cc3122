"""The optimizer's part of a Trainer checkpoint: read without running pickled code, and made to fit the optimizer of this run.

    optimizer.pt    Trainer's own: parameters are numbers, group after group
    optimizer.bin   accelerate's, under FSDP with FULL_STATE_DICT: parameters are names, everything whole

A checkpoint is taken up in either form, whatever this run shares: one may train on one GPU, grow, and go on under FSDP2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_grow.errors import SourceError
from hf_grow.model.meta_model import trainer_param_groups

POSITIONS, NAMES = "optimizer.pt", "optimizer.bin"
SCHEDULER, SCALER, TRAINER_STATE = "scheduler.pt", "scaler.pt", "trainer_state.json"


def optimizer_file(folder: Path) -> Path | None:
    """Where the optimizer state lies; None where there is none that can be read."""
    return next((folder / name for name in (POSITIONS, NAMES) if (folder / name).is_file()), None)


def no_optimizer(folder: Path) -> SourceError:
    """Why there is none, and what to do."""
    reset = "the schedule and the place in the data go on, the moments begin anew"
    if any(folder.glob("global_step*")):
        return SourceError(
            f"{folder} holds DeepSpeed's optimizer state: pickles, which are never loaded.",
            hint=f"Grow with --optimizer-policy reset: {reset}. Where {folder} holds no weights either, make them first, put its config.json "
            f"and tokenizer beside them, and grow that folder: python {folder}/zero_to_fp32.py {folder} WEIGHTS --safe_serialization",
        )
    if any(folder.glob("optimizer_*")) or any(folder.glob("pytorch_model_fsdp*")):
        return SourceError(
            f"{folder} holds FSDP's optimizer state in pieces.",
            hint=f"Save with fsdp_state_dict_type: FULL_STATE_DICT, or grow with --optimizer-policy reset: {reset}.",
        )
    return SourceError(f"{folder} has no {POSITIONS} and no {NAMES}.", hint="Give a folder that Trainer saved, such as checkpoint-500.")


def read_optimizer(path: Path, *, mmap: bool = False) -> tuple[list[dict[str, Any]], dict[Any, dict[str, Any]]]:
    """Groups and state, on the CPU. ``mmap``: read from the file when used. Raises SourceError for a file that holds anything else."""
    import torch

    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        groups, state = [dict(g) for g in saved["param_groups"]], dict(saved["state"])
        if not all(isinstance(g["params"], list) for g in groups) or not all(isinstance(s, dict) for s in state.values()):
            raise ValueError("its groups or its state have another form")
    except Exception as error:  # whatever a damaged or hostile file raises under weights_only
        raise SourceError(f"{path} cannot be read: {(str(error).splitlines() or ['?'])[0]}") from None
    return groups, state


def by_name(groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Any], names: Sequence[Sequence[str]]) -> dict[str, Any]:
    """A state by position as one by name."""
    found = {i: n for g, members in zip(groups, names, strict=True) for i, n in zip(g["params"], members, strict=True)}
    named = [{**g, "params": list(members)} for g, members in zip(groups, names, strict=True)]
    return {"state": {found[i]: s for i, s in state.items()}, "param_groups": named}


def by_position(groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Any], names: Sequence[Sequence[str]]) -> dict[str, Any]:
    """A state by name as one by position, for an optimizer whose groups hold the parameters `names`. Raises ValueError, KeyError."""
    of = {n: g for g in groups for n in g["params"]}
    found, at = [], 0
    for members in names:
        theirs = {id(of[n]): of[n] for n in members}
        if len(theirs) != 1:
            raise ValueError(f"it holds {members[0]} and {members[-1]} in different groups")
        found.append({**next(iter(theirs.values())), "params": list(range(at, at + len(members)))})
        at += len(members)
    flat = [n for members in names for n in members]
    return {"state": {i: state[n] for i, n in enumerate(flat) if n in state}, "param_groups": found}


def fresh(shape: tuple[int, ...]) -> dict[str, Any]:
    """AdamW's state before the first step."""
    import torch

    return {"step": torch.zeros(()), "exp_avg": torch.zeros(shape), "exp_avg_sq": torch.zeros(shape)}


def put_optimizer(path: Path, model: Any, optimizer: Any) -> None:
    """The state in a checkpoint into the optimizer of a model, sharded (FSDP2) or whole. Raises SourceError where it does not fit."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict
    from torch.distributed.tensor import DTensor

    groups, state = read_optimizer(path)
    sharded = any(isinstance(p, DTensor) for p in model.parameters())
    named = path.name == NAMES
    try:
        if sharded and not named:
            given = [g.pop("param_names", None) for g in groups]
            names = [list(g) for g in given if g] if all(given) else trainer_param_groups(model)
            saved = by_name(groups, state, names)
        elif named and not sharded:
            called = {p: n for n, p in model.named_parameters()}
            saved = by_position(groups, state, [[called[p] for p in g["params"]] for g in optimizer.param_groups])
        else:
            saved = {"state": state, "param_groups": groups}
        if not sharded:
            optimizer.load_state_dict(saved)
            return
        # torch wants a state of every parameter here: one that AdamW would begin with is zero.
        held = saved["state"]
        held |= {n: fresh(tuple(p.shape)) for n, p in model.named_parameters() if p.requires_grad and n not in held}
        set_optimizer_state_dict(model, optimizer, saved, options=StateDictOptions(full_state_dict=True))
    except (ValueError, KeyError, RuntimeError) as error:
        raise SourceError(
            f"{path} is not the state of this optimizer: {' '.join(str(error).split())[:200]}.",
            hint="It was made for other parameters or groups (those of --exact-steps fit trajectory.groups only). Grow with --optimizer-policy reset.",
        ) from None


# ---- a checkpoint taken up ---------------------------------------------------------------------------------------------------------------

SETTINGS = {
    "learning_rate": ("initial_lr", None), "weight_decay": ("weight_decay", None), "adam_beta1": ("betas", 0), "adam_beta2": ("betas", 1),
    "adam_epsilon": ("eps", None),
}  # fmt: skip
"""Arguments of a recipe -> where they stand in a parameter group. (A schedule notes the learning rate at its height as initial_lr.)"""
HOW = ("fused", "foreach", "capturable", "differentiable")
"""How a step is computed is this run's matter, not the checkpoint's."""


def take_up(folder: Path, model: Any, optimizer: Any, scheduler: Any, given: frozenset[str]) -> dict[str, tuple[float, str]]:
    """Moments, groups and schedule of a checkpoint, each as far as it is there.

    Where the checkpoint's settings are not those of this run's arguments, the ones in ``given`` hold, and else the checkpoint's. The shape and
    the length of the schedule are always this run's. Returns what differed: argument -> (its value, 'recipe' or 'checkpoint').
    Raises SourceError for a state that does not fit.
    """
    import torch

    own = [dict(g) for g in optimizer.param_groups]
    file = optimizer_file(folder)
    if file is not None:
        put_optimizer(file, model, optimizer)
    if (folder / SCHEDULER).is_file():
        schedule = torch.load(folder / SCHEDULER, map_location="cpu", weights_only=True)
        rates = schedule.get("base_lrs", ())
        if file is None and len(rates) == len(own):  # as the groups would have said
            for group, height, rate in zip(optimizer.param_groups, rates, schedule["_last_lr"], strict=True):
                group |= {"initial_lr": height, "lr": rate}
        scheduler.load_state_dict(schedule)
    return settle(optimizer, scheduler, own, given)


def settle(optimizer: Any, scheduler: Any, own: Sequence[Mapping[str, Any]], given: frozenset[str]) -> dict[str, tuple[float, str]]:
    """The groups as they were loaded, with those of their settings that `take_up` says from `own`, the groups as they were before."""
    told: dict[str, tuple[float, str]] = {}
    for group, ours in zip(optimizer.param_groups, own, strict=True):
        group |= {k: ours[k] for k in HOW if k in ours}
        for name, (key, at) in SETTINGS.items():
            if key not in group or key not in ours:
                continue
            theirs, mine = (g[key] if at is None else g[key][at] for g in (group, ours))
            if theirs == mine:
                continue
            told.setdefault(name, (float(mine), "recipe") if name in given else (float(theirs), "checkpoint"))
            if name not in given:
                continue
            group[key] = mine if at is None else tuple(mine if i == at else old for i, old in enumerate(group[key]))
    if hasattr(scheduler, "lr_lambdas"):  # as it will compute them itself at its next step
        scheduler.base_lrs = [g["initial_lr"] for g in optimizer.param_groups]
        factors = [f(scheduler.last_epoch) for f in scheduler.lr_lambdas]
        scheduler._last_lr = [b * f for b, f in zip(scheduler.base_lrs, factors, strict=True)]
        for group, rate in zip(optimizer.param_groups, scheduler._last_lr, strict=True):
            group["lr"] = rate
    return told
