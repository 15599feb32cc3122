"""Processes that hold a sharded model and write it: as shards, and as plain files."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import BY_NAME, make
from sharded import free_port

from hf_grow.training.distributed.launch import close_process_group
from hf_grow.training.sharding import plain_files, shard_files
from hf_grow.training.sharding.sharded_model import held_tensors

LARGE = 24 << 20
"""Values of the tensors that `measure` writes, in fp32."""


def drawn(case: str) -> Any:
    model = make(BY_NAME[case], num_hidden_layers=2)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=draw))
    return model


def spawn(what: Any, processes: int, *args: Any) -> None:
    torch.multiprocessing.spawn(_run, (processes, free_port(), what, args), nprocs=processes)


def _run(rank: int, processes: int, port: int, what: Any, args: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(processes))
    dist.init_process_group("gloo", rank=rank, world_size=processes)
    try:
        what(rank, processes, *args)
    finally:
        close_process_group()


def write(rank: int, processes: int, out: str, cases: tuple[str, ...], half: bool) -> None:
    """Every case under FSDP2, and (`column-CASE`) cut along the last dimension of its matrices."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (processes,))
    for case in cases:
        for kind in ("", "column-"):
            model = drawn(case)
            if kind:
                for module in model.modules():
                    for name, p in list(module.named_parameters(recurse=False)):
                        placement = Shard(p.dim() - 1) if p.dim() > 1 else Replicate()
                        setattr(module, name, torch.nn.Parameter(distribute_tensor(p.detach(), mesh, [placement])))
                model.tie_weights()
            else:
                for layer in model.model.layers:
                    fully_shard(layer, mesh=mesh)
                fully_shard(model, mesh=mesh)
            folder = Path(out) / f"{kind}{case}"
            dtypes = {n: torch.bfloat16 for n in held_tensors(model) if "norm" not in n} if half else {}
            shard_files.write_shards(folder / "checkpoint" / "weights", held_tensors(model))
            plain_files.write_plain(model, folder / "plain", dtypes, max_shard_size=20_000)
            if rank == 0:
                for part in ("checkpoint", "plain"):
                    model.config.save_pretrained(folder / part)
            dist.barrier()


def fail(rank: int, processes: int, out: str) -> None:
    """The second process cannot write; both must say so, and leave nothing that looks whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from hf_grow.errors import ExecutionError

    model = drawn("llama")
    fully_shard(model, mesh=init_device_mesh("cpu", (processes,)))
    if rank == 1:
        os.pwrite = _full
    with pytest.raises(ExecutionError, match="No space left"):
        plain_files.write_plain(model, Path(out), {})
    (Path(out) / f"said-{rank}").touch()


def _full(*args: Any) -> int:
    raise OSError(28, "No space left on device")


def measure(rank: int, processes: int, out: str) -> None:
    """Peak memory beyond the shards, of writing and of reading them again."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    from hf_grow.training.sharding.local_rows import fill_tensors, whole_parameters

    shard_files.FILE_BYTES = 8 << 20
    mesh = init_device_mesh("cpu", (processes,))
    rows = LARGE // 24 // 1024
    tensors: dict[str, Any] = {
        f"t{i}": DTensor.from_local(torch.full((rows // processes, 1024), float(i + rank)), mesh, [Shard(0)]) for i in range(24)
    }
    warm = {"t0": DTensor.from_local(torch.ones(1, 8), mesh, [Shard(0)])}
    shard_files.write_shards(Path(out) / "warm", warm)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    shard_files.write_shards(Path(out) / "shards", tensors)
    for t in tensors.values():
        t.to_local().zero_()
    fill_tensors(tensors, whole_parameters({n: t.shape for n, t in tensors.items()}), shard_files.ShardRows(Path(out) / "shards"))
    assert all(bool((t.to_local() == i + rank).all()) for i, t in enumerate(tensors.values()))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    (Path(out) / f"grown-{rank}").write_text(str(grown * 1024))
