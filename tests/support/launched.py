"""`hf-grow ARGUMENTS` as a launcher starts it, on processors; `start` does what `accelerate launch` does with one of its files.

accelerate shards nothing where it sees no accelerator. With FSDP in the environment it is told here of one whose device is the processor; all
that follows (fully_shard, DTensor parameters, gathering, saving, loading) is its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

FILES = Path(__file__).parents[2] / "recipes" / "accelerate"


def start(
    file: str, words: Sequence[object], folders: Sequence[Path], *, stop: int | None = None, status: int = 0, script: str = __file__
) -> list[dict[str, Any]]:
    """Runs `hf-grow WORDS` in a process for each folder, which it works in; what each of them noted, and said on stderr.

    ``script``: another program in place of this one; it notes what it likes in facts-RANK.json.
    """
    from sharded import free_port

    common = {k: v for k, v in os.environ.items() if k not in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")}
    common |= environment(file, len(folders)) | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    common |= {"WORLD_SIZE": str(len(folders)), "LOCAL_WORLD_SIZE": str(len(folders)), "LAUNCHED_STOP": str(stop or "")}
    processes = []
    for rank, folder in enumerate(folders):
        folder.mkdir(exist_ok=True)
        (folder / f"facts-{rank}.json").unlink(missing_ok=True)
        env = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, script, *map(str, words)]
        processes.append(subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    said = [p.communicate(timeout=600) for p in processes]
    assert [p.returncode for p in processes] == [status] * len(folders), "\n".join(out[-3000:] + err[-6000:] for out, err in said)
    notes = [folder / f"facts-{rank}.json" for rank, folder in enumerate(folders)]
    found = [json.loads(n.read_text()) if n.exists() else {} for n in notes]
    for n in notes:
        n.unlink(missing_ok=True)
    return [{**facts, "out": out, "err": err} for facts, (out, err) in zip(found, said, strict=True)]


def environment(file: str, processes: int) -> dict[str, str]:
    """What `accelerate launch --config_file` puts into the environment."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
    from sharded import free_port

    words = ["--config_file", str(FILES / f"{file}.yaml"), "--num_processes", str(processes), "--main_process_port", str(free_port())]
    arguments, defaults, _ = _validate_launch_command(launch_command_parser().parse_args([*words, "script.py"]))
    arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    found = prepare_deepspeed_cmd_env(arguments)[1] if arguments.use_deepspeed else prepare_multi_gpu_env(arguments)
    return {k: v for k, v in found.items() if os.environ.get(k) != v}


def pretend_accelerator() -> None:
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    from transformers import training_args

    training_args.is_torch_bf16_gpu_available = lambda: True
    PartialState._prepare_backend = lambda self, cpu, sagemaker, backend=None: ("gloo", DistributedType.MULTI_GPU)


class Gather(torch.autograd.Function):
    """The parts of all processes of a mesh, one after another."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, dim: int, mesh: Any) -> torch.Tensor:
        ctx.dim, ctx.mesh = dim, mesh
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(mesh.size())]
        torch.distributed.all_gather(parts, part.contiguous(), group=mesh.get_group())
        return torch.cat(parts, dim=dim)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        total = gradient.contiguous().clone()
        torch.distributed.all_reduce(total, group=ctx.mesh.get_group())
        return total.chunk(ctx.mesh.size(), dim=ctx.dim)[ctx.mesh.get_local_rank()], None, None


def pretend_ring_attention() -> None:
    """torch knows attention across processes for kernels of GPUs only. Here keys and values of all processes are gathered; how torch cuts the
    sequences, and all that accelerate and Trainer do, is their own."""
    from torch.distributed.tensor.experimental._context_parallel import _attention, _load_balancer
    from torch.nn import functional

    plain = functional.scaled_dot_product_attention

    def enable(seq_dim: int, mesh: Any) -> None:
        def attention(q: Any, k: Any, v: Any, attn_mask: Any = None, is_causal: bool = False, **options: Any) -> Any:
            assert attn_mask is None and is_causal
            k, v = Gather.apply(k, seq_dim, mesh), Gather.apply(v, seq_dim, mesh)
            length = k.shape[seq_dim]
            balancer = _load_balancer._create_default_load_balancer(length, mesh.size(), "cpu")
            positions = torch.arange(length) if balancer is None else balancer._generate_indices().flatten()
            own = positions.chunk(mesh.size())[mesh.get_local_rank()]
            return plain(q, k, v, attn_mask=own[:, None] >= positions[None], **options)

        functional.scaled_dot_product_attention = attention

    def disable() -> None:
        functional.scaled_dot_product_attention = plain

    _attention._enable_context_parallel_dispatcher_impl = enable
    _attention._disable_context_parallel_dispatcher_impl = disable


def short_of_patience(seconds: float) -> None:
    """Collectives give up after so long. With use_cpu, TrainingArguments leaves ddp_timeout out."""
    make = torch.distributed.init_process_group
    torch.distributed.init_process_group = lambda *args, **more: make(*args, **{**more, "timeout": timedelta(seconds=seconds)})


def note_facts(target: Path) -> None:
    """Writes down, at every step, how this process holds its parameters, and how many texts it packed."""
    from hf_grow.training.data import packing
    from hf_grow.training.trainer.trainer import BaseGrowTrainer

    facts: dict[str, Any] = {"packed": 0}
    watch, write, stop = BaseGrowTrainer.monitor_step, packing._write, os.environ.get("LAUNCHED_STOP")

    def counted(*args: Any) -> Any:
        facts["packed"] += 1
        time.sleep(float(os.environ.get("LAUNCHED_SLOW", 0)))
        return write(*args)

    def noted(self: BaseGrowTrainer) -> None:
        held = [p.to_local() if hasattr(p, "to_local") else p for p in self.model.parameters()]
        facts["kinds"] = sorted({type(p).__name__ for p in self.model.parameters()})
        facts["wrapper"], facts["numbers"] = type(self.model_wrapped).__name__, sum(p.numel() for p in held)
        target.write_text(json.dumps(facts))
        watch(self)
        if stop and self.state.global_step == int(stop):
            os._exit(9)  # no goodbye

    packing._write, BaseGrowTrainer.monitor_step = counted, noted


if __name__ == "__main__":
    torch.set_num_threads(1)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        pretend_accelerator()
    if int(os.environ.get("PARALLELISM_CONFIG_CP_SIZE", 1)) > 1:
        pretend_ring_attention()
    if os.environ.get("LAUNCHED_PATIENCE"):
        short_of_patience(float(os.environ["LAUNCHED_PATIENCE"]))
    note_facts(Path(f"facts-{os.environ['RANK']}.json").absolute())
    from hf_grow.cli import main

    status = main()
    # A thread of gloo that is left may abort the process at exit, rarely enough to pass as a flaky test.
    left = [t.read_text().strip() for t in Path("/proc/self/task").glob("*/comm")]  # empty where there is no /proc
    assert "pt_gloo_runloop" not in left, "the process group outlives the run"
    sys.exit(status)
