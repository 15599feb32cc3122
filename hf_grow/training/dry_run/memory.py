"""Estimated memory of each training process by purpose, from shapes alone.

Weights, gradients, optimizer state, penalty and row copies are counted, and divided where the launch shards them. Activations are estimated as what
PyTorch keeps for the backward pass of a Llama block and of the loss with fused attention (no score matrix); tests/training/trainer/test_train.py
compares them with what is kept. `gathered` is an upper bound of what each library holds unsharded at a time (docs/scale.md).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from hf_grow.model.architecture import Architecture
from hf_grow.model.param_count import block_parameters, count_parameters
from hf_grow.training.distributed.launch import Launch

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from hf_grow.training.config.distill_options import DistillOptions

OPTIMIZER_STATES = {"adamw": 2, "adam": 2, "lion": 1, "rmsprop": 1, "sgd": 0, "adagrad": 1, "adafactor": 0}
"""State tensors of each parameter by the first word of the optimizer's name, in the parameter's dtype (8-bit optimizers: one byte per value)."""

ZERO3_MAX_LIVE_PARAMETERS = 1_000_000_000
"""Default of DeepSpeed's stage3_max_live_parameters."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the device of each process."""

    weights: int
    gradients: int
    optimizer: int
    penalty: int
    rows: int
    """Values saved around an optimizer step: frozen rows, and rows with a learning-rate multiplier."""
    teachers: int
    distillation: int
    """Logits of one teacher for a micro-batch, and one gradient of the student's logits per teacher."""
    activations: int
    gathered: int
    """Unsharded parameters and gradients at a time (FSDP2, ZeRO), or gradient buckets (DDP)."""

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    def to_json(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}


def block_activation_bytes(arch: Architecture, layer: int, width: int) -> int:
    """Bytes per token that a decoder layer keeps for its backward pass. ``width``: bytes per value of the compute dtype."""
    hidden = arch.size("hidden")
    q, kv = arch.heads * arch.size("head_dim"), arch.size("kv") * arch.size("head_dim")
    norms = 2 * (4 * hidden + 2 * width * hidden)  # fp32 inputs, normalised values, and inputs of the projections
    attention = width * (2 * q + 2 * kv) + 4 * arch.heads  # q, k, v after rotation, the output, and one fp32 number per head
    experts = arch.top_k * (arch.size("expert_inter") or arch.size("inter"))
    return norms + attention + 4 * width * (experts if arch.is_sparse(layer) else arch.size("inter"))


def activation_bytes(
    arch: Architecture, batch: int, length: int, width: int, *, checkpointed: Collection[int], offloaded: bool = False
) -> int:
    """Bytes kept for the backward pass of one micro-batch of [batch, length] tokens.

    ``width``: bytes per value of the compute dtype. ``checkpointed``: layers of which only the input is kept (``offloaded``: in main memory); one of
    them at a time, or the loss, is held whole.
    """
    hidden = arch.size("hidden")
    blocks = [block_activation_bytes(arch, layer, width) for layer in range(arch.layers)]
    kept = sum(nbytes for layer, nbytes in enumerate(blocks) if layer not in checkpointed)
    inputs = 0 if offloaded else len(checkpointed) * hidden * width
    loss = arch.size("vocab") * (width + 4 + 4) + 4 * hidden + 2 * width * hidden
    # The loss is freed before the first block is recomputed.
    return batch * length * (kept + inputs + max([loss, *(blocks[layer] for layer in checkpointed)]))


def estimate_memory(
    arch: Architecture,
    arguments: TrainingArguments,
    *,
    parameters: int,
    trainable: int,
    width: int,
    length: int,
    penalty: int = 0,
    rows: int = 0,
    checkpointed: Collection[int] = (),
    teachers: int = 0,
    distillation: int = 0,
    launch: Launch = Launch(),  # noqa: B008 - immutable
) -> MemoryEstimate:
    """The memory of one process.

    ``parameters`` and ``trainable`` are parameter counts, ``width`` bytes per parameter, ``length`` tokens per sequence. ``penalty`` and ``rows``
    are bytes for the whole model, before sharding; ``teachers`` and ``distillation`` bytes per process. ``checkpointed``: layers whose activations
    are computed again.
    """
    optim = str(getattr(arguments.optim, "value", arguments.optim))
    states = OPTIMIZER_STATES.get(optim.split("_")[0], 2)
    mixed_precision = bool(arguments.bf16 or arguments.fp16)
    compute_width = 2 if mixed_precision else width
    # Under mixed precision FSDP2 and DeepSpeed train in fp32, whatever dtype was loaded.
    train_width = 4 if mixed_precision and launch.sharing not in ("one", "ddp") else width
    unsharded = {
        "weights": trainable * train_width + (parameters - trainable) * width,
        "gradients": trainable * train_width,
        "optimizer": trainable * states * (1 if "8bit" in optim else train_width),
        "penalty": penalty,
        "rows": rows,
    }
    if launch.deepspeed and mixed_precision:  # a 16-bit module, and fp32 master weights in the optimizer
        unsharded |= {"weights": parameters * 2, "gradients": trainable * 2, "optimizer": unsharded["optimizer"] + trainable * 4}
    return MemoryEstimate(
        **{purpose: nbytes // launch.shards(purpose) for purpose, nbytes in unsharded.items()},
        teachers=teachers,
        distillation=distillation,
        activations=activation_bytes(
            arch,
            arguments.per_device_train_batch_size,
            -(-length // launch.context_parallel),
            compute_width,
            checkpointed=checkpointed,
            offloaded=arguments.device.type != "cpu" and bool((arguments.activation_checkpointing_kwargs or {}).get("offload")),
        ),
        gathered=gathered_bytes(arch, launch, compute_width, trainable * train_width),
    )


def gathered_bytes(arch: Architecture, launch: Launch, width: int, gradients: int) -> int:
    """Bytes held unsharded at a time. ``width``: bytes per value of the compute dtype; ``gradients``: bytes of all gradients.

    FSDP2: two blocks (the next is prefetched) and the head, with the gradients of the two largest units. DDP: buckets as large as all gradients.
    ZeRO-3: up to ZERO3_MAX_LIVE_PARAMETERS and buckets of hidden^2 values (transformers' default).
    """
    if launch.sharing == "ddp" and launch.processes > 1:
        return gradients
    if launch.sharing == "zero3":
        return width * (min(count_parameters(arch).total, ZERO3_MAX_LIVE_PARAMETERS) + 4 * arch.size("hidden") ** 2)
    if launch.sharing in ("zero1", "zero2"):
        return width * 2 * arch.size("hidden") ** 2
    if launch.sharing != "fsdp2":
        return 0
    block, head = max(block_parameters(arch)), arch.size("hidden") * arch.size("vocab")
    return width * (2 * block + head + 2 * max(block, head))


def distillation_bytes(options: DistillOptions, vocabulary: int, tokens: int, teacher: int, student: int) -> int:
    """Bytes of logits for a micro-batch of ``tokens`` tokens. ``teacher``, ``student``: bytes per logit."""
    if options.top_k is None:
        per_token = vocabulary * teacher
    else:
        per_token = min(options.top_k, vocabulary) * ({"float16": 2, "float32": 4}[options.cache_dtype] + 8)  # and int64 token ids
    return tokens * (per_token + len(options.teachers) * vocabulary * student)
