"""How many processes train one model, and how they share it: from the environment of `accelerate launch` or torchrun, or from an accelerate config file.

    ddp                     every process holds everything
    fsdp2                   parameters, gradients, optimizer state, Fisher and anchor are sharded (DTensor); with context parallelism (accelerate's
                            ParallelismConfig) several processes share each sequence, and the shards are those of all processes
    zero1, zero2, zero3     DeepSpeed shards the optimizer state; also gradients; also parameters

DeepSpeed gives no access to gradients and the optimizer step, so settings that act between a backward pass and a step raise an error under it.

The environment is read directly: accelerate's PartialState starts a process group, and AcceleratorState knows FSDP and DeepSpeed settings only after an
Accelerator was created, but a recipe is checked before that.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_grow.common.safe_files import read_json
from hf_grow.errors import InputError
from hf_grow.options import load_yaml

if TYPE_CHECKING:
    from transformers import TrainingArguments

SHARDED = {
    "one": (), "ddp": (), "zero1": ("optimizer",), "zero2": ("optimizer", "gradients"),
    "zero3": ("optimizer", "gradients", "weights"), "fsdp2": ("optimizer", "gradients", "weights", "penalty", "rows"),
}  # fmt: skip
"""What each way of sharing shards, by field of `MemoryEstimate`."""
PARALLELISM = {
    "dp_replicate": "replicas of sharded models (HSDP)", "dp_shard": "sharding", "cp": "context parallelism", "tp": "tensor parallelism",
    "sp": "sequence parallelism",
}  # fmt: skip
"""Dimensions of accelerate's ParallelismConfig."""
_CONFIG_HINT = "Use a file from recipes/accelerate, or one that `accelerate config` wrote."


@dataclass(frozen=True)
class Launch:
    """The processes of all machines together, and how they share the model."""

    processes: int = 1
    sharing: str = "one"
    """A key of SHARDED, or fsdp1, which is refused."""
    cpu_ram_efficient_loading: bool = False
    """FSDP: whether only one process per machine loads the weights."""
    parallelism: Mapping[str, int] = field(default_factory=dict)
    """Sizes of accelerate's ParallelismConfig by its names (tp, cp, sp, dp_shard, dp_replicate); empty where it is not used."""

    @property
    def context_parallel(self) -> int:
        """Number of processes that share each sequence."""
        return self.parallelism.get("cp", 1)

    @property
    def data_processes(self) -> int:
        """Number of processes, or of groups of them, that get sequences of their own."""
        return self.processes // self.context_parallel

    def shards(self, purpose: str) -> int:
        """Number of shards of the weights, gradients, optimizer, penalty or rows."""
        return self.processes if purpose in SHARDED[self.sharing] else 1

    @property
    def deepspeed(self) -> bool:
        return self.sharing.startswith("zero")

    def __str__(self) -> str:
        names = {"one": "one process", "ddp": "DDP", "fsdp2": "FSDP2", "fsdp1": "FSDP1"}
        name = names.get(self.sharing, f"DeepSpeed ZeRO-{self.sharing[-1]}")
        if self.context_parallel > 1:
            name += f" with context parallelism of {self.context_parallel}"
        return name if self.processes == 1 and self.sharing == "one" else f"{name}, {self.processes} processes"


def is_main_process() -> bool:
    """Whether this is the first of all processes, before any process group exists."""
    return int(os.environ.get("RANK") or 0) == 0


def current_launch(environment: Mapping[str, str] | None = None) -> Launch:
    """The launch that this process belongs to, from its environment (``environment``: another one)."""
    env = os.environ if environment is None else environment
    processes = int(env.get("WORLD_SIZE") or 1)
    if _flag(env, "ACCELERATE_USE_DEEPSPEED"):
        file = env.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
        stage = _zero_stage(Path(file)) if file.lower() not in ("", "none") else env.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        return Launch(processes, f"zero{stage}" if str(stage) != "0" else "ddp")
    if _flag(env, "ACCELERATE_USE_FSDP"):
        sizes = {}
        if _flag(env, "ACCELERATE_USE_PARALLELISM_CONFIG"):
            sizes = _parallelism(
                {name: env.get(f"PARALLELISM_CONFIG_{name.upper()}_SIZE", 1) for name in PARALLELISM}, "PARALLELISM_CONFIG"
            )
        return Launch(processes, f"fsdp{env.get('FSDP_VERSION', '1')}", _flag(env, "FSDP_CPU_RAM_EFFICIENT_LOADING"), parallelism=sizes)
    return Launch(processes, "ddp" if processes > 1 else "one")


def close_process_group(failed: bool = False) -> None:
    """Destroys the process group at the end of a process, so that no thread of it outlives the interpreter. No caller may still hold the trainer.

    ``destroy_process_group`` drops torch's own references to a gloo group, and only the group's destructor, which runs with the last reference,
    joins its threads. A thread that is left holds the tensors of its last collective until it gets the GIL, and before Python 3.14 one that asks
    for the GIL while the interpreter shuts down is unwound in that destructor: "terminate called without an active exception", exit status 134.

    ``failed``: the other processes may still be at work. A group that may use an accelerator is then left alone: NCCL's shutdown can wait for
    all processes.
    """
    from torch import accelerator, distributed
    from torch.distributed.device_mesh import DeviceMesh

    if failed and accelerator.is_available() and distributed.get_backend() != "gloo":
        return
    gc.collect()  # DDP and FSDP hold the group, and are in reference cycles with the trainer
    for mesh in [found for found in gc.get_objects() if type(found) is DeviceMesh]:
        # DTensor's caches keep every mesh, and a mesh keeps its groups (torch 2.13); nothing public clears either.
        getattr(mesh, "_pg_registry", {}).clear()
    distributed.destroy_process_group()


def data_processes(arguments: TrainingArguments) -> int:
    """Number of processes of this launch, or of groups of them, that get sequences of their own."""
    return int(arguments.world_size) // current_launch().context_parallel


def launch_from_file(path: Path, processes: int | None = None) -> Launch:
    """What `accelerate launch --config_file PATH` would start, with ``processes`` as --num_processes. Raises InputError for any other file."""
    data = load_yaml(path)
    kind, count = str(data.get("distributed_type")), processes or data.get("num_processes")
    sharing_of = {"NO": "one", "MULTI_GPU": "ddp", "FSDP": "fsdp", "DEEPSPEED": "zero"}
    if kind not in sharing_of:
        raise InputError(
            f"{path}: distributed_type is {data.get('distributed_type')!r}; supported are {', '.join(sharing_of)}.", hint=_CONFIG_HINT
        )
    if kind == "NO":
        return Launch()
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise InputError(f"{path}: num_processes is {count!r}.", hint="Set it in the file, or with --processes.")
    sharing, efficient = sharing_of[kind], False
    if sharing == "fsdp":
        section = _section(path, data, "fsdp_config")
        sharing += str(section.get("fsdp_version", 1))
        efficient = bool(section.get("fsdp_cpu_ram_efficient_loading", True))
    elif sharing == "zero":
        section = _section(path, data, "deepspeed_config")
        file = section.get("deepspeed_config_file")
        if not isinstance(file, str | None):
            raise InputError(f"{path}: deepspeed_config.deepspeed_config_file is {file!r}, not a file name.")
        stage = _zero_stage(Path(file)) if file else section.get("zero_stage", 2)
        sharing = f"zero{stage}" if str(stage) != "0" else "ddp"
    if sharing not in SHARDED and sharing != "fsdp1":
        raise InputError(f"{path}: {sharing} does not exist.", hint="FSDP has versions 1 and 2, ZeRO stages 0 to 3.")
    given = _section(path, data, "parallelism_config")
    sizes = _parallelism({n: given.get(f"parallelism_config_{n}_size", 1) for n in PARALLELISM}, str(path)) if given else {}
    return Launch(count, sharing, efficient, parallelism=sizes)


def _parallelism(given: Mapping[str, Any], where: str) -> dict[str, int]:
    """Sizes of the dimensions. Raises InputError for what is no size."""
    sizes = {}
    for name, value in given.items():
        if isinstance(value, bool) or not str(value).isdecimal() or int(value) < 1:
            raise InputError(
                f"{where}: the {name} size is {value!r}.", hint="Give the number of processes of that dimension; 1 leaves it out."
            )
        sizes[name] = int(value)
    return sizes


def _section(path: Path, data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A mapping inside an accelerate config file, empty if missing. Raises InputError for any other value."""
    section = data.get(key)
    if not isinstance(section, dict | None):
        raise InputError(f"{path}: {key} is {section!r}, not a mapping.", hint=_CONFIG_HINT)
    return section or {}


def _flag(env: Mapping[str, str], name: str) -> bool:
    return env.get(name, "").lower() in ("true", "1", "yes")


def _zero_stage(file: Path) -> Any:
    """The ZeRO stage of a DeepSpeed config file. Raises InputError if it cannot be read."""
    try:
        return read_json(file, error=InputError).get("zero_optimization", {}).get("stage", 0)
    except (InputError, AttributeError) as error:
        raise InputError(f"The DeepSpeed config file {file} cannot be read: {error}") from None
