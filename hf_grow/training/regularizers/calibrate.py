"""How strong a penalty must be for a tolerated rise of the old domain's loss: found by trying.

1/2 F d^2 is no forecast: it is right for small moves only, and underestimates what training does many times over. So short trainings on the
new text are run, each from the same weights and on the same batches, and the old domain's loss is measured after each: lambda 0, then 1, 10,
100, ... until the rise is small enough, then between the last two on a log scale. Optimizer, learning rate, decay, clipping, batch and schedule
are those of the training that lambda is for, the schedule drawn together to the steps of a trial. A longer training forgets more, and the rise should be
watched there too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_grow.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

    from hf_grow.training.regularizers.penalty import QuadraticPenalty

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
    penalty: QuadraticPenalty,
    *,
    old: Tensor,
    train: Tensor,
    new: Tensor,
    tolerated: float,
    steps: int,
    how: TrainingArguments,
    refinements: int = 3,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Calibration:
    """``old``, ``new``: sequences to measure on; ``train``: sequences to train on, from the first on, again and again if need be.

    ``how``: the training that lambda is for; its batch is per_device_train_batch_size * gradient_accumulation_steps. ``penalty`` is attached; its strength is changed. The model is left as it was. Raises InputError if no lambda up to MOST is enough.
    """
    batch = how.per_device_train_batch_size
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    before = loss_on(model, old, batch), loss_on(model, new, batch)
    trials: list[Trial] = []

    def tried(strength: float) -> Trial:
        penalty.strength = strength
        _train(model, penalty, train, steps, how, progress)
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


def schedule(optimizer: torch.optim.Optimizer, how: TrainingArguments, steps: int) -> Any:
    """The training's schedule over so many steps: warm-up keeps its share."""
    from transformers import get_scheduler

    whole = how.max_steps if how.max_steps > 0 else steps
    warm = min(round(how.get_warmup_steps(whole) / whole * steps), steps - 1)
    return get_scheduler(how.lr_scheduler_type, optimizer, warm, steps, scheduler_specific_kwargs=how.lr_scheduler_kwargs)


def optimizer_for(model: PreTrainedModel, how: TrainingArguments) -> torch.optim.Optimizer:
    """As Trainer makes it, with its groups that decay and that do not."""
    from transformers import Trainer

    kind, settings = Trainer.get_optimizer_cls_and_kwargs(how, model)
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": [p for n, p in trained if (n in decayed) == d], "weight_decay": how.weight_decay * d} for d in (True, False)]
    made: torch.optim.Optimizer = kind(groups, **settings)
    return made


def _train(
    model: PreTrainedModel, penalty: QuadraticPenalty, rows: Tensor, steps: int, how: TrainingArguments, progress: Callable[[int], None]
) -> None:
    optimizer = optimizer_for(model, how)
    rates = schedule(optimizer, how, steps)
    training = model.training
    model.train()
    size, parts = how.per_device_train_batch_size, how.gradient_accumulation_steps
    for step in range(steps):
        for part in range(step * parts, (step + 1) * parts):
            ids = rows[torch.arange(part * size, (part + 1) * size) % len(rows)].to(model.device)
            (model(input_ids=ids, labels=ids, use_cache=False).loss / parts).backward()
            progress(ids.numel())
        if penalty.strength:
            penalty.add_gradient()
        if how.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), how.max_grad_norm)
        penalty.before_step()
        rate = optimizer.param_groups[0]["lr"]
        optimizer.step()
        if penalty.strength:
            penalty.after_step(rate)
        rates.step()
        optimizer.zero_grad(set_to_none=True)
    model.train(training)
