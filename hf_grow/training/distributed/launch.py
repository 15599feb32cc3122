"""How many processes train one model, and how they share it: told by `accelerate launch` (or torchrun), or read from one of accelerate's files.

    ddp      every process holds everything
    fsdp2    parameters, gradients, optimizer, Fisher and anchor are cut into as many pieces as there are processes (DTensor)
    zero1, zero2, zero3    DeepSpeed: the optimizer, also the gradients, also the parameters are cut

DeepSpeed keeps gradients and the optimizer's step to itself, so whatever hf-grow does between a backward pass and a step is refused there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_grow.common.safe_files import read_json
from hf_grow.errors import InputError
from hf_grow.options import load_yaml

if TYPE_CHECKING:
    pass

CUT = {
    "one": (), "ddp": (), "zero1": ("optimizer",), "zero2": ("optimizer", "gradients"),
    "zero3": ("optimizer", "gradients", "weights"), "fsdp2": ("optimizer", "gradients", "weights", "penalty", "rows"),
}  # fmt: skip
"""What each way of sharing cuts into pieces, by the names of `estimate.Memory`."""


@dataclass(frozen=True)
class Launch:
    """Processes of all machines together, and how they share the model."""

    processes: int = 1
    sharing: str = "one"
    """A key of CUT, or fsdp1, which is refused."""
    saves_whole: bool = True
    """FSDP: whether a model is saved as plain safetensors (FULL_STATE_DICT)."""
    loads_once: bool = False
    """FSDP: whether only one process of a machine loads the weights."""

    def pieces(self, what: str) -> int:
        """Into how many pieces weights, gradients, optimizer, penalty or rows are cut."""
        return self.processes if what in CUT[self.sharing] else 1

    @property
    def deepspeed(self) -> bool:
        return self.sharing.startswith("zero")

    def __str__(self) -> str:
        names = {"one": "one process", "ddp": "DDP", "fsdp2": "FSDP2", "fsdp1": "FSDP1"}
        how = names.get(self.sharing, f"DeepSpeed ZeRO-{self.sharing[-1]}")
        return how if self.processes == 1 and self.sharing == "one" else f"{how}, {self.processes} processes"


def launched(environment: Mapping[str, str] | None = None) -> Launch:
    """What the launcher of this process told it by its environment."""
    env = os.environ if environment is None else environment
    processes = int(env.get("WORLD_SIZE") or 1)
    if _true(env, "ACCELERATE_USE_DEEPSPEED"):
        file = env.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
        stage = _stage(Path(file)) if file.lower() not in ("", "none") else env.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        return Launch(processes, f"zero{stage}" if str(stage) != "0" else "ddp")
    if _true(env, "ACCELERATE_USE_FSDP"):
        whole = env.get("FSDP_STATE_DICT_TYPE") == "FULL_STATE_DICT"
        return Launch(processes, f"fsdp{env.get('FSDP_VERSION', '1')}", whole, _true(env, "FSDP_CPU_RAM_EFFICIENT_LOADING"))
    return Launch(processes, "ddp" if processes > 1 else "one")


def from_file(path: Path, processes: int | None = None) -> Launch:
    """What `accelerate launch --config_file PATH` would tell, with `--num_processes` if given. Raises InputError for any other file."""
    data = load_yaml(path)
    kind, count = str(data.get("distributed_type")), processes or data.get("num_processes")
    known = {"NO": "one", "MULTI_GPU": "ddp", "FSDP": "fsdp", "DEEPSPEED": "zero"}
    if kind not in known:
        raise InputError(
            f"{path}: distributed_type is {data.get('distributed_type')!r}; known are {', '.join(known)}.",
            hint="Give a file of recipes/accelerate, or one that `accelerate config` made.",
        )
    if kind == "NO":
        return Launch()
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise InputError(f"{path}: num_processes is {count!r}.", hint="Give it there, or by --processes.")
    sharing, whole, once = known[kind], True, False
    if sharing == "fsdp":
        section = _section(path, data, "fsdp_config")
        sharing += str(section.get("fsdp_version", 1))
        whole = section.get("fsdp_state_dict_type") == "FULL_STATE_DICT"
        once = bool(section.get("fsdp_cpu_ram_efficient_loading", True))
    elif sharing == "zero":
        section = _section(path, data, "deepspeed_config")
        file = section.get("deepspeed_config_file")
        if not isinstance(file, str | None):
            raise InputError(f"{path}: deepspeed_config.deepspeed_config_file is {file!r}, and the name of a file belongs there.")
        stage = _stage(Path(file)) if file else section.get("zero_stage", 2)
        sharing = f"zero{stage}" if str(stage) != "0" else "ddp"
    if sharing not in CUT and sharing != "fsdp1":
        raise InputError(f"{path}: there is no {sharing}.", hint="FSDP has versions 1 and 2, ZeRO stages 0 to 3.")
    return Launch(count, sharing, whole, once)


def _section(path: Path, data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A part of accelerate's file, empty where it is left out. Raises InputError for what holds no keys."""
    section = data.get(key)
    if not isinstance(section, dict | None):
        raise InputError(
            f"{path}: {key} is {section!r}, and `key: value` lines belong there.",
            hint="Give a file of recipes/accelerate, or one that `accelerate config` made.",
        )
    return section or {}


def _true(env: Mapping[str, str], name: str) -> bool:
    return env.get(name, "").lower() in ("true", "1", "yes")


def _stage(file: Path) -> Any:
    """ZeRO's stage in a file of DeepSpeed's own. Raises InputError if it cannot be read."""
    try:
        return read_json(file, error=InputError).get("zero_optimization", {}).get("stage", 0)
    except (InputError, AttributeError) as error:
        raise InputError(f"DeepSpeed's file {file} cannot be read: {error}") from None
