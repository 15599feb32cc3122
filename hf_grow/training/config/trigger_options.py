"""What ends a stage of a training (`stages.until`)."""

from __future__ import annotations

import re
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from hf_grow.options import Count, Options
from hf_grow.training.config.schedules import Positive, Share

_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_duration(value: Any) -> Any:
    """'90m' -> 5400.0; s, m, h, d; plain numbers are seconds. Raises ValueError."""
    if not isinstance(value, str):
        return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
    match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*([smhd]?)\s*", value)
    if not match:
        raise ValueError(f"{value!r} is not a duration; write 90m, 2h, 1d or a number of seconds")
    return float(match[1]) * _SECONDS[match[2]]


def parse_flops(value: Any) -> Any:
    """'1e18' -> 1e18: YAML reads 1e18 as a string. Raises ValueError."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            raise ValueError(f"{value!r} is not a number of FLOPs; write 1.0e+18") from None
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


Duration = Annotated[float, BeforeValidator(parse_duration), Field(gt=0)]
Flops = Annotated[float, BeforeValidator(parse_flops), Field(gt=0)]


class Amount(Options):
    """An amount of training since the beginning of the stage. Of several keys, the first to be reached counts."""

    steps: Positive | None = None
    """Optimizer steps."""
    tokens: Count | None = None
    """Tokens trained on, over all processes, as 50M."""
    flops: Flops | None = None
    """FLOPs of training, over all processes."""
    time: Duration | None = None
    """Wall time, as 90m or 2h."""

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if all(getattr(self, n) is None for n in type(self).model_fields if n != "not_before"):
            raise ValueError(f"is empty; give {', '.join(type(self).model_fields)}")
        return self


class Plateau(Options):
    """A loss that no longer falls: `patience` observations in a row, none of which improves on the best by the threshold."""

    on: str = "train"
    """train, the training loss, or the name of a set of data.eval."""
    every: Positive = 50
    """Steps whose mean training loss is one observation; of a named set, every evaluation is one."""
    patience: Positive = 3
    """Observations without improvement."""
    threshold: Annotated[float, Field(ge=0, lt=1)] = 0.005
    """Relative improvement on the best loss that counts."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """Absolute improvement that counts, in nats per token, beyond the relative one."""


class Metric(Options):
    """A metric that crosses a value."""

    name: str
    """loss (training), grad_norm, or a metric of the evaluations: the name of a set (its loss), forgetting, kl."""
    below: float | None = None
    """The metric is at most this."""
    above: float | None = None
    """The metric is at least this."""
    patience: Positive = 1
    """Observations in a row."""

    @model_validator(mode="after")
    def _one_side(self) -> Self:
        if (self.below is None) == (self.above is None):
            raise ValueError("needs either below or above")
        return self


class Forecast(Options):
    """The grown model, trained to the end of the budget, is forecast to be better than this one trained to it."""

    budget: Flops
    """FLOPs of training that the whole run may take."""
    on: str = "train"
    """train, or the name of a set of data.eval."""
    every: Positive = 50
    """Steps whose mean training loss is one point of the curve."""
    min_points: Annotated[int, Field(ge=5)] = 8
    """Points of the curve before a forecast is made."""
    margin: Annotated[float, Field(ge=0)] = 0.0
    """Nats per token by which the grown model must be better."""
    skip: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """First share of the stage's points to leave out: warm-up, and what a growth disturbed."""


class Trigger(Amount):
    """One condition, or several joined by `any` or `all`."""

    share: Share | None = None
    """Share of the whole run's budget that is spent, 0 to 1."""
    plateau: Plateau | None = None
    """The loss no longer falls; {} takes the defaults."""
    metric: Metric | None = None
    """A metric crosses a value."""
    forecast: Forecast | None = None
    """The growth to the next stage is forecast to pay within a budget of FLOPs."""
    any: list[Trigger] | None = None
    """One of these holds."""
    all: list[Trigger] | None = None
    """All of these hold at the same time."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = [n for n in self.model_fields_set if n not in ("not_before", "at_latest") and getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(f"has {' and '.join(sorted(given))}; join them with any or all")
        if self.any == [] or self.all == []:
            raise ValueError("any and all need conditions")
        return self


class Until(Trigger):
    """What ends a stage, with a floor and a ceiling."""

    not_before: Amount | None = None
    """The stage lasts at least this long: all of its keys."""
    at_latest: Amount | None = None
    """The stage ends here, whatever the condition says: the first of its keys."""
