"""T^2 KL(teacher || student) (Hinton et al. 2015, arXiv 1503.02531) without copies of all logits: chunks of positions, forward and backward in one pass.

The plain formula holds five fp32 tensors of [B, L, V] until the backward pass (10 GB at 4096 positions and 128k tokens). Its gradient has a closed
form, d/dz T^2 KL = T (softmax(z / T) - p), so it is computed with the loss, chunk by chunk, into one tensor of the student logits' dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 1 << 24
"""Logits per chunk: 64 MB in fp32 for each of about four intermediate tensors."""


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float, token_ids: Tensor | None = None) -> Tensor:
    """The plain formula, T^2 KL(teacher || student) at every position: [...], in fp32, or fp64 where the student is.

    Args:
        student: logits [..., V].
        teacher: logits [..., V], or [..., k] of the tokens ``token_ids`` [..., k], over which both distributions are compared; integers are counts of
            draws from the teacher's distribution (at this temperature), whose shares take its place.
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    log_q = (student.to(dtype) / temperature).log_softmax(-1)
    if token_ids is not None:
        log_q = log_q.gather(-1, token_ids)
    if teacher.is_floating_point():
        log_p = (teacher.to(dtype) / temperature).log_softmax(-1)
        p = log_p.exp()
    else:
        p = _shares(teacher, dtype)
        log_p = p.clamp_min(torch.finfo(dtype).tiny).log()
    return (p * (log_p - log_q)).sum(-1) * temperature**2


def kl_gradient(student: Tensor, teacher: Tensor, temperature: float, token_ids: Tensor | None = None) -> Tensor:
    """The gradient of `kl_divergence` at every position with respect to ``student``, a new tensor."""
    dtype = torch.promote_types(student.dtype, torch.float32)
    gradient = (student.to(dtype) / temperature).softmax(-1)
    p = (teacher.to(dtype) / temperature).softmax(-1) if teacher.is_floating_point() else _shares(teacher, dtype)
    gradient = gradient.sub_(p) if token_ids is None else gradient.scatter_add_(-1, token_ids, -p)
    return gradient.mul_(temperature)


def _shares(counts: Tensor, dtype: torch.dtype) -> Tensor:
    return counts.to(dtype) / counts.sum(-1, keepdim=True).to(dtype)


def summed_kl_divergence(student: Tensor, teacher: Tensor, temperature: float, mask: Tensor, token_ids: Tensor | None = None) -> Tensor:
    """`kl_divergence` summed over the positions where ``mask`` [B, L] is true, differentiable once with respect to ``student`` [B, L, V]."""
    apply: Callable[..., Tensor] = _SummedKLDivergence.apply
    return apply(student, teacher, temperature, mask, token_ids)


class _SummedKLDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float, mask: Tensor, token_ids: Tensor | None) -> Tensor:
        dtype = torch.promote_types(student.dtype, torch.float32)
        total = student.new_zeros((), dtype=dtype)
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None  # every position is written below
        step = max(1, CHUNK // student.shape[-1])
        for row in range(student.shape[0]):
            for start in range(0, student.shape[1], step):
                chunk = (row, slice(start, start + step))
                ids = None if token_ids is None else token_ids[chunk]
                weight = mask[chunk].to(dtype)[:, None]
                total += (kl_divergence(student[chunk], teacher[chunk], temperature, ids)[:, None] * weight).sum()
                if gradient is None:
                    continue
                gradient[chunk] = kl_gradient(student[chunk], teacher[chunk], temperature, ids).mul_(weight)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output.to(gradient.dtype), None, None, None, None
