"""Forecast of a loss at the end of the budget: a power law with an offset, fitted to the curve so far.

    L(D) = E + B D^-beta                            one size, D tokens
    L(N, D) = E0 + A N^-alpha + B D^-beta           (Hoffmann et al. 2022, arXiv 2203.15556, eq. 2)

The curve of one stage gives E = E0 + A N^-alpha, B and beta of its size. What a growth from N to N' lowers is A (N^-alpha - N'^-alpha); A is taken
from earlier stages, whose offsets E differ by size, and without any from the paper's fit (A = 406.4, alpha = 0.34), scaled to this curve. A grown model
begins with the loss of the small one, so it stands on its own curve where that loss is, at fewer tokens than were trained on. Both are compared at
the end of the same budget of FLOPs, which buys the grown model fewer tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

ALPHA, BETA, A_PAPER, E_PAPER = 0.34, 0.28, 406.4, 1.69
"""Hoffmann et al. 2022, approach 3."""
BETAS = np.linspace(0.05, 1.5, 146)
"""Exponents that are tried: for each, offset and factor are a linear least-squares problem."""


@dataclass
class Curve:
    """Losses by tokens trained on in a stage."""

    tokens: list[float]
    losses: list[float]

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, tokens: float, loss: float) -> None:
        self.tokens.append(float(tokens))
        self.losses.append(float(loss))

    def without_first(self, share: float) -> Curve:
        first = int(len(self) * share)
        return Curve(self.tokens[first:], self.losses[first:])

    def to_json(self) -> list[list[float]]:
        return [self.tokens, self.losses]

    @staticmethod
    def from_json(data: Sequence[Sequence[float]]) -> Curve:
        return Curve(list(data[0]), list(data[1]))


@dataclass(frozen=True)
class PowerLaw:
    """offset + factor * tokens^-exponent."""

    offset: float
    factor: float
    exponent: float

    def __call__(self, tokens: float) -> float:
        return float(self.offset + self.factor * max(tokens, 1.0) ** -self.exponent)


def fit(curve: Curve) -> PowerLaw:
    """The power law of least squared error with offset and factor that are not negative; the exponent is one of BETAS.

    A curve that does not fall gives a constant.
    """
    tokens, losses = np.asarray(curve.tokens, float), np.asarray(curve.losses, float)
    scale = float(tokens.max())
    best = (float(np.square(losses - losses.mean()).sum()), PowerLaw(float(losses.mean()), 0.0, 1.0))
    for beta in BETAS:
        falling = (tokens / scale) ** -beta
        centered = falling - falling.mean()
        spread = float(centered @ centered)
        factor = float(centered @ (losses - losses.mean())) / spread if spread > 0 else 0.0
        offset = float(losses.mean() - factor * falling.mean())
        if offset < 0:  # through the origin
            offset, factor = 0.0, float(falling @ losses) / float(falling @ falling)
        if factor <= 0:
            continue
        error = float(np.square(offset + factor * falling - losses).sum())
        if error < best[0]:
            best = (error, PowerLaw(offset, factor * scale**beta, float(beta)))
    return best[1]


@dataclass(frozen=True)
class GrowthForecast:
    """What is known of a stage and of its growth.

    Attributes:
        parameters: active parameters before and after the growth.
        flops_per_token: of training, before and after.
        budget: FLOPs left for this stage and everything after it, at the beginning of the stage.
        earlier: offset E by parameters, of earlier stages.
    """

    parameters: tuple[int, int]
    flops_per_token: tuple[float, float]
    budget: float
    earlier: Mapping[int, float] = field(default_factory=dict)

    def compare(self, curve: Curve, tokens: float, flops: float) -> tuple[float, float]:
        """Losses at the end of the budget without the growth, and with it now. ``tokens``, ``flops``: spent in this stage."""
        law = fit(curve)
        left = max(self.budget - flops, 0.0)
        now, offset = law(tokens), law.offset - self.gain(law.offset)
        small = law(tokens + left / self.flops_per_token[0])
        if law.factor > 0:
            start = ((now - offset) / law.factor) ** (-1 / law.exponent)
            grown = PowerLaw(offset, law.factor, law.exponent)
        else:  # a curve that does not fall tells no rate: the paper's
            start, grown = tokens, PowerLaw(offset, (now - offset) * tokens**BETA, BETA)
        return small, grown(start + left / self.flops_per_token[1])

    def gain(self, offset: float) -> float:
        """By how much the growth lowers the offset, nats per token."""
        before, after = self.parameters
        return self._factor(offset) * float(float(before) ** -ALPHA - float(after) ** -ALPHA)

    def _factor(self, offset: float) -> float:
        """A. From the offsets of two sizes and more, by least squares; else the paper's share of the offset that is due to size."""
        known = {**self.earlier, self.parameters[0]: offset}
        if len(known) > 1:
            sizes = np.asarray([float(n) ** -ALPHA for n in known])
            offsets = np.asarray(list(known.values()))
            centered = sizes - sizes.mean()
            return max(0.0, float(centered @ (offsets - offsets.mean())) / float(centered @ centered))
        of_size = A_PAPER * float(self.parameters[0]) ** -ALPHA
        return float(offset * of_size / (E_PAPER + of_size) * float(self.parameters[0]) ** ALPHA)


@dataclass(frozen=True)
class StageGrowth:
    """A stage and the growth at its end, for a forecast.

    Attributes:
        parameters: active parameters before and after.
        flops_per_token: of training, before and after.
        spent: FLOPs before the stage.
        earlier: curves of earlier stages, each with the active parameters of its model.
    """

    parameters: tuple[int, int]
    flops_per_token: tuple[float, float]
    spent: float
    earlier: Sequence[tuple[int, Any]] = ()

    def within(self, budget: float) -> GrowthForecast:
        """``budget``: FLOPs of the whole run."""
        return GrowthForecast(self.parameters, self.flops_per_token, budget - self.spent, offsets_by_size(self.earlier, 0.2))


def offsets_by_size(stages: Sequence[tuple[int, Any]], skip: float) -> dict[int, float]:
    """Offset E of earlier stages, each (active parameters, Curve as JSON); sizes with fewer than five points are left out."""
    found = {}
    for parameters, data in stages:
        curve = Curve.from_json(data).without_first(skip)
        if len(curve) >= 5:
            found[parameters] = fit(curve).offset
    return found
