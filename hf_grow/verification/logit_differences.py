"""Measures how far the logits of two models differ on a text.

All figures are computed in fp64: KL(old || new) in nats per token, and the norm of the logit difference relative to the norm of the logits, which
depends neither on the vocabulary size nor on the scale of the logits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

ROWS = 64  # tokens at a time, to bound the memory of fp64 logits


@dataclass(frozen=True)
class LogitDifference:
    """How far the logits of two models differ; also used as an upper limit of such a difference."""

    kl: float
    """Mean KL(old || new), nats per token."""
    relative: float
    """RMS of the logit difference divided by the RMS of the logits."""
    worst: float
    """`relative` of the token where it is largest: the mean hides errors that affect few tokens."""

    def within(self, limit: LogitDifference) -> bool:
        return self.kl <= limit.kl and self.relative <= limit.relative and self.worst <= limit.worst

    def times(self, factor: float) -> LogitDifference:
        """The difference caused by a perturbation `factor` times as large; KL is quadratic in it."""
        return LogitDifference(self.kl * factor**2, self.relative * factor, self.worst * factor)

    def at_least(self, floor: LogitDifference) -> LogitDifference:
        return LogitDifference(max(self.kl, floor.kl), max(self.relative, floor.relative), max(self.worst, floor.worst))

    def __add__(self, other: LogitDifference) -> LogitDifference:
        """Upper bound for both perturbations together."""
        kl = (math.sqrt(self.kl) + math.sqrt(other.kl)) ** 2
        return LogitDifference(kl, self.relative + other.relative, self.worst + other.worst)

    def __str__(self) -> str:
        return f"KL {self.kl:.2g} nats per token, relative logit error {self.relative:.2g} ({self.worst:.2g} at worst)"

    def to_json(self) -> dict[str, float]:
        return {"kl_nats_per_token": self.kl, "relative": self.relative, "worst": self.worst}


SMALLEST_LIMIT = LogitDifference(1e-13, 1e-7, 1e-7)
"""Lower bound of every limit: the numerical error of these measures themselves."""


@dataclass(frozen=True)
class TokenDifferences:
    """Differences per token, each a float64 tensor [tokens], and the metrics of the report."""

    kl: Tensor
    squared_error: Tensor
    """Squared norm of the logit difference."""
    squared_norm: Tensor
    """Squared norm of the old logits."""
    finite: bool
    """Whether all new logits are finite."""
    metrics: dict[str, Any]

    def difference(self, mask: Tensor | None = None) -> LogitDifference:
        """Over all tokens, or over those selected by a mask [tokens]."""
        kl, error, norm = (x if mask is None else x[mask] for x in (self.kl, self.squared_error, self.squared_norm))
        if not len(kl):
            return LogitDifference(0.0, 0.0, 0.0)
        relative = (error / norm.clamp(min=1e-300)).sqrt()
        return LogitDifference(float(kl.mean()), math.sqrt(float(error.sum()) / max(float(norm.sum()), 1e-300)), float(relative.max()))


def compare_logits(windows: Iterable[Tensor], before: Iterable[Tensor], after: Iterable[Tensor]) -> TokenDifferences:
    """Compares the logits [tokens, vocab] of each window of token ids; iterators keep one window in memory at a time."""
    import torch
    import torch.nn.functional as F

    count = predicted = 0
    loss_old = loss_new = agree = largest = mean_sum = largest_old = 0.0
    finite = True
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for ids, old, new in zip(windows, before, after, strict=True):
        following = torch.cat([ids[1:], ids.new_tensor([-100])])  # no label for the last token
        for a, b, target in zip(*(torch.split(x, ROWS) for x in (old, new, following)), strict=True):
            a, b = a.double(), b.double()
            log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
            loss_old += float(F.nll_loss(log_a, target, reduction="sum"))
            loss_new += float(F.nll_loss(log_b, target, reduction="sum"))
            both = a.isfinite().all(-1) & b.isfinite().all(-1)  # NaN rows do not count as agreement
            agree += float(((a.argmax(-1) == b.argmax(-1)) & both).sum())
            error = (a - b).abs()
            largest = max(largest, float(error.max()))
            mean_sum += float(error.mean(-1).sum())
            largest_old = max(largest_old, float(a.abs().max()))
            finite = finite and bool(b.isfinite().all())
            kl = (log_a.exp() * (log_a - log_b)).sum(-1).clamp(min=0)
            parts.append((kl, error.square().sum(-1), a.square().sum(-1)))
        count += ids.numel()
        predicted += ids.numel() - 1

    def perplexity(loss: float) -> float:
        return math.exp(min(loss / predicted, 700.0))

    kl, squared_error, squared_norm = (torch.cat(column) for column in zip(*parts, strict=True))
    metrics = {
        "logit_difference_max": largest,
        "logit_difference_mean": mean_sum / count,
        "logits_max": largest_old,
        "kl_nats_per_token": float(kl.mean()),
        "loss_old": loss_old / predicted,
        "loss_new": loss_new / predicted,
        "perplexity_old": perplexity(loss_old),
        "perplexity_new": perplexity(loss_new),
        "greedy_agreement": agree / count,
    }
    differences = TokenDifferences(kl, squared_error, squared_norm, finite, metrics)
    overall = differences.difference()
    metrics |= {"logit_error": overall.relative, "logit_error_worst": overall.worst}
    return differences
