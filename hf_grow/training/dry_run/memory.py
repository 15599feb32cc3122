"""What a training will need, from shapes alone: memory of each process by purpose, tokens. For `--dry-run`; estimates are called so.

Weights, gradients, optimizer, penalty and copies of rows are counted, and divided where several processes share them. Activations are estimated:
what PyTorch keeps for the backward pass of a Llama block and of the loss, with fused attention (no matrix of scores). tests/training/trainer/test_train.py compares
them with what is kept. What is gathered for a moment is an upper estimate of what each library holds at once (docs/scale.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from hf_grow.model.architecture import Architecture
from hf_grow.model.param_count import block_parameters, count_parameters
from hf_grow.training.distributed.launch import Launch

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from hf_grow.training.config.distill_options import DistillOptions

OPTIMIZER_BYTES = {"adamw": 2, "adam": 2, "lion": 1, "rmsprop": 1, "sgd": 0, "adagrad": 1, "adafactor": 0}
"""Numbers an optimizer holds for every weight, in the weight's dtype, by the first word of its name; 8-bit ones hold a byte for each."""


@dataclass(frozen=True)
class Memory:
    """Bytes on the device of each process."""

    weights: int
    gradients: int
    optimizer: int
    penalty: int
    rows: int
    """Old values of rows that have a rate of their own or are frozen, during a step."""
    teachers: int
    distillation: int
    """Logits of one teacher for a micro-batch, and the gradients of the student's, one for each teacher."""
    activations: int
    gathered: int
    """What a process holds whole for a moment: blocks of shared parameters and their gradients, or the buckets in which gradients travel."""

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


LIVE = 1_000_000_000
"""stage3_max_live_parameters of DeepSpeed: so many gathered parameters may be held before some are given back."""


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
    loss = arch.size("vocab") * (width + 4 + 4) + 4 * h + 2 * width * h
    if checkpointing:  # the loss has gone by the time that the first block is computed again
        return tokens * (arch.layers * h * width + max(loss, *each))
    return tokens * (sum(each) + loss)


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
    distillation: int = 0,
    launch: Launch = Launch(),  # noqa: B008 - cannot change
) -> Memory:
    """``parameters`` and ``trainable`` count weights; ``width`` is the bytes of one of them. ``penalty`` and ``rows`` are bytes of the whole model."""
    optim = str(getattr(arguments.optim, "value", arguments.optim))
    kept = OPTIMIZER_BYTES.get(optim.split("_")[0], 2)
    half = bool(arguments.bf16 or arguments.fp16)
    computed = 2 if half else width
    own = 4 if half and launch.sharing not in ("one", "ddp") else width  # FSDP2 and DeepSpeed then train in fp32 whatever was loaded
    whole = {
        "weights": trainable * own + (parameters - trainable) * width,
        "gradients": trainable * own,
        "optimizer": trainable * kept * (1 if "8bit" in optim else own),
        "penalty": penalty,
        "rows": rows,
    }
    if launch.deepspeed and half:  # the module is in 16 bits, and its optimizer keeps the weights in 32 beside its own numbers
        whole |= {"weights": parameters * 2, "gradients": trainable * 2, "optimizer": whole["optimizer"] + trainable * 4}
    cut = {what: nbytes // launch.pieces(what) for what, nbytes in whole.items()}
    return Memory(
        **cut,
        teachers=teachers,
        distillation=distillation,
        activations=activations(arch, arguments.per_device_train_batch_size, length, computed, checkpointing=checkpoints(arguments)),
        gathered=gathered(arch, launch, computed, trainable * own),
    )


def gathered(arch: Architecture, launch: Launch, width: int, gradients: int) -> int:
    """FSDP2: two blocks (the next is fetched while one is computed) and the head, with the gradients of two of the largest units.

    DDP: buckets as large as all ``gradients`` (bytes). ZeRO-3: up to LIVE parameters, and buckets of hidden^2 numbers (transformers' default).
    ``width``: bytes of the dtype that is computed in.
    """
    if launch.sharing == "ddp" and launch.processes > 1:
        return gradients
    if launch.sharing == "zero3":
        return width * (min(count_parameters(arch).total, LIVE) + 4 * arch.size("hidden") ** 2)
    if launch.sharing in ("zero1", "zero2"):
        return width * 2 * arch.size("hidden") ** 2
    if launch.sharing != "fsdp2":
        return 0
    block, head = max(block_parameters(arch)), arch.size("hidden") * arch.size("vocab")
    return width * (2 * block + head + 2 * max(block, head))


def checkpoints(arguments: TrainingArguments) -> bool:
    """Whether blocks are computed twice; the argument has two names."""
    return any(getattr(arguments, name, None) for name in ("gradient_checkpointing", "activation_checkpointing"))


def distillation(options: DistillOptions, vocabulary: int, tokens: int, teacher: int, student: int) -> int:
    """Bytes of logits that learning from teachers adds for a micro-batch of `tokens`. ``teacher``, ``student``: bytes of one logit."""
    if options.top_k is None:
        said = vocabulary * teacher
    else:
        said = min(options.top_k, vocabulary) * ({"float16": 2, "float32": 4}[options.cache_dtype] + 8)
    return tokens * (said + len(options.teachers) * vocabulary * student)


def as_json(memory: Memory) -> Mapping[str, Any]:
    return {**asdict(memory), "total": memory.total}
