"""Checks of options against the distributed launch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_grow.checkpoint.reader import Checkpoint
from hf_grow.training.distributed.launch import PARALLELISM, Launch, current_launch
from hf_grow.training.sharding.shard_files import can_write_shards

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from hf_grow.training.config.train_options import TrainOptions

_REFUSED = {
    "tp": "shards weights within rows and columns, for which rows to load, masks, regularizers and checkpoints are not made. Use FSDP2.",
    "sp": "needs DeepSpeed, whose attention across processes is not supported here. Use cp_size, or FSDP2.",
    "dp_replicate": "would count regularizers and their state once per replica. Use dp_shard_size for all processes.",
}
"""Dimensions of ParallelismConfig that are not supported, and why."""


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
    if launch.sharing == "fsdp2" and not can_write_shards():
        errors.append(
            "launch: this version of torch cannot write checkpoints in shards as safetensors, which FSDP2 needs here. Update torch."
        )
    if launch.sharing == "fsdp2" and launch.cpu_ram_efficient_loading:
        errors.append(
            "launch: every process reads the rows that it holds. With fsdp_cpu_ram_efficient_loading, what transformers loads would have no "
            "weights on all processes but the first. Set it to false."
        )
    if launch.sharing in ("fsdp2", "zero3") and options.regularizer.collapsed:
        errors.append(
            f"regularizer.collapsed: needs whole matrices, and {launch} shards them. Map the Fisher instead (hf-grow fisher --from-growth)."
        )
    if launch.sharing == "fsdp2" and options.lora is not None:
        errors.append("lora: adapters are not saved completely under FSDP2. Use DDP: they need little memory.")
    optim = str(getattr(arguments.optim, "value", arguments.optim))
    if launch.sharing == "fsdp2" and keeps_unsharded_state(optim):
        errors.append(
            f"optim: the state of {optim} is not sharded as the parameters are, so FSDP2 cannot save it. Use adamw_torch, or DDP."
        )
    if options.distill is not None and options.distill.shard and launch.sharing not in ("ddp", "fsdp2"):
        errors.append(f"distill.shard: needs several processes (DDP or FSDP2), and this is {launch}. Remove it.")
    if launch.deepspeed:
        errors += [
            f"{key}: does not work under {launch}, which gives no access to gradients and to the optimizer step. Use FSDP2 or DDP."
            for key in _keys_inside_a_step(options)
        ]
        if options.chunked_loss:
            errors.append(f"chunked_loss: does not work under {launch}, which holds the head in pieces. Remove it.")
        if resume:
            errors.append("--resume: DeepSpeed's checkpoints are pickles, which hf-grow does not load. Use FSDP2 or DDP.")
    return errors


def parallelism_mistakes(
    launch: Launch,
    options: TrainOptions,
    arguments: TrainingArguments,
    checkpoint: Checkpoint,
    *,
    seq_length: int,
    intra_document_masking: bool,
    streaming: bool,
) -> list[str]:
    """One line per option that does not work with the dimensions of accelerate's ParallelismConfig."""
    sizes, cp = launch.parallelism, launch.context_parallel
    errors = [f"launch: {what} ({name}_size {sizes[name]}) {_REFUSED[name]}" for name, what in PARALLELISM.items()
              if name in _REFUSED and sizes.get(name, 1) > 1]  # fmt: skip
    if arguments.parallelism_config is not None:
        errors.append("parallelism_config: is read from the file of accelerate launch (recipes/accelerate). Remove it here.")
    if sizes and not errors and (shards := sizes.get("dp_shard", 1)) * cp != launch.processes:
        errors.append(f"launch: dp_shard_size {shards} x cp_size {cp} is not the number of processes, {launch.processes}.")
    if cp == 1:
        return errors
    in_use = {
        "distill": options.distill is not None,
        "moe.aux_loss": options.moe.aux_loss and checkpoint.info.architecture.is_moe,
        "data.intra_document_masking": intra_document_masking,
        "attn_implementation": options.attn_implementation not in (None, "sdpa"),
        "use_liger_kernel": bool(arguments.use_liger_kernel),
    }
    reasons = {
        "distill": "compares positions that lie in different processes",
        "moe.aux_loss": "would be that of a part of each sequence",
        "data.intra_document_masking": "needs a mask, and attention across processes has none but the causal one",
        "attn_implementation": "must be sdpa",
        "use_liger_kernel": "shifts labels within the part of a process",
    }
    errors += [f"{key}: does not work with context parallelism: it {reasons[key]}." for key, used in in_use.items() if used]
    arch = checkpoint.info.architecture
    if any(arch.window(layer) is not None for layer in range(arch.layers)):
        errors.append("launch: context parallelism does not support sliding-window attention, which this model has.")
    if seq_length % (2 * cp):
        errors.append(
            f"data.seq_length: {seq_length} is not a multiple of {2 * cp}, twice the cp_size, which balances the parts of a sequence."
        )
    if arguments.accelerator_config.dispatch_batches or (streaming and arguments.accelerator_config.dispatch_batches is None):
        errors.append(
            "accelerator_config: one process would read for all, and give those that share a sequence different ones. "
            "Set accelerator_config: {dispatch_batches: false}."
        )
    return errors


def keeps_unsharded_state(optim: str) -> bool:
    """Whether the state of an optimizer, by transformers' name, has other shapes than the parameters: means of rows and columns, blocks of codes."""
    return any(kind in optim for kind in ("adafactor", "8bit", "4bit"))


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
