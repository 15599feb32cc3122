"""Checks of options against the processes that train."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_grow.training.distributed.launch import Launch, current_launch

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from hf_grow.training.config.train_options import TrainOptions


def launch_mistakes(launch: Launch, options: TrainOptions, arguments: TrainingArguments, *, resume: bool) -> list[str]:
    """What the options ask for that these processes cannot do, one line each."""
    found = []
    if (started := current_launch().processes) > 1 and arguments.world_size == 1:
        found.append(
            f"launch: {started} processes were started, but this machine has no GPU: each would train by itself. Add use_cpu: true."
        )
    if launch == current_launch() and launch.processes == 1 and arguments.n_gpu > 1:
        count = arguments.n_gpu
        found.append(
            f"launch: {count} GPUs and one process: Trainer would copy the model to all of them (DataParallel) and train on other batches than the "
            f"recipe says. Use all by `accelerate launch --multi_gpu --num_processes {count} -m hf_grow train RECIPE`, or one by CUDA_VISIBLE_DEVICES=0."
        )
    if launch.sharing == "fsdp1":
        found.append("launch: FSDP1 makes flat vectors of all parameters, in which nothing can be told apart. Set fsdp_version: 2.")
    if launch.sharing == "fsdp2" and not launch.full_state_dict:
        found.append(
            "launch: the model would be saved in pieces that from_pretrained cannot read. Set fsdp_state_dict_type: FULL_STATE_DICT."
        )
    if launch.sharing == "fsdp2" and launch.cpu_ram_efficient_loading:
        found.append("launch: every process needs the weights that training starts from. Set fsdp_cpu_ram_efficient_loading: false.")
    if launch.sharing in ("fsdp2", "zero3") and options.regularizer.collapsed:
        found.append(
            f"regularizer.collapsed: needs whole matrices; {launch} cuts them. Map the Fisher instead (hf-grow fisher --from-growth)."
        )
    if launch.sharing == "fsdp2" and options.lora is not None:
        found.append("lora: adapters are not saved whole under FSDP2. They need little memory: use DDP.")
    if launch.deepspeed:
        found += [
            f"{key}: does not work under {launch}, which keeps gradients and steps to itself. Use FSDP2 or DDP."
            for key in _keys_inside_a_step(options)
        ]
        if resume:
            found.append("--resume: DeepSpeed's checkpoints are pickles, which hf-grow does not load. Use FSDP2 or DDP.")
    return found


def _keys_inside_a_step(options: TrainOptions) -> list[str]:
    """Keys that act on gradients, on single rows, or around the optimizer's step."""
    acts = {
        "regularizer": options.regularizer.kind != "none",
        "warmup.lr": options.warmup.lr != 1.0,
        "warmup.steps": options.warmup.steps > 0,
        "warmup.zero_init": options.warmup.zero_init,
        "phases": bool(options.phases),
        "after_growth.settle_steps": options.after_growth.settle_steps > 0,
        "monitor.on_instability": options.monitor.on_instability != "none",
        "lora": options.lora is not None,
    }
    return [key for key, asked in acts.items() if asked]
