"""FLOPs per token, counted by torch while running a weightless model (on the meta device) on one sequence.

Attention counts the scores of the whole sequence, causal mask or not, as torch and Chowdhery et al. 2022 (arXiv 2204.02311, appendix B) do.
The backward pass counts what is needed: no gradients of frozen weights, none of activations before the first trainable weight, and no
recomputation by gradient checkpointing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hf_grow.model.loading import transformers_errors
from hf_grow.model.meta_model import meta_model

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module


def forward_flops(config: Mapping[str, Any], length: int) -> float:
    """Forward FLOPs per token of the model of a config.json, in a sequence of `length` tokens."""
    import torch

    with torch.no_grad():
        return _count(meta_model(config), length)


def training_flops(model: Module, length: int) -> float:
    """Forward and backward FLOPs per token of a model on the meta device, adapters included; requires_grad marks the trainable parameters."""
    return _count(model, length, backward=True)


def _count(model: Any, length: int, backward: bool = False) -> float:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.set_attn_implementation("eager")  # fused kernels would be counted with their recomputation
    base.set_experts_implementation("batched_mm")  # independent of the routing, which meta tensors do not have
    for module in base.modules():
        if isinstance(getattr(module, "rope_type", None), str):
            module.rope_type = "default"  # dynamic types read position values; the FLOPs are the same
    ids = torch.zeros(1, length, dtype=torch.int64, device="meta")
    # An explicit mask, since transformers would read tensor values to build one.
    mask = torch.zeros(1, 1, length, length, device="meta")
    with transformers_errors("the model", does="run"), FlopCounterMode(display=False) as counter:
        logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        if backward:
            logits.backward(torch.empty_like(logits))  # type: ignore[no-untyped-call]
    return float(counter.get_total_flops()) / length
