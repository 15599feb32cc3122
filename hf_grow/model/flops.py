"""FLOPs of a token, counted by torch as it runs a model without weights (on the meta device) on one sequence.

So attention counts, at the length that is trained (scores of a whole sequence, as torch and Chowdhery et al. 2022, arXiv 2204.02311, appendix B, count
them: a causal mask spares none), and of the backward pass what is needed: no gradients of frozen weights, and none of activations before the
first weight that trains. What gradient checkpointing computes twice counts once.
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
    """Of the model of a config.json, of one token in a sequence of `length`."""
    import torch

    with torch.no_grad():
        return _count(meta_model(config), length)


def training_flops(model: Module, length: int) -> float:
    """Forward and backward, of a model on the meta device (adapters and all) whose parameters say by requires_grad what trains."""
    return _count(model, length, backward=True)


def _count(model: Any, length: int, backward: bool = False) -> float:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.set_attn_implementation("eager")  # every product by itself; fused kernels are counted with what they compute twice
    base.set_experts_implementation("batched_mm")  # experts of a token, without asking which
    for module in base.modules():
        if isinstance(getattr(module, "rope_type", None), str):
            module.rope_type = "default"  # dynamic ones look at the numbers of the positions; the products are the same
    ids = torch.zeros(1, length, dtype=torch.int64, device="meta")
    # A mask of its own: transformers would look at numbers to make one.
    mask = torch.zeros(1, 1, length, length, device="meta")
    with transformers_errors("the model", does="run"), FlopCounterMode(display=False) as counter:
        logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        if backward:
            logits.backward(torch.empty_like(logits))  # type: ignore[no-untyped-call]
    return float(counter.get_total_flops()) / length
