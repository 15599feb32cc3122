"""Run by torchrun or mp.spawn: two processes train a tiny model under a penalty, sharded (FSDP2) or replicated (DDP).

The first process writes the gradients of the last step, the weights, the penalty's value and its state, whole, for the test to compare.
"""

from __future__ import annotations

import json
import os
import random
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from models import BY_NAME, make
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode
from transformers import AutoModelForCausalLM

from hf_grow.growth.plan import GrowthPlan
from hf_grow.training.config.regularizer_options import PenaltyOptions
from hf_grow.training.distributed.launch import close_process_group
from hf_grow.training.param_updates import updates
from hf_grow.training.param_updates.param_provenance import new_masks
from hf_grow.training.param_updates.parameter_map import parameters
from hf_grow.training.param_updates.shards import shard_like
from hf_grow.training.param_updates.updates import LrFactors, ParamUpdates
from hf_grow.training.regularizers.build import make_penalty
from hf_grow.training.regularizers.importance_file import model_fingerprint

STEPS, LR = 4, 0.05


def batch(step: int) -> Tensor:
    return torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(step))


def full(tensor: Any) -> Tensor:
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().clone()


def train(model: Any, bare: Any, options: PenaltyOptions, rank: int, world: int, out: Path, resume: bool) -> None:
    """`model` is wrapped already; `bare` is it, or what was wrapped."""
    penalty = make_penalty(options, bare) if not hasattr(bare, "made") else bare.made
    assert penalty is not None
    penalty.attach(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for step in range(STEPS):
        if resume and step == 2:
            penalty.load_whole_state(penalty.whole_state())
        optimizer.zero_grad()
        ids = batch(step).chunk(world)[rank]
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        penalty.add_gradient()
        grads = {n: full(p.grad) for n, p in parameters(model).items()}
        penalty.before_step()
        optimizer.step()
        penalty.after_step(LR)
    state = penalty.whole_state()
    result = {"grads": grads, "weights": {n: full(p) for n, p in parameters(model).items()}, "value": penalty.value(), "state": state}
    if rank == 0:
        torch.save(result, out)


@contextmanager
def process_group(rank: int, world: int, port: int) -> Iterator[None]:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        yield
    finally:
        close_process_group()


def worker(rank: int, world: int, port: int, how: str, options: dict[str, Any], out: str) -> None:
    with process_group(rank, world, port):
        train_wrapped(rank, world, how, options, Path(out))


@contextmanager
def counted(calls: dict[str, dict[str, int]], label: str) -> Iterator[None]:
    """Notes the collectives of what runs meanwhile."""
    with CommDebugMode() as mode:
        yield
    calls[label] = {str(op).partition(".")[2]: count for op, count in mode.get_comm_counts().items()}


def exact_run(model: Any, options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Steps with given gradients, so that nothing but the penalty, masks and a warm-up act; all results, whole. ``model`` may be sharded."""
    plan = GrowthPlan.from_json(json.loads((folder / "growth.json").read_text()))
    calls: dict[str, dict[str, int]] = {}
    with counted(calls, "make"):
        penalty = make_penalty(PenaltyOptions.model_validate(dict(options)), model, plan)
    assert penalty is not None
    with counted(calls, "attach"):
        penalty.attach(model)
    new = new_masks(model, plan)
    made = ParamUpdates({n: True if "down_proj" in n else m for n, m in new.items()} | {"model.norm.weight": True}, new, [new])
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, eps=1e-3)
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        for p in model.parameters():
            p.grad = shard_like(torch.randn(p.shape, generator=generator, dtype=p.dtype), p)
        with counted(calls, "step"):
            penalty.add_gradient()
            made.mask_gradients(model, 0 if step == 0 else None)
        grads = {n: full(p.grad) for n, p in parameters(model).items() if p.grad is not None}
        with counted(calls, "step"):
            penalty.before_step()
            made.before_step(model, optimizer, 0 if step == 0 else None, LrFactors(new=0.3), at_once=penalty.moves_weights)
            optimizer.step()
            penalty.after_step(made.step_lr, lambda: made.after_step(optimizer))
        if step == 1:  # as a resumed run does
            penalty.load_state_dict(json.loads(json.dumps(penalty.state_dict())))
            penalty.load_tensors({k: t.clone() for k, t in penalty.tensors().items()})
    with counted(calls, "state"):
        state, tensors = penalty.state_dict(), penalty.tensors()
    with counted(calls, "value"):
        value = penalty.value()
    penalty.finish(folder, model)
    return {
        "value": value, "calls": calls, "grads": grads, "state": state, "fingerprint": model_fingerprint(model),
        "weights": {n: full(p) for n, p in parameters(model).items()}, "tensors": {k: full(t) for k, t in tensors.items()},
    }  # fmt: skip


def exact_worker(rank: int, world: int, port: int, kinds: Mapping[str, Mapping[str, Any]], folder: str) -> None:
    """`exact_run` of every kind, sharded by FSDP2."""
    with process_group(rank, world, port):
        for kind, options in kinds.items():
            updates.COPY_BYTES = 1 if kind == "si" else updates.COPY_BYTES  # as many batches as parameters
            model = AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=torch.float64)
            shard(model, world)
            result = exact_run(model, options, Path(folder) / "model")
            if rank == 0:
                torch.save(result, Path(folder) / f"{kind}.pt")


def shard(model: Any, world: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def train_wrapped(rank: int, world: int, how: str, options: dict[str, Any], out: Path) -> None:
    model: Any = make(BY_NAME["llama"], num_hidden_layers=2)
    chosen = PenaltyOptions.model_validate(options)
    if how == "ddp":
        model.made = make_penalty(chosen, model)
        train(torch.nn.parallel.DistributedDataParallel(model), model, chosen, rank, world, out, True)
        return
    if how == "fsdp, made before":
        model.made = make_penalty(chosen, model)
    shard(model, world)
    train(model, model, chosen, rank, world, out, True)


def free_port() -> int:
    """A free port, drawn below those that the system gives to others, and for each of several test processes from a range of its own."""
    first = 14000 + 1000 * (int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 16)
    for port in random.SystemRandom().sample(range(first, first + 1000), 1000):
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no port is free")
