"""T^2 KL(teacher || student) without copies of all logits: some positions at a time, forward and backward in one pass.

The plain formula holds five fp32 tensors of [B, L, V] until the backward pass (10 GB at 4096 positions and 128k tokens). Its gradient is known in closed
form, d/dz T^2 KL = T (softmax(z / T) - p), so it is worked out with the loss, chunk by chunk, into one tensor in the dtype of the student's logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 1 << 24
"""Logits worked on at once; 64 MB in fp32 for each of about four intermediate tensors."""


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float, chosen: Tensor | None = None) -> Tensor:
    """The plain formula: T^2 KL(teacher || student) at every position, [...]. Logits: student [..., V]; teacher [..., V], or [..., k] of the
    tokens `chosen`. In fp32, or fp64 where the student is."""
    wide = torch.promote_types(student.dtype, torch.float32)
    own = (student.to(wide) / temperature).log_softmax(-1)
    if chosen is not None:
        own = own.gather(-1, chosen)
    said = (teacher.to(wide) / temperature).log_softmax(-1)
    return (said.exp() * (said - own)).sum(-1) * temperature**2


def summed_kl_divergence(student: Tensor, teacher: Tensor, temperature: float, counted: Tensor, chosen: Tensor | None = None) -> Tensor:
    """`divergence` summed over the positions where `counted` [B, L] is true; the same gradient for `student` [B, L, V], once."""
    apply: Callable[..., Tensor] = _SummedKLDivergence.apply
    return apply(student, teacher, temperature, counted, chosen)


class _SummedKLDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float, counted: Tensor, chosen: Tensor | None) -> Tensor:
        wide = torch.promote_types(student.dtype, torch.float32)
        total = student.new_zeros((), dtype=wide)
        # Every position is written, those that do not count as zero.
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        step = max(1, CHUNK // student.shape[-1])
        for row in range(student.shape[0]):
            for start in range(0, student.shape[1], step):
                here = (row, slice(start, start + step))
                some = None if chosen is None else chosen[here]
                mask = counted[here].to(wide)[:, None]
                total += (kl_divergence(student[here], teacher[here], temperature, some)[:, None] * mask).sum()
                if gradient is None:
                    continue
                slope = (student[here].to(wide) / temperature).softmax(-1)
                said = (teacher[here].to(wide) / temperature).softmax(-1)
                slope = slope.sub_(said) if some is None else slope.scatter_add_(-1, some, -said)
                gradient[here] = slope.mul_(temperature * mask)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * above.to(gradient.dtype), None, None, None, None
