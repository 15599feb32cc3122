"""Training monitor after a growth: spikes of loss and gradient norm, the loss jump of the growth, and the reactions to them.

A signal is compared with its own recent past by a robust z-score, (x - expected) / (1.4826 MAD): medians, which one earlier spike does not move,
around the resistant line through the medians of both halves of the past, because otherwise the trend of a falling loss would count as spread. The
monitor works on plain numbers: the trainer passes it each step, carries out the reactions it returns, and saves its state in every checkpoint.
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
_DETECTION_KEYS = ("before", "shocked", "recovered", "quiet_until")
_REACTION_KEYS = ("lr_factor", "dip", "dipped_at", "extra_warmup", "warmup_from", "reactions")
"""Keys of the state in a checkpoint."""


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
        findings = self._check_growth(since, loss)
        instability = self._check_instability(since, loss, norm)
        if instability is None:
            self.losses.append(loss)
            if norm is not None:
                self.norms.append(norm)
            return findings
        self.quiet_until = since + self.options.window // 2
        if math.isfinite(loss):
            self.losses.append(loss)
        return [*findings, instability]

    def _check_growth(self, since: int, loss: float) -> list[Finding]:
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

    def _check_instability(self, since: int, loss: float, norm: float | None) -> Finding | None:
        for signal, value in (("loss", loss), ("grad_norm", norm)):
            if value is not None and not math.isfinite(value):
                return Finding("instability", {"signal": "nonfinite", "value": value, "score": math.inf, "of": signal})
        if since < self.quiet_until:
            return None
        min_samples = self.options.window // 4
        for signal, value, past in (("loss", loss, self.losses), ("grad_norm", norm, self.norms)):
            if value is None or len(past) < min_samples:
                continue
            score = robust_z(value, past)
            if score > self.options.threshold:
                return Finding("instability", {"signal": signal, "value": value, "score": score})
        if len(self.losses) == self.options.window:
            recent, earlier = [*list(self.losses)[-min_samples + 1 :], loss], list(self.losses)[:-min_samples]
            # The trend of a falling loss does not count as variance.
            ratio = pvariance(detrended(recent)) / max(pvariance(detrended(earlier)), (FLOOR * median(earlier)) ** 2)
            if ratio > self.options.variance:
                return Finding("instability", {"signal": "variance", "value": ratio, "score": ratio})
        return None

    def lr_factor_at(self, since: int) -> float:
        """The learning-rate factor of step number `since` the growth."""
        steps = self.options.restore_steps
        recovered = min(max(since - self.dipped_at, 0) / steps, 1.0) if steps else 0.0
        return self.lr_factor * (self.dip + (1 - self.dip) * recovered)

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
            self.dip = self.lr_factor_at(since) / self.lr_factor * self.options.lr_factor
            self.dipped_at = since + 1 - back
        if action == "longer_warmup":
            self.extra_warmup += self.options.extra_warmup
            self.warmup_from = since + 1
        target = {"checkpoint": checkpoint, "skipped": back} if action == "rollback" else {"checkpoint": "", "skipped": 0}
        factor = self.lr_factor * (self.dip if action == "rollback" else 1.0)
        return Finding("reaction", {"action": action, "lr_factor": factor, "extra_warmup": self.extra_warmup, **target})

    def state(self) -> dict[str, Any]:
        """The state as JSON, for a checkpoint. Floats are exact."""
        detection = {k: getattr(self, k) for k in _DETECTION_KEYS}
        return {"losses": list(self.losses), "norms": list(self.norms), **detection, **self.reaction_state()}

    def reaction_state(self) -> dict[str, Any]:
        """The part of the state that a rollback must keep."""
        return {k: getattr(self, k) for k in _REACTION_KEYS}

    def load(self, state: dict[str, Any]) -> None:
        for key in (*_DETECTION_KEYS, *_REACTION_KEYS):
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
