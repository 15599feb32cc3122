"""Run by mp.spawn: a teacher in each of several processes, whole or in shards; its logits and the memory it takes."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import torch
import torch.distributed as dist


def peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(rank: int, world: int, port: int, folder: str, sharded: bool, out: str) -> None:
    from accelerate import Accelerator
    from transformers import LlamaForCausalLM  # noqa: F401 - loaded before memory is measured

    from hf_grow.training.distillation.distill import ModelTeacher
    from hf_grow.training.distributed.launch import close_process_group
    from hf_grow.training.setup.model_setup import frozen_model

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    accelerator = Accelerator(cpu=True)
    before = peak()
    try:
        teacher = ModelTeacher(*frozen_model(folder, None, "auto", None, lambda message: None, sharded=sharded))
        teacher.prepare(accelerator)
        held = sum(local(p).untyped_storage().nbytes() for p in teacher.model.parameters())
        logits, _ = teacher(torch.arange(24).reshape(2, 12) + rank)
        facts = {"held": held, "peak": peak() - before, "logits": float(logits.double().square().sum()) if rank == 0 else 0.0}
        (Path(out) / f"teacher-{rank}.json").write_text(json.dumps(facts))
        del teacher, logits
    finally:
        dist.barrier()
        del accelerator
        close_process_group()


def local(p: torch.Tensor) -> torch.Tensor:
    held: torch.Tensor = p.to_local() if hasattr(p, "to_local") else p
    return held
