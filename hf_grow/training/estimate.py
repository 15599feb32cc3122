"""What a training will need, from shapes alone: memory by purpose, tokens, FLOPs. For `--dry-run`; estimates are called so.

Weights, gradients, optimizer, penalty and copies of rows are counted. Activations are estimated: what PyTorch keeps for the backward pass of a
Llama block and of the loss, with fused attention (no matrix of scores). tests/test_train.py compares them with what is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from hf_grow.architecture import Architecture
from hf_grow.methods.sizing import measure

if TYPE_CHECKING:
    from transformers import TrainingArguments

OPTIMIZER_BYTES = {"adamw": 2, "adam": 2, "lion": 1, "rmsprop": 1, "sgd": 0, "adagrad": 1, "adafactor": 0}
"""Numbers an optimizer holds for every weight, in the weight's dtype, by the first word of its name; 8-bit ones hold a byte for each."""


@dataclass(frozen=True)
class Memory:
    """Bytes, all on one device."""

    weights: int
    gradients: int
    optimizer: int
    penalty: int
    rows: int
    """Old values of rows that have a rate of their own or are frozen, during a step."""
    teachers: int
    activations: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def activations(arch: Architecture, batch: int, length: int, width: int, *, checkpointing: bool) -> int:
    """Bytes kept for the backward pass of one micro-batch. ``width``: bytes of the dtype that is computed in."""
    h, tokens = arch.size("hidden"), batch * length
    q, kv = arch.heads * arch.size("head_dim"), arch.size("kv") * arch.size("head_dim")
    norms = 2 * (4 * h + 2 * width * h)  # fp32 inputs, normalised values, and what goes into the projections
    attention = width * (2 * q + 2 * kv) + 4 * arch.heads  # q, k, v after rotation, the output, and one fp32 number a head
    each = []
    for layer in range(arch.layers):
        experts = arch.top_k * (arch.size("expert_inter") or arch.size("inter"))
        inter = experts if arch.is_sparse(layer) else arch.size("inter")
        each.append(norms + attention + 4 * width * inter)
    blocks = sum(each) if not checkpointing else arch.layers * h * width + max(each)
    loss = arch.size("vocab") * (width + 4 + 4) + 4 * h + 2 * width * h
    return tokens * (blocks + loss)


def estimate(
    arch: Architecture,
    arguments: TrainingArguments,
    *,
    parameters: int,
    trainable: int,
    width: int,
    length: int,
    penalty: int = 0,
    rows: int = 0,
    teachers: int = 0,
) -> Memory:
    """``parameters`` and ``trainable`` count weights; ``width`` is the bytes of one of them."""
    optim = str(getattr(arguments.optim, "value", arguments.optim))
    kept = OPTIMIZER_BYTES.get(optim.split("_")[0], 2)
    computed = 2 if arguments.bf16 or arguments.fp16 else width
    return Memory(
        weights=parameters * width,
        gradients=trainable * width,
        optimizer=trainable * kept * (1 if "8bit" in optim else width),
        penalty=penalty,
        rows=rows,
        teachers=teachers,
        activations=activations(arch, arguments.per_device_train_batch_size, length, computed, checkpointing=checkpoints(arguments)),
    )


def checkpoints(arguments: TrainingArguments) -> bool:
    """Whether blocks are computed twice; the argument has two names."""
    return any(getattr(arguments, name, None) for name in ("gradient_checkpointing", "activation_checkpointing"))


def flops_per_token(arch: Architecture, teachers: int = 0) -> float:
    """Forward and backward (three times the forward, of active parameters), and the forward passes of teachers in memory."""
    return 3.0 * measure(arch).flops + teachers


def tokens_a_step(arguments: TrainingArguments, length: int, processes: int = 1) -> int:
    return int(arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * processes * length)


def as_json(memory: Memory) -> Mapping[str, Any]:
    return {**asdict(memory), "total": memory.total}
