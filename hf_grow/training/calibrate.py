"""How strong a penalty must be for a tolerated rise of the old domain's loss: found by trying.

1/2 F d^2 is no forecast: it is right for small moves only, and underestimates what training does many times over. So short trainings on the
new text are run, each from the same weights and on the same batches, and the old domain's loss is measured after each: lambda 0, then 1, 10,
100, ... until the rise is small enough, then between the last two on a log scale. The answer holds for as many steps at this learning rate;
a longer training forgets more, and the rise should be watched there too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_grow.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_grow.training.regularizers import Quadratic

MOST = 1e6
"""Largest lambda tried."""


@dataclass(frozen=True)
class Trial:
    """What one training came to; losses in nats a token."""

    strength: float
    old: float
    new: float
    rise: float
    """Of the old domain's loss, from before the training."""
    forecast: float
    """What 1/2 sum F d^2 makes of the move: the rise, if the move were small."""


@dataclass(frozen=True)
class Calibration:
    trials: tuple[Trial, ...]
    """In the order in which they were run; the first is without a penalty."""
    chosen: float
    """The smallest lambda tried whose rise is tolerated."""
    old: float
    """Losses before any training."""
    new: float


def calibrate(
    model: PreTrainedModel,
    penalty: Quadratic,
    *,
    old: Tensor,
    train: Tensor,
    new: Tensor,
    tolerated: float,
    steps: int,
    lr: float,
    batch: int,
    refinements: int = 3,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Calibration:
    """``old``, ``new``: sequences to measure on; ``train``: sequences to train on, from the first on, again and again if need be.

    ``penalty`` is attached; its strength is changed. The model is left as it was. Raises InputError if no lambda up to MOST is enough.
    """
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    before = loss_on(model, old, batch), loss_on(model, new, batch)
    trials: list[Trial] = []

    def tried(strength: float) -> Trial:
        penalty.strength = strength
        _train(model, penalty, train, steps, lr, batch, progress)
        after = loss_on(model, old, batch), loss_on(model, new, batch)
        penalty.strength = 1.0
        forecast = penalty.value()
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.copy_(start[n])
        trial = Trial(strength, *after, after[0] - before[0], forecast)
        trials.append(trial)
        return trial

    if tried(0.0).rise <= tolerated:
        return Calibration(tuple(trials), 0.0, *before)
    too_weak, enough = 0.1, 1.0
    while not tried(enough).rise <= tolerated:
        too_weak, enough = enough, 10 * enough
        if enough > MOST:
            raise InputError(
                f"Even lambda {too_weak:g} leaves a rise of {trials[-1].rise:.3f} nats; {tolerated:g} cannot be had from this Fisher.",
                hint="Mix in old text (replay), lower the learning rate, or estimate the Fisher on more text.",
            )
    for _ in range(refinements):
        middle = math.sqrt(too_weak * enough)
        if tried(middle).rise <= tolerated:
            enough = middle
        else:
            too_weak = middle
    return Calibration(tuple(trials), enough, *before)


@torch.no_grad()
def loss_on(model: PreTrainedModel, rows: Tensor, batch: int) -> float:
    """Mean loss over sequences of equal length, in nats a token."""
    training = model.training
    model.eval()
    total = 0.0
    for part in rows.split(batch):  # type: ignore[no-untyped-call]
        ids = part.to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum"))
    model.train(training)
    return total / (len(rows) * (rows.shape[1] - 1))


def _train(
    model: PreTrainedModel, penalty: Quadratic, rows: Tensor, steps: int, lr: float, batch: int, progress: Callable[[int], None]
) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    training = model.training
    model.train()
    warmup = max(1, steps // 10)
    for step in range(steps):
        rate = lr * min(1.0, (step + 1) / warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids = rows[torch.arange(step * batch, (step + 1) * batch) % len(rows)].to(model.device)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        if penalty.strength:
            penalty.add_gradient()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        penalty.before_step()
        optimizer.step()
        if penalty.strength:
            penalty.after_step(rate)
        optimizer.zero_grad(set_to_none=True)
        progress(ids.numel())
    model.train(training)
