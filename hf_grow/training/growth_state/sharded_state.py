"""The optimizer state of a sharded training (FSDP2): groups and numbers by parameter name in SHARDS; its folder holds the tensors, as KEY.PARAMETER."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_grow.common.safe_files import read_json
from hf_grow.errors import ExecutionError, SourceError
from hf_grow.training.growth_state.optimizer_state import MemoryTensor
from hf_grow.training.growth_state.state_files import NEXT_STEP
from hf_grow.training.param_updates.parameter_map import parameters

if TYPE_CHECKING:
    from torch import Tensor


def read_sharded_state(path: Path) -> tuple[list[dict[str, Any]], dict[Any, dict[str, Any]]]:
    """What `sharded_state` returned."""
    import torch

    from hf_grow.checkpoint.distributed_checkpoint import DistributedCheckpoint

    saved, shards = read_json(path), path.with_suffix("")
    try:
        groups = [{k: tuple(v) if isinstance(v, list) and k != "params" else v for k, v in g.items()} for g in saved["param_groups"]]
        dtypes = {k: getattr(torch, d) for k, d in saved["dtypes"].items()}
        state = {
            n: {k: MemoryTensor(torch.tensor(v, dtype=dtypes[k])) if k in dtypes else v for k, v in numbers.items()}
            for n, numbers in saved["state"].items()
        }
        count = int(saved.get("tensors", 0))
        if not all(isinstance(n, str) for g in groups for n in g["params"]):
            raise ValueError("its parameters have no names")
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise SourceError(f"{path} is damaged: {' '.join(str(error).split())[:200]}.") from None
    stored_tensors = DistributedCheckpoint(shards).tensors if shards.is_dir() and any(shards.iterdir()) else {}
    if len(stored_tensors) < count:
        raise SourceError(f"{shards} holds {len(stored_tensors)} of the {count} tensors of {path.name}.", hint=NEXT_STEP)
    for (stored,), tensor in stored_tensors.items():
        key, _, name = stored.partition(".")
        state.setdefault(name, {})[key] = tensor
    return groups, state


def sharded_state(model: Any, optimizer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of an optimizer as SHARDS and its folder hold it: tensors as KEY.PARAMETER, and the content of the file.

    Raises ExecutionError for a state that is not sharded as its parameter is.
    """
    from torch import Tensor

    names = {p: n for n, p in parameters(model).items()}
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    dtypes: dict[str, str] = {}
    for p, state in optimizer.state.items():
        for key, value in state.items():
            if not isinstance(value, Tensor) or not value.dim():
                numbers.setdefault(names[p], {})[key] = value.item() if isinstance(value, Tensor) else value
                if isinstance(value, Tensor):
                    dtypes[key] = str(value.dtype).removeprefix("torch.")
            elif hasattr(p, "placements") and getattr(value, "placements", None) != p.placements:
                raise ExecutionError(
                    f"{key}, which {type(optimizer).__name__} keeps for {names[p]}, is not sharded as the parameter is, and cannot be saved.",
                    hint="Use an optimizer whose state has the shape of the parameter, such as optim: adamw_torch.",
                )
            else:
                tensors[f"{key}.{names[p]}"] = value
    groups = [
        {k: v.item() if isinstance(v, Tensor) else v for k, v in g.items() if k != "param_names"}
        | {"params": [names[p] for p in g["params"]]}
        for g in optimizer.param_groups
    ]
    return tensors, {"param_groups": groups, "state": numbers, "dtypes": dtypes, "tensors": len(tensors)}
