"""Tensors sharded like parameters (DTensor, FSDP2)."""

from __future__ import annotations

from torch import Tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The unsharded tensor; a collective for a DTensor, every process must call. Any other tensor is returned as it is."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """An unsharded ``tensor``, which every process holds, on the device of ``parameter`` and sharded like it."""
    if not hasattr(parameter, "placements"):
        return tensor.to(parameter.device)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    mesh, placements = parameter.device_mesh, parameter.placements
    # src_data_rank=None: nothing is sent. The clone releases the unsharded storage.
    shard = distribute_tensor(tensor.to(parameter.device), mesh, placements, src_data_rank=None)
    return DTensor.from_local(shard.to_local().clone(), mesh, placements, shape=tensor.shape, stride=tensor.stride())


def sum_over_shards(value: Tensor, parameter: Tensor) -> Tensor:
    """The sum of a scalar over the processes with different shards of ``parameter``; replicas count once. A collective for a DTensor."""
    if not hasattr(parameter, "placements"):
        return value
    from torch.distributed.tensor import DTensor, Partial, Replicate

    assert isinstance(parameter, DTensor)
    placements = [Partial() if p.is_shard() else Replicate() for p in parameter.placements]
    total: Tensor = DTensor.from_local(value, parameter.device_mesh, placements).full_tensor()
    return total
