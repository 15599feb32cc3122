"""Cross entropy and distillation in chunks of tokens: the logits of a batch are never held, neither the model's nor a teacher's.

    forward     in the place of the head, for each chunk of hidden states: logits of the model and of each teacher, the loss, and at once its gradient
                with respect to the hidden states and to the head's parameters; the logits are freed
    backward    those gradients, times that of the loss

It runs inside the forward of the model's own head module, so that FSDP2 and DDP see the head as always: gathered before, its gradients reduced after.
Logits are those of the model's own code, whatever it does to them after the head (`finish`). Gradients of 16-bit parameters are added up in fp32.
Loss and gradients are those of the formula over all logits, up to the order of sums. A second backward pass over the same loss is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hf_grow.training.distillation.head import Head
from hf_grow.training.distillation.kl_divergence import kl_divergence, kl_gradient

if TYPE_CHECKING:
    from hf_grow.training.distillation.distill import Distiller

CHUNK = 1 << 25
"""Logits per chunk: 128 MB in fp32 for each of about four tensors."""


@contextmanager
def chunked_loss(
    head: Head,
    labels: Tensor,
    tokens: Tensor | int | float | None,
    *,
    distiller: Distiller | None = None,
    input_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    scale: float = 1.0,
) -> Iterator[None]:
    """Inside, a forward pass of the model with labels returns this loss, and no logits.

    Args:
        head: of the model.
        labels: [B, L], as the model gets them; -100 is no label.
        tokens: divisor; None takes the number of labels.
        distiller: (1 - alpha) CE + alpha T^2 KL instead of CE.
        input_ids, position_ids: what its teachers read.
        scale: what a GradScaler multiplies the loss by; gradients in half precision are computed at that scale.
    """
    following = nn.functional.pad(labels[:, 1:], (0, 1), value=-100).flatten()
    positions = (following != -100).nonzero()[:, 0]
    divisor = max(1, len(positions)) if tokens is None else tokens
    found: list[Tensor] = []
    with ExitStack() as open_teachers:
        teachers: list[tuple[float, Callable[[Tensor], tuple[Tensor, Tensor | None]]]] = []
        if distiller is not None:
            assert input_ids is not None
            teachers = [(w, open_teachers.enter_context(t.in_chunks(input_ids, position_ids))) for w, t in distiller.teachers]

        def loss_and_gradient(logits: Tensor, chosen: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
            """Summed over the positions ``chosen``."""
            z, target = logits.to(torch.promote_types(logits.dtype, torch.float32)), following[chosen].to(logits.device)[:, None]
            alpha = 0.0 if distiller is None else distiller.alpha
            loss, gradient = z.new_zeros(()), torch.zeros_like(z) if wanted else z
            if alpha < 1:
                log_q = z.log_softmax(-1)
                loss -= (1 - alpha) * log_q.gather(-1, target).sum()
                if wanted:
                    gradient = log_q.exp_().mul_(1 - alpha)
                    gradient.scatter_add_(-1, target, gradient.new_full((), alpha - 1).expand_as(target))
                del log_q
            for weight, teacher in teachers:
                assert distiller is not None
                targets, ids = teacher(chosen)
                loss += alpha * weight * kl_divergence(z, targets, distiller.temperature, ids).sum()
                if wanted:
                    gradient.add_(kl_gradient(z, targets, distiller.temperature, ids), alpha=alpha * weight)
                del targets, ids
            return loss, gradient

        def instead(hidden: Tensor) -> Tensor:
            parameters = [p for p in head.module.parameters() if p.requires_grad]
            apply: Callable[..., Tensor] = _HeadLoss.apply
            found.append(apply(hidden, head, positions, divisor, scale, loss_and_gradient, *parameters))
            return found[-1]

        replaced_function = vars(head.model).get("_loss_function")
        head.model.loss_function = lambda *_, **__: found[-1].sum()
        try:
            with head.replaced(instead):
                yield
        finally:
            if replaced_function is None:
                del head.model._loss_function
            else:
                head.model.loss_function = replaced_function


class _HeadLoss(torch.autograd.Function):
    """Hidden states [B, L, H] to the loss, [1, 1, 1] as if it were logits: FSDP2 watches for the gradient of what the head returns."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Head, positions: Tensor, divisor: Any, scale: float, compute: Any, *parameters: nn.Parameter
    ) -> Tensor:
        wanted = any(ctx.needs_input_grad)
        flat = hidden.detach().flatten(0, -2)
        total = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        of_hidden = torch.zeros_like(flat) if wanted else flat
        sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters] if wanted else []
        step = max(1, CHUNK // head.model.config.vocab_size)
        for chosen in torch.split(positions, step):
            h = flat[chosen].requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                logits = head.logits(h)
            loss, gradient = compute(logits.detach(), chosen, wanted)
            total += loss / divisor
            if not wanted:
                continue
            gradient = gradient.mul_(scale).div_(divisor).to(logits.dtype)
            with torch.autocast(hidden.device.type, enabled=False):
                of_h, *of_parameters = torch.autograd.grad(logits, [h, *parameters], gradient)
            del logits, gradient
            of_hidden[chosen] = of_h
            for held, part in zip(sums, of_parameters, strict=True):
                held += part
            del of_parameters
        if wanted:
            ctx.scale = scale
            of_all = [held.to(p.dtype) for held, p in zip(sums, parameters, strict=True)]
            ctx.save_for_backward(of_hidden.view_as(hidden), *of_all)
        return total.reshape(1, 1, 1).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        factor = grad_output.reshape(()) / ctx.scale
        scaled: Sequence[Tensor] = [
            saved.mul_(factor.to(saved.dtype)) for saved in ctx.saved_tensors
        ]  # in place: they are as large as the head
        of_hidden, *of_parameters = scaled
        return of_hidden, None, None, None, None, None, *of_parameters
