"""Run by mp.spawn: a teacher in each of several processes, whole or in shards; its logits and the memory it takes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
import torch.distributed as dist


def memory(kind: str) -> int:
    """VmRSS or VmHWM, its highest value; not ru_maxrss, which a process inherits from the one that started it."""
    return 1024 * int(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind)))


def measure(rank: int, world: int, port: int, small: str, folder: str, sharded: bool, out: str) -> None:
    """``small``: a model that is loaded first, so that modules and threads are not counted."""
    from accelerate import Accelerator

    from hf_grow.training.distillation.distill import ModelTeacher
    from hf_grow.training.distributed.launch import close_process_group
    from hf_grow.training.setup.model_setup import frozen_model

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    accelerator = Accelerator(cpu=True)
    try:
        for place in (small, folder):
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
            before = memory("VmRSS")
            teacher = ModelTeacher(*frozen_model(place, None, "auto", None, lambda message: None, sharded=sharded))
            teacher.prepare(accelerator)
            held = sum(local(p).untyped_storage().nbytes() for p in teacher.model.parameters())
            logits, _ = teacher(torch.arange(24).reshape(2, 12))
            facts = {"held": held, "peak": memory("VmHWM") - before, "logits": float(logits.double().square().sum())}
        (Path(out) / f"teacher-{rank}.json").write_text(json.dumps(facts))
        del teacher, logits
    finally:
        dist.barrier()
        del accelerator
        close_process_group()


def local(p: torch.Tensor) -> torch.Tensor:
    held: torch.Tensor = p.to_local() if hasattr(p, "to_local") else p
    return held
