"""The optimizer state of a checkpoint folder by parameter name, opened without reading a tensor and without executing pickled code.

optimizer.pt    Trainer's own: parameters are numbers, group after group
optimizer.bin   accelerate's, under FSDP with FULL_STATE_DICT: parameters are names
optimizer_0/    accelerate's, under FSDP with SHARDED_STATE_DICT: torch.distributed.checkpoint
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_grow.errors import SourceError
from hf_grow.model.meta_model import trainer_param_groups
from hf_grow.training.growth_state.optimizer_files import optimizer_file
from hf_grow.training.growth_state.optimizer_state import OptimizerState

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHARDED = "optimizer_0"


def optimizer_path(folder: Path) -> Path | None:
    """The optimizer state of a checkpoint folder; None if there is none that can be read."""
    sharded = folder / SHARDED
    return optimizer_file(folder) or (sharded if (sharded / ".metadata").is_file() else None)


def open_optimizer(path: Path, model: PreTrainedModel, names: Sequence[Sequence[str]] | None = None) -> OptimizerState:
    """The state at one of the paths above. ``model``: whose parameters it holds, on any device.

    ``names``: the parameter names of each group, where the optimizer was not created by Trainer and its groups hold no names.
    Raises SourceError for a damaged state, and for that of another model.
    """
    return named_state(*(_read_sharded(path) if path.name == SHARDED else _read_file(path)), model, names)


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
