"""Checks of options against the distributed launch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_grow.training.distributed.launch import Launch, current_launch

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from hf_grow.training.config.train_options import TrainOptions


def launch_mistakes(launch: Launch, options: TrainOptions, arguments: TrainingArguments, *, resume: bool) -> list[str]:
    """One line per option that does not work with these processes."""
    errors = []
    if (started := current_launch().processes) > 1 and arguments.world_size == 1:
        errors.append(
            f"launch: {started} processes were started, but this machine has no GPU: each would train on its own. Add use_cpu: true."
        )
    if launch == current_launch() and launch.processes == 1 and arguments.n_gpu > 1:
        count = arguments.n_gpu
        errors.append(
            f"launch: {count} GPUs and one process: Trainer would copy the model to all of them (DataParallel) and change the "
            f"batch size. Use all with `accelerate launch --multi_gpu --num_processes {count} -m hf_grow train RECIPE`, or one with CUDA_VISIBLE_DEVICES=0."
        )
    if launch.sharing == "fsdp1":
        errors.append("launch: FSDP1 flattens the parameters, so single parameters cannot be frozen or scaled. Set fsdp_version: 2.")
    if launch.sharing == "fsdp2" and not launch.full_state_dict:
        errors.append(
            "launch: the model would be saved in shards that from_pretrained cannot read. Set fsdp_state_dict_type: FULL_STATE_DICT."
        )
    if launch.sharing == "fsdp2" and launch.cpu_ram_efficient_loading:
        errors.append("launch: every process needs the initial weights. Set fsdp_cpu_ram_efficient_loading: false.")
    if launch.sharing in ("fsdp2", "zero3") and options.regularizer.collapsed:
        errors.append(
            f"regularizer.collapsed: needs whole matrices, and {launch} shards them. Map the Fisher instead (hf-grow fisher --from-growth)."
        )
    if launch.sharing == "fsdp2" and options.lora is not None:
        errors.append("lora: adapters are not saved completely under FSDP2. Use DDP: they need little memory.")
    if options.distill is not None and options.distill.shard and launch.sharing not in ("ddp", "fsdp2"):
        errors.append(f"distill.shard: needs several processes (DDP or FSDP2), and this is {launch}. Remove it.")
    if launch.deepspeed:
        errors += [
            f"{key}: does not work under {launch}, which gives no access to gradients and to the optimizer step. Use FSDP2 or DDP."
            for key in _keys_inside_a_step(options)
        ]
        if resume:
            errors.append("--resume: DeepSpeed's checkpoints are pickles, which hf-grow does not load. Use FSDP2 or DDP.")
    return errors


def _keys_inside_a_step(options: TrainOptions) -> list[str]:
    """The keys in use that act on gradients, on single rows, or around the optimizer step."""
    in_use = {
        "regularizer": options.regularizer.kind != "none",
        "warmup.lr": options.warmup.lr != 1.0,
        "warmup.steps": options.warmup.steps > 0,
        "warmup.zero_init": options.warmup.zero_init,
        "phases": bool(options.phases),
        "after_growth.settle_steps": options.after_growth.settle_steps > 0,
        "monitor.on_instability": options.monitor.on_instability != "none",
        "lora": options.lora is not None,
    }
    return [key for key, used in in_use.items() if used]
