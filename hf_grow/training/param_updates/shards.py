"""The part of a tensor that this process holds, where a parameter is sharded (DTensor): windows, local parts, and sums over the parts.

A DTensor may be sharded along any dimensions, over any mesh: FSDP2 shards dimension 0, tensor parallelism the first or the last.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from hf_grow.errors import ExecutionError
from hf_grow.training.distributed.processes import Processes

if TYPE_CHECKING:
    from torch import Tensor

Window = tuple[range, ...]
"""For every dimension, the positions that this process holds."""


def is_sharded(tensor: Any) -> bool:
    return hasattr(tensor, "placements")


def processes() -> Processes:
    """Those of torch's process group; one where there is none."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return Processes()
    return Processes(distributed.get_rank(), distributed.get_world_size())


def local(tensor: Tensor) -> Tensor:
    """The local shard of a DTensor, sharing its memory; any other tensor unchanged."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def full_tensor(tensor: Tensor) -> Tensor:
    """The unsharded tensor; a collective for a DTensor, every process must call. Any other tensor is returned as it is."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


def local_window(tensor: Any) -> Window:
    """Positions of this process's shard in the whole tensor; all of them for a tensor that is not sharded."""
    import torch

    if not is_sharded(tensor):
        return tuple(range(n) for n in tensor.shape)
    from torch.distributed.tensor import DTensor

    assert isinstance(tensor, DTensor)
    found = []
    for dim, length in enumerate(tensor.shape):
        if not any(p.is_shard(dim) for p in tensor.placements):
            found.append(range(length))
            continue
        held = _positions(length, dim, tensor)
        first = int(held[0]) if len(held) else 0
        if not torch.equal(held, torch.arange(first, first + len(held))):
            raise ExecutionError(f"A shard of {list(tensor.shape)} by {tensor.placements} is not contiguous.")
        found.append(range(first, first + len(held)))
    return tuple(found)


def _positions(length: int, dim: int, like: Any) -> Tensor:
    """The positions along one dimension: a numbered vector, sharded as that dimension is. Nothing is sent."""
    import torch
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    def along(placement: Any) -> Any:
        if not placement.is_shard(dim):
            return Replicate()
        # FSDP2 over tensor parallelism shards in strides, by a placement of its own kind.
        return Shard(0) if type(placement) is Shard else type(placement)(0, split_factor=placement.split_factor)

    device = like.to_local().device
    numbers = torch.arange(length, device="cpu" if device.type == "meta" else device)
    return distribute_tensor(numbers, like.device_mesh, [along(p) for p in like.placements], src_data_rank=None).to_local().cpu()


def as_sharded(local: Tensor, like: Any) -> Tensor:
    """The local shard as a DTensor, sharded as `like` is; unchanged where that is plain."""
    if not is_sharded(like):
        return local
    from torch.distributed.tensor import DTensor

    made: Tensor = DTensor.from_local(local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())
    return made


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor on the device of `like`, sharded as it is: of a plain tensor the part that this process holds, a copy of its own. Nothing is sent."""
    device = local(like).device
    if is_sharded(tensor) or not is_sharded(like):
        return tensor.to(device)
    part = tensor[tuple(slice(r.start, r.stop) for r in local_window(like))]
    return as_sharded(part.to(device, copy=True).contiguous(), like)


def holders(tensor: Any) -> int:
    """How many processes hold each entry: 1 for every one of a tensor in one process, all of them for a plain tensor in several."""
    cuts = math.prod(tensor.device_mesh.size(i) for i, p in enumerate(tensor.placements) if p.is_shard()) if is_sharded(tensor) else 1
    return processes().count // cuts


def is_first_holder(tensor: Any) -> bool:
    """Whether this process is the first of those that hold the same part of a tensor; of a plain one, the first of all."""
    if is_sharded(tensor):
        return all(at == 0 for at, p in zip(tensor.device_mesh.get_coordinate(), tensor.placements, strict=True) if not p.is_shard())
    return processes().index == 0


def sum_over_processes(part: Tensor, tensors: Iterable[Any]) -> Tensor:
    """The sum of what every process has, in place, if one of ``tensors`` is sharded: then every process must call. Else unchanged."""
    if any(is_sharded(t) for t in tensors):
        import torch.distributed as dist

        dist.all_reduce(part)
    return part
