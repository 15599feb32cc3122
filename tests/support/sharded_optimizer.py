"""Two processes under FSDP2 train a tiny model with AdamW in fp64, and write its state in every form that torch and accelerate have."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from adam_states import adamw, train
from models import BY_NAME, make
from sharded import free_port
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict

from hf_grow.training.distributed.launch import close_process_group


def write(folder: Path, case: str) -> None:
    """optimizer_0 and pytorch_model_fsdp_0 (.distcp), moments (safetensors, every process's shards), optimizer.bin and weights.pt (whole)."""
    torch.multiprocessing.spawn(_worker, (free_port(), str(folder), case), nprocs=2)


def _worker(rank: int, port: int, folder: str, case: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        _write(rank, Path(folder), case)
    finally:
        close_process_group()  # once model and mesh are gone


def _write(rank: int, out: Path, case: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model: Any = make(BY_NAME[case], num_hidden_layers=2)
    if "moe" not in case and case != "mixtral":  # torch's grouped multiplication knows no fp64
        model = model.double()
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = adamw(model)
    train(model, optimizer, 2)
    local = get_optimizer_state_dict(model, optimizer)
    dcp.save({"optimizer": local}, storage_writer=dcp.FileSystemWriter(out / "optimizer_0"))
    dcp.save({"model": get_model_state_dict(model)}, storage_writer=dcp.FileSystemWriter(out / "pytorch_model_fsdp_0"))
    moments = {f"{n}.{k}": s[k] for n, s in local["state"].items() for k in ("exp_avg", "exp_avg_sq")}
    dcp.save(moments, storage_writer=HuggingFaceStorageWriter(str(out / "moments"), save_distributed=True))
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    optimizer_state, weights = get_optimizer_state_dict(model, optimizer, options=whole), get_model_state_dict(model, options=whole)
    if rank == 0:
        torch.save(optimizer_state, out / "optimizer.bin")
        torch.save(weights, out / "weights.pt")
