"""The models that are compared, one in memory at a time: as stored, as the map says before anything is rounded, with weights rounded once more."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, cast

from hf_grow.checkpoint.reader import Checkpoint
from hf_grow.common.free_memory import available_memory
from hf_grow.common.units import format_bytes
from hf_grow.convert.in_memory import assemble, untie_config
from hf_grow.growth.plan import GrowthPlan, TensorInfo
from hf_grow.model.architecture import Architecture
from hf_grow.model.loading import reset_output_flags, transformers_errors
from hf_grow.model.param_count import count_parameters
from hf_grow.verification.routing import Routing

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

LOGITS_BYTES = 1 << 30
"""What the source's logits may take while other models run; fewer tokens are compared where the vocabulary is large."""
SHARE_OF_MEMORY = 0.8
PART = 1 << 22  # weights moved at once


def choose_dtype(old: Checkpoint, new: Checkpoint, asked: str, notify: Callable[[str], None]) -> tuple[str, str]:
    """What both models are computed in, as torch names it, and why where that is not what one would expect; `auto` is fp32 where it fits."""
    if asked != "auto":
        return asked, ""
    if any(t.dtype == "F64" for t in old.tensors.values()):
        return "float64", ""
    if fits(old, new):
        return "float32", ""
    why = f"float32 needs about {format_bytes(_need(old, new))} of memory, and {format_bytes(available_memory())} are free"
    notify(f"{why}: comparing in bfloat16, so that small differences drown in rounding.")
    return "bfloat16", why


def fits(old: Checkpoint, new: Checkpoint, copies: int = 1) -> bool:
    """Whether so many copies of the larger model fit into memory in fp32, beside the logits."""
    return _need(old, new, copies) < SHARE_OF_MEMORY * available_memory()


def _need(old: Checkpoint, new: Checkpoint, copies: int = 1) -> int:
    return copies * 4 * max(count_parameters(c.info.architecture).total for c in (old, new)) + LOGITS_BYTES


def load_model(checkpoint: Checkpoint, dtype: str) -> PreTrainedModel:
    """The model of a folder in a dtype of torch, for evaluation, on the CPU; nothing is fetched and no code of the folder is run."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # a bar of its own for each of two models tells nobody anything
    with transformers_errors(f"the model of {checkpoint.ref}"):
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint.folder,
            dtype=getattr(torch, dtype),
            trust_remote_code=False,
            local_files_only=True,
            **_plain(dtype, checkpoint.info.architecture),
        )
        untie_config(model)
        reset_output_flags(model.config)
    return cast("PreTrainedModel", model.eval())


def _plain(dtype: str, arch: Architecture) -> dict[str, str]:
    """Fused experts multiply in groups, which torch does neither in fp64 nor where a row is no multiple of 16 bytes."""
    width = {"float64": 8, "float32": 4}.get(dtype, 2)
    odd = any(arch.size(axis) * width % 16 for axis in ("hidden", "expert_inter"))
    return {"experts_implementation": "eager"} if arch.is_moe and (width == 8 or odd) else {}


def mapped_model(plan: GrowthPlan, old: Checkpoint, dtype: str) -> PreTrainedModel:
    """The grown model as the map makes it of the source in fp32 (or fp64), where storing it in 16 bits has rounded nothing yet."""
    import torch

    from hf_grow.checkpoint.stored_tensors import StoredTensors
    from hf_grow.growth.evaluate import Evaluator

    evaluator, wide = Evaluator(plan, StoredTensors(old)), "F64" if dtype == "float64" else "F32"
    state = {n: evaluator.whole(e, TensorInfo(wide, plan.targets[n].shape)) for n, e in plan.growth.tensors.items()}
    model = assemble(plan, state, getattr(torch, dtype), **_plain(dtype, plan.architecture)).eval()
    reset_output_flags(model.config)
    return model


def rounded_once_more(model: PreTrainedModel, share: float) -> PreTrainedModel:
    """The model with every weight moved, up or down at random, by up to that share of itself: as if it had been rounded to so many bits."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            for part in parameter.view(-1).split(PART):
                moved = 1 + share * (2 * torch.rand(len(part), generator=generator, dtype=torch.float64) - 1)
                part.copy_(part.double() * moved)  # in 16 bits, 1 + share would be 1, or too much
    return model


def logits(model: PreTrainedModel, windows: Iterable[torch.Tensor], vocab: int, routing: Routing | None = None) -> Iterator[torch.Tensor]:
    """Logits [tokens, vocab] of one window after another, in fp32 (fp64 of an fp64 model). `routing` is told of every router."""
    import torch

    keep = torch.float64 if model.dtype == torch.float64 else torch.float32
    for window in windows:
        with torch.no_grad():
            output = model(window[None], use_cache=False, **({"output_router_logits": True} if routing else {}))
        if routing:
            routing.add(output.router_logits)
        yield output.logits[0, :, :vocab].to(keep)
