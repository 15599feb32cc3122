"""Training monitor after a growth: spikes of loss and gradient norm, the loss jump of the growth, and the reactions to them.

A signal is compared with its own recent past by a robust z-score, (x - expected) / (1.4826 MAD): medians, which one earlier spike does not move,
around the resistant line through the medians of both halves of the past, because a loss that falls fast has no other spread. Plain numbers only: the trainer feeds it one step after another and carries out what it asks for, and its state goes into every checkpoint.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, median, pvariance
from typing import Any

from hf_grow.training.config.monitor_options import Action, MonitorOptions

FLOOR = 0.01
"""Lower bound of the deviation, as a share of the median: a very steady run must not report every fluctuation as a spike."""


@dataclass
class Finding:
    """An event for the log: its name and keys."""

    event: str
    facts: dict[str, Any]


@dataclass
class Monitor:
    """State of the monitor. `before`: training loss before the growth, if known."""

    options: MonitorOptions
    before: float | None = None
    losses: deque[float] = field(init=False)
    norms: deque[float] = field(init=False)
    lr_factor: float = 1.0
    """Factor of lower_lr reactions; permanent."""
    dip: float = 1.0
    """Factor of the last rollback, at its step."""
    dipped_at: int = 0
    """Steps since the growth at the checkpoint of the last rollback."""
    extra_warmup: int = 0
    warmup_from: int = 0
    """Step since the growth at which the last warm-up of new parameters began."""
    reactions: int = 0
    shocked: bool = False
    recovered: bool = False
    quiet_until: int = 0
    """Steps before spikes are detected again after an instability: the window is not representative."""

    def __post_init__(self) -> None:
        self.losses, self.norms = deque(maxlen=self.options.window), deque(maxlen=self.options.window)

    def step(self, since: int, loss: float, norm: float | None) -> list[Finding]:
        """Records step number `since` the growth (from 0) and returns the events to log. An `instability` requires a reaction."""
        found = self._growth(since, loss)
        unstable = self._unstable(since, loss, norm)
        if unstable is None:
            self.losses.append(loss)
            if norm is not None:
                self.norms.append(norm)
            return found
        self.quiet_until = since + self.options.window // 2
        if math.isfinite(loss):
            self.losses.append(loss)
        return [*found, unstable]

    def _growth(self, since: int, loss: float) -> list[Finding]:
        if self.before is None or self.recovered:
            return []
        if not self.shocked and since < self.options.window and loss > self.before + self.options.shock:
            self.shocked = True
            return [Finding("transition_shock", {"loss": loss, "before": self.before, "nats": loss - self.before})]
        recent = [*list(self.losses)[-7:], loss]
        if since >= 7 and len(recent) == 8 and fmean(recent) <= self.before:
            self.recovered = True
            return [Finding("recovered", {"loss": fmean(recent), "steps": since + 1})]
        return []

    def _unstable(self, since: int, loss: float, norm: float | None) -> Finding | None:
        for signal, value in (("loss", loss), ("grad_norm", norm)):
            if value is not None and not math.isfinite(value):
                return Finding("instability", {"signal": "nonfinite", "value": value, "score": math.inf, "of": signal})
        if since < self.quiet_until:
            return None
        enough = self.options.window // 4
        for signal, value, past in (("loss", loss, self.losses), ("grad_norm", norm, self.norms)):
            if value is None or len(past) < enough:
                continue
            score = robust_z(value, past)
            if score > self.options.threshold:
                return Finding("instability", {"signal": signal, "value": value, "score": score})
        if len(self.losses) == self.options.window:
            recent, past_ = [*list(self.losses)[-enough + 1 :], loss], list(self.losses)[:-enough]
            # The trend of a falling loss is no variance.
            ratio = pvariance(detrended(recent)) / max(pvariance(detrended(past_)), (FLOOR * median(past_)) ** 2)
            if ratio > self.options.variance:
                return Finding("instability", {"signal": "variance", "value": ratio, "score": ratio})
        return None

    def rate(self, since: int) -> float:
        """The learning-rate factor of step number `since` the growth."""
        steps = self.options.restore_steps
        done = min(max(since - self.dipped_at, 0) / steps, 1.0) if steps else 0.0
        return self.lr_factor * (self.dip + (1 - self.dip) * done)

    def react(self, since: int, checkpoint: str | None, back: int = 0) -> Finding:
        """Chooses the reaction to an instability in step number `since` the growth (from 0); the caller performs a rollback, by `back` steps.

        Without a checkpoint a rollback becomes lower_lr.
        """
        action: Action = self.options.on_instability
        if self.reactions >= self.options.max_reactions:
            action = "none"
        if action == "rollback" and checkpoint is None:
            action = "lower_lr"
        if action != "none":
            self.reactions += 1
        if action == "lower_lr":
            self.lr_factor *= self.options.lr_factor
        if action == "rollback":
            self.dip = self.rate(since) / self.lr_factor * self.options.lr_factor
            self.dipped_at = since + 1 - back
        if action == "longer_warmup":
            self.extra_warmup += self.options.extra_warmup
            self.warmup_from = since + 1
        place = {"checkpoint": checkpoint, "skipped": back} if action == "rollback" else {"checkpoint": "", "skipped": 0}
        factor = self.lr_factor * (self.dip if action == "rollback" else 1.0)
        return Finding("reaction", {"action": action, "lr_factor": factor, "extra_warmup": self.extra_warmup, **place})

    def state(self) -> dict[str, Any]:
        """The state as JSON, for a checkpoint. Floats are exact."""
        return {
            "before": self.before, "losses": list(self.losses), "norms": list(self.norms), "shocked": self.shocked, "recovered": self.recovered,
            "quiet_until": self.quiet_until, **self.reacted(),
        }  # fmt: skip

    def reacted(self) -> dict[str, Any]:
        """The part of the state that a rollback must keep."""
        return {k: getattr(self, k) for k in ("lr_factor", "dip", "dipped_at", "extra_warmup", "warmup_from", "reactions")}

    def load(self, state: dict[str, Any]) -> None:
        for key in (
            "before",
            "shocked",
            "recovered",
            "quiet_until",
            "lr_factor",
            "dip",
            "dipped_at",
            "extra_warmup",
            "warmup_from",
            "reactions",
        ):
            if key in state:
                setattr(self, key, state[key])
        self.losses = deque(state.get("losses", ()), maxlen=self.options.window)
        self.norms = deque(state.get("norms", ()), maxlen=self.options.window)


def robust_z(value: float, past: Sequence[float] | deque[float]) -> float:
    """How many robust deviations `value` lies above what `past` lets expect next; 1.4826 makes the MAD of a normal sample its standard deviation."""
    values = list(past)
    n, half = len(values), len(values) // 2
    slope = (median(values[n - half :]) - median(values[:half])) / (n - half)
    level = median(v - slope * i for i, v in enumerate(values))
    expected = level + slope * n
    spread = 1.4826 * median(abs(v - slope * i - level) for i, v in enumerate(values))
    return (value - expected) / max(spread, FLOOR * abs(expected), 1e-12)


def detrended(values: Sequence[float]) -> list[float]:
    """Values minus their least-squares line."""
    n = len(values)
    centre, mean = (n - 1) / 2, fmean(values)
    slope = sum((i - centre) * v for i, v in enumerate(values)) / max(sum((i - centre) ** 2 for i in range(n)), 1e-12)
    return [v - mean - slope * (i - centre) for i, v in enumerate(values)]
