"""Estimated peak memory of each training process, and what it consists of, from shapes alone.

Weights, optimizer state, penalty and teachers are held all the time. The rest is what the largest of these moments of a step holds (`step_moments`):

    loss, forward       activations of all blocks, logits
    loss, backward      activations of all blocks, three fp32 tensors of the logits' size: log-softmax and two gradients
    a block, backward   activations up to this block, gradients after it, and a quarter of its MLP again for gradients of activations
    optimizer step      all gradients, saved rows, temporaries of the optimizer

With gradient accumulation all gradients are there at each of them. Activations are what PyTorch keeps for the backward pass of a Llama block with
fused attention (no score matrix). tests/training/dry_run/test_tracked_memory.py compares the sum with torch's memory tracker.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
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

FOREACH = ("adamw_torch", "adafactor")
"""Optimizers that compute on all parameters at a time: one temporary of all of them. The fused ones have none."""
DISTILLATION_CHUNK = 1 << 24
"""Logits that distillation's loss computes on at a time."""
ZERO3_MAX_LIVE_PARAMETERS = 1_000_000_000
"""Default of DeepSpeed's stage3_max_live_parameters."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the device of each process: the most that each purpose holds, and the peak of their sum, which is less where they do not coincide."""

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
    """With the logits and their gradients; under autocast (bf16, fp16) also 16-bit copies of weights in fp32."""
    gathered: int
    """Unsharded parameters and gradients at a time (FSDP2, ZeRO), or gradient buckets (DDP)."""
    step: int
    """Temporaries of the optimizer and the penalty."""
    total: int
    """The peak."""

    def to_json(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True)
class Moment:
    """What a moment of a step holds beside weights, optimizer state, penalty and teachers, in bytes."""

    gradients: int = 0
    activations: int = 0
    distillation: int = 0
    gathered: int = 0
    rows: int = 0
    step: int = 0


@dataclass(frozen=True)
class Widths:
    """Bytes per value."""

    compute: int
    """Of matrix products."""
    residual: int
    """Of the residual stream."""
    casts: bool = False
    """Weights and inputs of a linear layer are cast for it (autocast): each layer keeps a copy of its input, and there is a copy of its weights."""


def compute_widths(arguments: TrainingArguments, launch: Launch, width: int) -> Widths:
    """``width``: bytes per weight. FSDP2 and DeepSpeed gather weights in 16 bits; otherwise autocast casts those in fp32."""
    if not (arguments.bf16 or arguments.fp16):
        return Widths(width, width)
    casts = launch.sharing in ("one", "ddp") and width > 2
    return Widths(2, width if casts else 2, casts)


def block_activation_bytes(arch: Architecture, layer: int, widths: Widths) -> int:
    """Bytes per token that a decoder layer keeps for its backward pass."""
    hidden, w = arch.size("hidden"), widths.compute
    q, kv = arch.heads * arch.size("head_dim"), arch.size("kv") * arch.size("head_dim")
    norms = 2 * (4 + widths.residual) * hidden  # inputs in fp32, normalised values
    inputs = (5 if widths.casts else 2) * w * hidden  # of q, k, v, gate and up: cast for each, or one for all
    attention = w * (2 * q + 2 * kv) + 4 * arch.heads  # q, k, v after rotation, the output, and one fp32 number per head
    return norms + inputs + attention + mlp_bytes(arch, layer, w) * 4


def mlp_bytes(arch: Architecture, layer: int, width: int) -> int:
    """Bytes per token of one of the tensors inside an MLP, of which four are kept: gate, its activation, up, and their product."""
    experts = arch.top_k * (arch.size("expert_inter") or arch.size("inter"))
    return width * (experts if arch.is_sparse(layer) else arch.size("inter"))


def step_moments(
    arch: Architecture,
    tokens: int,
    widths: Widths,
    *,
    launch: Launch = Launch(),  # noqa: B008 - immutable
    trained_share: float = 1.0,
    gradient_width: int = 4,
    accumulated: bool = False,
    checkpointed: Collection[int] = (),
    offloaded: bool = False,
    distillation: int = 0,
    teachers: int = 0,
) -> Iterator[Moment]:
    """The moments of forward and backward pass that may be the peak.

    Args:
        arch: of the model.
        tokens: of a micro-batch.
        widths: bytes per value.
        launch: the processes.
        trained_share: of the parameters.
        gradient_width: bytes per gradient.
        accumulated: whether gradients of an earlier micro-batch are there.
        checkpointed: layers of which only the input is kept (``offloaded``: in main memory), and which are computed again one at a time.
        distillation: bytes of logits of a micro-batch.
        teachers: how many teachers' gradients of the logits are among them.
    """
    hidden, vocabulary = arch.size("hidden"), arch.size("vocab")
    blocks, head = block_parameters(arch), hidden * vocabulary
    embedding = 0 if arch.tied else head
    whole = [tokens * block_activation_bytes(arch, layer, widths) for layer in range(arch.layers)]
    source = 0 if offloaded else tokens * widths.residual * hidden
    kept = [source if layer in checkpointed else nbytes for layer, nbytes in enumerate(whole)]
    last_norm = tokens * hidden * (4 + widths.residual + widths.compute)

    def gradient(parameters: int) -> int:
        return int(parameters * trained_share) * gradient_width // launch.shards("gradients")

    def copies(layers: Collection[int]) -> int:
        return widths.compute * (head + sum(blocks[layer] for layer in layers)) if widths.casts else 0

    fsdp2, w = launch.sharing == "fsdp2", widths.compute
    everything = gradient(sum(blocks) + head + embedding)
    before = everything if accumulated else 0
    logits = tokens * vocabulary
    student = 4 if w == 2 else w
    copied = range(arch.layers) if trained_share == 1 else [layer for layer in range(arch.layers) if layer not in checkpointed]
    forward = (w + (0 if w == 4 else 4) + 4) * logits
    if distillation:  # beside the log-softmax; of a chunk of logits about four tensors in fp32
        forward = (4 + student) * logits + 16 * min(logits, DISTILLATION_CHUNK)
    backward = (12 + (student if teachers else 0)) * logits
    unsharded = w * head if fsdp2 else 0
    yield Moment(before, sum(kept) + last_norm + forward + copies(copied), distillation, unsharded)
    remaining = copies([layer for layer in range(arch.layers) if layer not in checkpointed])
    yield Moment(before, sum(kept) + last_norm + backward + remaining, 0, unsharded)
    behind, done = head, 0 if accumulated else gradient(head)
    for layer in reversed(range(arch.layers)):
        own = whole[layer] + (source if layer in checkpointed else 0) + 2 * tokens * mlp_bytes(arch, layer, w)
        own += remaining + (copies([layer]) - copies([]) if layer in checkpointed else 0)
        if fsdp2:  # this block and the next, which is prefetched; gradients of this one; those of the last one, being sent
            unsharded = w * (2 * blocks[layer] + (blocks[layer - 1] if layer else embedding) + behind)
        yield Moment(before + done, sum(kept[:layer]) + own, 0, unsharded)
        behind, done = blocks[layer], done + (0 if accumulated else gradient(blocks[layer]))
    added = gradient_width * embedding if accumulated and not fsdp2 else 0
    yield Moment(everything, added, 0, w * (3 * embedding + blocks[0]) if fsdp2 else 0)


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

    ``parameters`` and ``trainable`` are parameter counts, ``width`` bytes per parameter, ``length`` tokens per sequence. ``penalty``: bytes for the
    whole model, before sharding; ``rows``, ``teachers`` and ``distillation``: bytes per process. ``checkpointed``: layers whose activations
    are computed again.
    """
    optim = str(getattr(arguments.optim, "value", arguments.optim))
    states = OPTIMIZER_STATES.get(optim.split("_")[0], 2)
    mixed_precision = bool(arguments.bf16 or arguments.fp16)
    # Under mixed precision FSDP2 and DeepSpeed train in fp32, whatever dtype was loaded.
    train_width = 4 if mixed_precision and launch.sharing not in ("one", "ddp") else width
    unsharded = {
        "weights": trainable * train_width + (parameters - trainable) * width,
        "gradients": trainable * train_width,
        "optimizer": trainable * states * (1 if "8bit" in optim else train_width),
        "penalty": penalty,
    }
    if launch.deepspeed and mixed_precision:  # a 16-bit module, and fp32 master weights in the optimizer
        unsharded |= {"weights": parameters * 2, "gradients": trainable * 2, "optimizer": unsharded["optimizer"] + trainable * 4}
    held = {purpose: nbytes // launch.shards(purpose) for purpose, nbytes in unsharded.items()}
    widths = compute_widths(arguments, launch, width)
    buffers = library_buffers(arch, launch, widths.compute, trainable * train_width)
    largest = max(arch.size("hidden") * arch.size("vocab"), arch.size("hidden") * arch.size("inter")) // launch.shards("penalty")
    temporaries = (held["optimizer"] // max(1, states) if optim in FOREACH else 0) + (2 * train_width * largest if penalty else 0)
    moments = [
        *step_moments(
            arch,
            arguments.per_device_train_batch_size * -(-length // launch.context_parallel),
            widths,
            launch=launch,
            trained_share=trainable / parameters,
            gradient_width=2 if launch.deepspeed and mixed_precision else train_width,
            accumulated=arguments.gradient_accumulation_steps > 1,
            checkpointed=checkpointed,
            offloaded=arguments.device.type != "cpu" and bool((arguments.activation_checkpointing_kwargs or {}).get("offload")),
            distillation=distillation,
            teachers=int(bool(distillation)),
        ),
        Moment(held["gradients"], rows=rows, step=temporaries),
    ]
    most = {purpose: max(getattr(m, purpose) for m in moments) for purpose in ("activations", "gathered")}
    peak = max(sum(asdict(m).values()) for m in moments)
    return MemoryEstimate(
        **held,
        rows=rows,
        teachers=teachers,
        distillation=distillation,
        activations=most["activations"],
        gathered=most["gathered"] + buffers,
        step=temporaries,
        total=held["weights"] + held["optimizer"] + held["penalty"] + teachers + buffers + peak,
    )


def gathered_bytes(arch: Architecture, launch: Launch, width: int) -> int:
    """The most that FSDP2 holds unsharded in a forward and backward pass. ``width``: bytes per value of the compute dtype."""
    return max(m.gathered for m in step_moments(arch, 0, Widths(width, width), launch=launch))


def library_buffers(arch: Architecture, launch: Launch, width: int, gradients: int) -> int:
    """Bytes that DDP and DeepSpeed hold all the time. ``width``: bytes per value of the compute dtype; ``gradients``: bytes of all gradients.

    DDP: buckets as large as all gradients. ZeRO-3: up to ZERO3_MAX_LIVE_PARAMETERS and buckets of hidden^2 values (transformers' default); DeepSpeed's
    own documentation, not measured.
    """
    if launch.sharing == "ddp" and launch.processes > 1:
        return gradients
    if launch.sharing == "zero3":
        return width * (min(count_parameters(arch).total, ZERO3_MAX_LIVE_PARAMETERS) + 4 * arch.size("hidden") ** 2)
    return width * 2 * arch.size("hidden") ** 2 if launch.sharing in ("zero1", "zero2") else 0


def distillation_bytes(options: DistillOptions, vocabulary: int, tokens: int, teacher: int, student: int) -> int:
    """Bytes of logits for a micro-batch of ``tokens`` tokens. ``teacher``, ``student``: bytes per logit."""
    if options.samples is not None:
        per_token = min(options.samples, vocabulary) * (4 + 8)  # counts and token ids; fewer where a token is drawn twice
    elif options.top_k is None:
        per_token = vocabulary * teacher
    else:
        per_token = min(options.top_k, vocabulary) * ({"float16": 2, "float32": 4}[options.cache_dtype] + 8)  # and int64 token ids
    return tokens * (per_token + len(options.teachers) * vocabulary * student)
