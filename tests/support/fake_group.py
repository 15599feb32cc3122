"""A process group of which this process is any member: nothing is sent."""

from __future__ import annotations

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore


def join(rank: int, world: int) -> None:
    """Becomes member `rank` of `world`; leaves the group before."""
    leave()
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
