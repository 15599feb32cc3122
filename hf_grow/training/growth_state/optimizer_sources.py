"""The optimizer state of a checkpoint folder by parameter name, opened without reading a tensor and without executing pickled code.

optimizer.pt    Trainer's own: parameters are numbers, group after group
optimizer.bin   accelerate's, under FSDP with FULL_STATE_DICT: parameters are names
optimizer_0/    accelerate's, under FSDP with SHARDED_STATE_DICT: torch.distributed.checkpoint
optimizer.json  of `hf-grow train` under FSDP2 (`sharded_state`)
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_grow.common.safe_files import read_bytes
from hf_grow.errors import SourceError
from hf_grow.model.meta_model import trainer_param_groups
from hf_grow.training.growth_state.optimizer_files import SHARDS, TRAINER_STATE, optimizer_file
from hf_grow.training.growth_state.optimizer_state import MemoryTensor, OptimizerState
from hf_grow.training.growth_state.sharded_state import read_sharded_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_grow.growth.tensors import RowTensor

SHARDED, UNIVERSAL = "optimizer_0", "zero"
GROUPS = "optimizer_state.pt"


def optimizer_path(folder: Path) -> Path | None:
    """The optimizer state of a checkpoint folder; None if there is none that can be read."""
    sharded = folder / SHARDED
    return optimizer_file(folder) or (sharded if (sharded / ".metadata").is_file() else _universal(folder))


def _universal(folder: Path) -> Path | None:
    """The one folder of ds_to_universal. Raises SourceError for several."""
    found = sorted({p.parent for pattern in ("zero", "*/zero") for p in folder.glob(f"{pattern}/{GROUPS}")})
    if len(found) > 1:
        raise SourceError(
            f"{folder} holds several universal checkpoints: {', '.join(str(p.parent) for p in found)}.", hint="Name one of them."
        )
    return next(iter(found), None)


def read_optimizer(path: Path, model: PreTrainedModel) -> tuple[list[dict[str, Any]], dict[Any, dict[str, Any]]]:
    """Groups and state at one of the paths above, with RowTensors: of a .pt file by position, else by name. Raises SourceError."""
    if path.name == UNIVERSAL:
        found = _read_universal(path, model)
        return found.groups, {n: dict(s) for n, s in found.state.items()}
    if path.name == SHARDS:
        return read_sharded_state(path)
    return _read_sharded(path) if path.name == SHARDED else _read_file(path)


def open_optimizer(path: Path, model: PreTrainedModel, names: Sequence[Sequence[str]] | None = None) -> OptimizerState:
    """The state at one of the paths above. ``model``: whose parameters it holds, on any device.

    ``names``: the parameter names of each group, where the optimizer was not created by Trainer and its groups hold no names.
    Raises SourceError for a damaged state, and for that of another model.
    """
    return _read_universal(path, model) if path.name == UNIVERSAL else named_state(*read_optimizer(path, model), model, names)


def _read_file(path: Path) -> tuple[list[dict[str, Any]], dict[Any, dict[str, Any]]]:
    """Groups and state of a file, with FileTensors. Raises SourceError for a file that holds anything else."""
    from hf_grow.checkpoint.torch_files import open_torch_file

    saved = open_torch_file(path)
    try:
        groups, state = [dict(g) for g in saved["param_groups"]], dict(saved["state"])
        if not all(isinstance(g["params"], list) for g in groups) or not all(isinstance(s, dict) for s in state.values()):
            raise ValueError("its groups or its state have another form")
    except (ValueError, TypeError, LookupError) as error:
        raise SourceError(f"{path} cannot be read: {error}") from None
    return groups, state


def _read_sharded(folder: Path) -> tuple[list[dict[str, Any]], dict[Any, dict[str, Any]]]:
    from hf_grow.checkpoint.distributed_checkpoint import DistributedCheckpoint

    found = DistributedCheckpoint(folder)
    groups: dict[int, dict[str, Any]] = {}
    state: dict[Any, dict[str, Any]] = {}
    for path, value in {**found.objects, **found.tensors}.items():
        match path:
            case ("optimizer", "param_groups", number, key) if number.isdecimal():
                groups.setdefault(int(number), {})[key] = value
            case ("optimizer", "state", name, key):
                state.setdefault(name, {})[key] = value
            case _:
                raise SourceError(f"{folder} holds {'.'.join(path)}, which is not part of an optimizer's state.")
    if not groups or any(not isinstance(g.get("params"), list) for g in groups.values()):
        raise SourceError(f"{folder} holds no parameter groups.", hint="Was it written by accelerate?")
    ordered = [groups[i] for i in sorted(groups)]
    return [{**g, "params": [str(n) for n in g["params"]]} for g in ordered], state


def _read_universal(folder: Path, model: PreTrainedModel) -> OptimizerState:
    """AdamW's state, of Trainer's groups. Beside the moments, DeepSpeed writes the groups in a file with classes of its own, of which numbers are read."""
    from torch.optim import AdamW

    from hf_grow.checkpoint.torch_files import open_torch_file, plain_values

    names, shapes = trainer_param_groups(model), {n: tuple(p.shape) for n, p in model.named_parameters()}
    try:
        saved = plain_values(folder / GROUPS)["param_groups"]
        wanted = {k: v for k, v in AdamW([model.get_parameter(names[0][0])]).param_groups[0].items() if k != "params"}
        taken = [{k: g[k] for k in ("lr", "initial_lr", "betas", "eps", "weight_decay") if k in g} for g in saved]
        if not all(isinstance(x, (int, float)) for g in taken for v in g.values() for x in (v if isinstance(v, (list, tuple)) else [v])):
            raise ValueError("its groups hold something else than numbers")
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise SourceError(f"{folder / GROUPS} holds no parameter groups: {error}.") from None
    if len(taken) != len(names):
        raise SourceError(f"{folder / GROUPS} has {len(taken)} parameter groups; those of Trainer's AdamW are {len(names)}.")
    state: dict[str, dict[str, Any]] = {}
    for name, shape in shapes.items():
        files = {key: folder / name / f"{key}.pt" for key in ("exp_avg", "exp_avg_sq")}
        if not all(f.is_file() for f in files.values()):
            continue  # a parameter without gradient
        state[name] = {"step": _universal_step(folder, name, saved)}
        for key, file in files.items():
            held: Any = open_torch_file(file)
            held = held.get("param") if isinstance(held, dict) else held  # ZeRO-3: the tensor alone, flat
            if getattr(held, "dtype", None) is None or math.prod(held.shape) != math.prod(shape) or not held.is_contiguous():
                raise SourceError(f"{file} is not {key} of {name}, whose shape is {list(shape)}.")
            state[name][key] = held.reshaped(shape)
    if not state:
        raise SourceError(
            f"{folder} holds no exp_avg.pt of this model's parameters.", hint="Was another model trained, or by another optimizer?"
        )
    groups = [{**wanted, **settings, "params": list(members)} for settings, members in zip(taken, names, strict=True)]
    return OptimizerState(groups, state)


def _universal_step(folder: Path, name: str, groups: Sequence[Mapping[str, Any]]) -> RowTensor:
    """The step count: of the parameter, of its group, or of Trainer's checkpoint around the folder."""
    import torch

    from hf_grow.checkpoint.torch_files import open_torch_file

    found: Any = None
    if (folder / name / "step.pt").is_file():
        found = open_torch_file(folder / name / "step.pt")
        found = float(found.whole()) if hasattr(found, "whole") else found
    elif isinstance(groups[0].get("step"), int):
        found = groups[0]["step"]
    else:
        state = next((p for p in (folder.parent / TRAINER_STATE, folder.parents[1] / TRAINER_STATE) if p.is_file()), None)
        found = None if state is None else json.loads(read_bytes(state)).get("global_step")  # not read_json: its losses may be NaN
    if not isinstance(found, (int, float)):
        raise SourceError(f"{folder} says nowhere at which step it was saved.", hint=f"Copy Trainer's {TRAINER_STATE} beside it.")
    return MemoryTensor(torch.tensor(float(found)))


def named_state(
    groups: Sequence[Mapping[str, Any]],
    state: Mapping[Any, Mapping[str, Any]],
    model: PreTrainedModel,
    names: Sequence[Sequence[str]] | None,
) -> OptimizerState:
    """A state by position or name as one by name. Raises SourceError if no known order fits by count and shape."""
    from hf_grow.training.growth_state.optimizer_forms import parameter_shape

    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    for candidate in _candidates(groups, model, names):
        if [len(c) for c in candidate] != [len(g["params"]) for g in groups]:
            continue
        keys = {n: i for members, g in zip(candidate, groups, strict=True) for n, i in zip(members, g["params"], strict=True)}
        known = {n: parameter_shape(state[i]) for n, i in keys.items() if i in state}
        if keys.keys() <= shapes.keys() and all(shape in (None, shapes[n]) for n, shape in known.items()):
            named = [{**g, "params": list(members)} for g, members in zip(groups, candidate, strict=True)]
            return OptimizerState(named, {n: state[i] for n, i in keys.items() if i in state})
    raise SourceError(
        f"The optimizer has groups of {[len(g['params']) for g in groups]} parameters, which are not those of the model ({len(shapes)}).",
        hint="Was another model trained, or only part of it? For custom groups, create the optimizer from named_parameters(), so that their names are saved.",
    )


def _candidates(
    groups: Sequence[Mapping[str, Any]], model: PreTrainedModel, names: Sequence[Sequence[str]] | None
) -> list[list[list[str]]]:
    """Possible assignments of this model's parameters to the groups."""
    if names is not None:
        return [[list(g) for g in names]]
    if all("param_names" in g for g in groups):
        return [[list(g["param_names"]) for g in groups]]
    if all(isinstance(n, str) for g in groups for n in g["params"]):
        return [[list(g["params"]) for g in groups]]
    return [trainer_param_groups(model), [[n for n, _ in model.named_parameters()]]]
