"""Decides when a stage ends. Plain numbers in, a decision with its reason out; the state is JSON, so that a resumed run decides alike.

A trigger sees every optimizer step once, in order. Every process sees the same numbers, so all come to the same decision.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_grow.errors import InputError
from hf_grow.training.config.trigger_options import Amount, Forecast, Metric, Plateau, Trigger, Until
from hf_grow.training.stages.forecast import Curve, StageGrowth


@dataclass(frozen=True)
class Observation:
    """A training after one optimizer step, counted from the beginning of its stage."""

    steps: int
    tokens: int
    flops: float
    seconds: float
    share: float = 0.0
    """Share of the whole run's budget that is spent."""
    loss: float = math.nan
    """Training loss of this step, nats per token."""
    grad_norm: float | None = None
    evaluation: Mapping[str, float] = field(default_factory=dict)
    """Where the step was evaluated: loss of each named set, forgetting, kl."""


class Condition(ABC):
    """One condition. `holds` after each `observe` says whether it is true now."""

    reason = ""
    """Why it holds, for the log."""

    @abstractmethod
    def observe(self, seen: Observation) -> bool: ...

    def state(self) -> dict[str, Any]:
        """Its memory as JSON."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:  # noqa: B027 (nothing by default)
        """Takes over what `state` gave."""

    def curve(self) -> Curve | None:
        """The loss curve of the stage, where the condition keeps it."""
        return None


class _Reached(Condition):
    """An amount is reached: any of its keys, or all."""

    def __init__(self, amount: Amount, every: bool = False) -> None:
        self.wanted = {n: getattr(amount, n) for n in Amount.model_fields if getattr(amount, n) is not None}
        self.join: Callable[[Sequence[bool]], bool] = all if every else any

    def observe(self, seen: Observation) -> bool:
        spent = {"steps": seen.steps, "tokens": seen.tokens, "flops": seen.flops, "time": seen.seconds}
        reached = [n for n, limit in self.wanted.items() if spent[n] >= limit]
        self.reason = " and ".join(f"{n} {spent[n]:.6g} of {self.wanted[n]:.6g}" for n in reached)
        return self.join([n in reached for n in self.wanted])


class _Share(Condition):
    def __init__(self, share: float) -> None:
        self.share = share

    def observe(self, seen: Observation) -> bool:
        self.reason = f"{seen.share:.1%} of the budget is spent"
        return seen.share >= self.share


class _Series(Condition):
    """Observations of a loss: means of the training loss over `every` steps, or the evaluations of a named set."""

    def __init__(self, on: str, every: int) -> None:
        self.on, self.every = on, every
        self.pending: list[float] = []
        self.held = False

    def observe(self, seen: Observation) -> bool:
        value: float | None = seen.evaluation.get(self.on)
        if self.on == "train":
            self.pending.append(seen.loss)
            value = None
            if len(self.pending) == self.every:
                value = math.fsum(self.pending) / self.every
                self.pending = []
        if value is not None and math.isfinite(value):
            self.held = self.add(value, seen)
        return self.held

    @abstractmethod
    def add(self, value: float, seen: Observation) -> bool:
        """Takes one more observation; whether the condition holds from now on."""

    def state(self) -> dict[str, Any]:
        return {"pending": self.pending, "held": self.held}

    def load(self, state: Mapping[str, Any]) -> None:
        self.pending, self.held = list(state["pending"]), state["held"]


class _Plateau(_Series):
    def __init__(self, options: Plateau) -> None:
        super().__init__(options.on, options.every)
        self.options = options
        self.best, self.waited = math.inf, 0

    def add(self, value: float, seen: Observation) -> bool:
        needed = self.options.threshold * abs(self.best) + self.options.min_delta if math.isfinite(self.best) else 0.0
        if value < self.best - needed:
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        self.reason = f"{self.on} loss {value:.4f} after {self.waited} observations without improvement on {self.best:.4f}"
        return self.waited >= self.options.patience

    def state(self) -> dict[str, Any]:
        best = self.best if math.isfinite(self.best) else None
        return {**super().state(), "best": best, "waited": self.waited}

    def load(self, state: Mapping[str, Any]) -> None:
        super().load(state)
        self.best, self.waited = math.inf if state["best"] is None else state["best"], state["waited"]


class _Metric(Condition):
    def __init__(self, options: Metric) -> None:
        self.options, self.count = options, 0

    def observe(self, seen: Observation) -> bool:
        name, o = self.options.name, self.options
        value = {"loss": seen.loss, "grad_norm": seen.grad_norm}.get(name, seen.evaluation.get(name))
        if value is not None:
            crossed = value <= o.below if o.below is not None else o.above is not None and value >= o.above
            self.count = self.count + 1 if crossed else 0
            bound = f"at most {o.below:g}" if o.below is not None else f"at least {o.above:g}"
            self.reason = f"{name} {value:.4f} is {bound}"
        return self.count >= o.patience

    def state(self) -> dict[str, Any]:
        return {"count": self.count}

    def load(self, state: Mapping[str, Any]) -> None:
        self.count = state["count"]


class _Forecast(_Series):
    """``growth``: what is known of this stage and its growth."""

    def __init__(self, options: Forecast, growth: StageGrowth) -> None:
        super().__init__(options.on, options.every)
        self.options = options
        self.forecast = growth.within(options.budget)
        self.points = Curve([], [])

    def add(self, value: float, seen: Observation) -> bool:
        self.points.add(seen.tokens, value)
        kept = self.points.without_first(self.options.skip)
        if len(kept) < self.options.min_points:
            return False
        small, grown = self.forecast.compare(kept, seen.tokens, seen.flops)
        self.reason = f"forecast at the end of the budget: {small:.4f} without growth, {grown:.4f} with it"
        return grown < small - self.options.margin

    def curve(self) -> Curve | None:
        return self.points

    def state(self) -> dict[str, Any]:
        return {**super().state(), "curve": self.points.to_json()}

    def load(self, state: Mapping[str, Any]) -> None:
        super().load(state)
        self.points = Curve.from_json(state["curve"])


class _Joined(Condition):
    """`any` or `all` of several conditions, each of which sees every step."""

    def __init__(self, members: Sequence[Condition], word: str) -> None:
        self.members, self.join = members, {"any": any, "all": all}[word]

    def observe(self, seen: Observation) -> bool:
        held = [m.observe(seen) for m in self.members]
        self.reason = "; ".join(m.reason for m, h in zip(self.members, held, strict=True) if h)
        return self.join(held)

    def state(self) -> dict[str, Any]:
        return {"members": [m.state() for m in self.members]}

    def load(self, state: Mapping[str, Any]) -> None:
        for member, saved in zip(self.members, state["members"], strict=True):
            member.load(saved)

    def curve(self) -> Curve | None:
        return next((c for m in self.members if (c := m.curve()) is not None), None)


class StageEnd(Condition):
    """`until` of a stage, with its floor and ceiling. Raises InputError for a forecast of a stage without a growth."""

    def __init__(self, options: Until, growth: StageGrowth | None = None) -> None:
        self.condition = make_condition(options, growth)
        self.floor = _Reached(options.not_before, every=True) if options.not_before is not None else None
        self.ceiling = _Reached(options.at_latest) if options.at_latest is not None else None

    def observe(self, seen: Observation) -> bool:
        held = self.condition is not None and self.condition.observe(seen)
        if self.floor is not None and not self.floor.observe(seen):
            held = False
        if held and self.condition is not None:
            self.reason = self.condition.reason
        elif self.ceiling is not None and self.ceiling.observe(seen):
            held, self.reason = True, f"at the latest: {self.ceiling.reason}"
        return held

    def state(self) -> dict[str, Any]:
        return self.condition.state() if self.condition is not None else {}

    def load(self, state: Mapping[str, Any]) -> None:
        if self.condition is not None:
            self.condition.load(state)

    def curve(self) -> Curve | None:
        return self.condition.curve() if self.condition is not None else None


def make_condition(options: Trigger, growth: StageGrowth | None = None) -> Condition | None:
    """The condition of one Trigger; None where it has none."""
    if options.any is not None or options.all is not None:
        word = "any" if options.any is not None else "all"
        made = [make_condition(o, growth) for o in (options.any or options.all or [])]
        return _Joined([m for m in made if m is not None], word)
    if options.share is not None:
        return _Share(options.share)
    if options.plateau is not None:
        return _Plateau(options.plateau)
    if options.metric is not None:
        return _Metric(options.metric)
    if options.forecast is not None:
        if growth is None:
            raise InputError(
                "forecast: the next stage does not grow, so there is nothing to forecast.", hint="Give it a `grow`, or use plateau."
            )
        return _Forecast(options.forecast, growth)
    if any(getattr(options, n) is not None for n in Amount.model_fields):
        return _Reached(options)
    return None
