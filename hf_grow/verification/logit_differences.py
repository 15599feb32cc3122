"""How far the logits of two models lie apart on a text, and how far rounding alone takes them.

All of it in fp64, from logits that were computed in whatever dtype: KL(old || new) summed over the vocabulary, in nats, and the norm of the logit
difference as a share of the norm of the logits, which is free of the vocabulary's size and of the logits' scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

ROWS = 64  # tokens at once: fp64 over a large vocabulary takes room


@dataclass(frozen=True)
class Difference:
    kl: float
    """KL(old || new), nats a token, mean."""
    relative: float
    """Root mean square of the logit difference over that of the logits."""
    worst: float
    """The same of the token where it is largest: what touches few tokens drowns in a mean."""

    def within(self, limit: Difference) -> bool:
        return self.kl <= limit.kl and self.relative <= limit.relative and self.worst <= limit.worst

    def times(self, factor: float) -> Difference:
        """That of a perturbation so many times as large: KL is quadratic in it."""
        return Difference(self.kl * factor**2, self.relative * factor, self.worst * factor)

    def __add__(self, other: Difference) -> Difference:
        """Bound of both perturbations together."""
        kl = (math.sqrt(self.kl) + math.sqrt(other.kl)) ** 2
        return Difference(kl, self.relative + other.relative, self.worst + other.worst)

    def __str__(self) -> str:
        return f"KL {self.kl:.2g} nats a token, logits off by {self.relative:.2g} of their size ({self.worst:.2g} at worst)"

    def to_json(self) -> dict[str, float]:
        return {"kl_nats_per_token": self.kl, "relative": self.relative, "worst": self.worst}


LEAST = Difference(1e-13, 1e-7, 1e-7)
"""No limit is below this: where a source hardly feels rounding at all, the arithmetic of these figures does."""


@dataclass(frozen=True)
class Compared:
    """Of every token: KL, squared norms of the logit difference and of the old logits; and the figures of the report."""

    kl: Tensor
    moved: Tensor
    size: Tensor
    finite: bool
    """Whether the new logits are."""
    metrics: dict[str, Any]

    def difference(self, judged: Tensor | None = None) -> Difference:
        """Over all tokens, or over those that a mask [tokens] leaves."""
        kl, moved, size = (x if judged is None else x[judged] for x in (self.kl, self.moved, self.size))
        if not len(kl):
            return Difference(0.0, 0.0, 0.0)
        each = (moved / size.clamp(min=1e-300)).sqrt()
        return Difference(float(kl.mean()), math.sqrt(float(moved.sum()) / max(float(size.sum()), 1e-300)), float(each.max()))


def compare_logits(windows: Iterable[Tensor], before: Iterable[Tensor], after: Iterable[Tensor]) -> Compared:
    """Logits [tokens, vocabulary] of the same windows of token ids, which may come one window after another."""
    import torch
    import torch.nn.functional as F

    count = predicted = 0
    loss_old = loss_new = agree = largest = spread = top = 0.0
    finite = True
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for ids, old, new in zip(windows, before, after, strict=True):
        following = torch.cat([ids[1:], ids.new_tensor([-100])])  # nothing follows the last
        for a, b, target in zip(*(torch.split(x, ROWS) for x in (old, new, following)), strict=True):
            a, b = a.double(), b.double()
            log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
            loss_old += float(F.nll_loss(log_a, target, reduction="sum"))
            loss_new += float(F.nll_loss(log_b, target, reduction="sum"))
            both = a.isfinite().all(-1) & b.isfinite().all(-1)  # two broken models do not agree
            agree += float(((a.argmax(-1) == b.argmax(-1)) & both).sum())
            moved = (a - b).abs()
            largest = max(largest, float(moved.max()))
            spread += float(moved.mean(-1).sum())
            top = max(top, float(a.abs().max()))
            finite = finite and bool(b.isfinite().all())
            parts.append(
                ((log_a.exp() * (log_a - log_b)).sum(-1).clamp(min=0), moved.square().sum(-1), a.square().sum(-1)),
            )
        count += ids.numel()
        predicted += ids.numel() - 1

    def perplexity(loss: float) -> float:
        return math.exp(min(loss / predicted, 700.0))

    kl, squared, size = (torch.cat(column) for column in zip(*parts, strict=True))
    metrics = {
        "logit_difference_max": largest,
        "logit_difference_mean": spread / count,
        "logits_max": top,
        "kl_nats_per_token": float(kl.mean()),
        "loss_old": loss_old / predicted,
        "loss_new": loss_new / predicted,
        "perplexity_old": perplexity(loss_old),
        "perplexity_new": perplexity(loss_new),
        "greedy_agreement": agree / count,
    }
    found = Compared(kl, squared, size, finite, metrics)
    overall = found.difference()
    metrics |= {"logit_error": overall.relative, "logit_error_worst": overall.worst}
    return found
