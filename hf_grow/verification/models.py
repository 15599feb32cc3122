"""Loads the models to compare, one in memory at a time: as stored, recomputed without rounding, or with perturbed weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, cast

from hf_grow.checkpoint.reader import Checkpoint
from hf_grow.common.free_memory import available_memory
from hf_grow.common.units import format_bytes
from hf_grow.convert.in_memory import build_model, untie_config
from hf_grow.growth.plan import GrowthPlan
from hf_grow.growth.source_info import TensorInfo
from hf_grow.model.architecture import Architecture
from hf_grow.model.loading import reset_output_flags, transformers_errors
from hf_grow.model.param_count import count_parameters
from hf_grow.verification.routing import Routing

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

LOGITS_BYTES = 1 << 30
"""Memory for the source's logits while the other models run; with a large vocabulary, fewer tokens are compared."""
MEMORY_FRACTION = 0.8
CHUNK = 1 << 22  # weights perturbed at a time


def choose_dtype(old: Checkpoint, new: Checkpoint, requested: str, notify: Callable[[str], None]) -> tuple[str, str]:
    """The torch dtype of the computation, and the reason if memory decided it. ``auto`` is fp32 (fp64 for an F64 source) where that fits."""
    if requested != "auto":
        return requested, ""
    if any(t.dtype == "F64" for t in old.tensors.values()):
        return "float64", ""
    if fits_in_memory(old, new):
        return "float32", ""
    reason = f"float32 needs about {format_bytes(_needed_bytes(old, new))} of memory, and {format_bytes(available_memory())} are free"
    notify(f"{reason}: comparing in bfloat16, where rounding hides small differences.")
    return "bfloat16", reason


def fits_in_memory(old: Checkpoint, new: Checkpoint, copies: int = 1) -> bool:
    """Whether this many fp32 copies of the larger model fit into memory, with the logits."""
    return _needed_bytes(old, new, copies) < MEMORY_FRACTION * available_memory()


def _needed_bytes(old: Checkpoint, new: Checkpoint, copies: int = 1) -> int:
    return copies * 4 * max(count_parameters(c.info.architecture).total for c in (old, new)) + LOGITS_BYTES


def load_model(checkpoint: Checkpoint, dtype: str) -> PreTrainedModel:
    """The model of a folder, in eval mode on the CPU; nothing is downloaded, and no code from the folder runs."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    with transformers_errors(f"the model of {checkpoint.ref}"):
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint.folder,
            dtype=getattr(torch, dtype),
            trust_remote_code=False,
            local_files_only=True,
            **expert_options(dtype, checkpoint.info.architecture),
        )
        untie_config(model)
        reset_output_flags(model.config)
    return cast("PreTrainedModel", model.eval())


def expert_options(dtype: str, arch: Architecture) -> dict[str, str]:
    """torch's grouped matmul for fused experts supports neither fp64 nor rows that are not a multiple of 16 bytes."""
    width = {"float64": 8, "float32": 4}.get(dtype, 2)
    unaligned = any(arch.size(axis) * width % 16 for axis in ("hidden", "expert_inter"))
    return {"experts_implementation": "eager"} if arch.is_moe and (width == 8 or unaligned) else {}


def unrounded_model(plan: GrowthPlan, old: Checkpoint, dtype: str) -> PreTrainedModel:
    """The grown model computed from the source in fp32 (or fp64), before it is rounded to the stored dtype."""
    import torch

    from hf_grow.checkpoint.stored_tensors import StoredTensors
    from hf_grow.growth.evaluate import Evaluator

    evaluator, wide = Evaluator(plan, StoredTensors(old)), "F64" if dtype == "float64" else "F32"
    state = {n: evaluator.whole(e, TensorInfo(wide, plan.targets[n].shape)) for n, e in plan.growth.tensors.items()}
    model = build_model(plan, state, getattr(torch, dtype), **expert_options(dtype, plan.architecture)).eval()
    reset_output_flags(model.config)
    return model


def perturb_weights(model: PreTrainedModel, epsilon: float) -> PreTrainedModel:
    """Multiplies every weight, in place, by a random factor in [1 - epsilon, 1 + epsilon], as rounding would."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            for part in parameter.view(-1).split(CHUNK):
                factor = 1 + epsilon * (2 * torch.rand(len(part), generator=generator, dtype=torch.float64) - 1)
                part.copy_(part.double() * factor)  # in 16 bits the factor itself would be rounded
    return model


def logits(model: PreTrainedModel, windows: Iterable[torch.Tensor], vocab: int, routing: Routing | None = None) -> Iterator[torch.Tensor]:
    """Yields logits [tokens, vocab] of each window, in fp32 (fp64 for an fp64 model). Router logits are added to `routing`."""
    import torch

    keep = torch.float64 if model.dtype == torch.float64 else torch.float32
    for window in windows:
        with torch.no_grad():
            output = model(window[None], use_cache=False, **({"output_router_logits": True} if routing else {}))
        if routing:
            routing.add(output.router_logits)
        yield output.logits[0, :, :vocab].to(keep)
