"""Ends the training of a stage when its trigger says so."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hf_grow.training.config.trigger_options import Trigger, Until
from hf_grow.training.stages.forecast import Curve, StageGrowth
from hf_grow.training.stages.triggers import Observation, StageEnd


@dataclass(frozen=True)
class Spent:
    """What a run has spent: since its beginning, over all processes."""

    step: int = 0
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class StageStop:
    """A `StopCondition` of the trainer.

    ``start``: what was spent before the stage. ``max_steps``: of the whole run. ``at_least``: steps of the stage before which it does not end,
    whatever its trigger says: while new blocks blend in, the stored model is not the trained one.
    """

    def __init__(
        self, until: Until | None, start: Spent, tokens_per_step: int, max_steps: int, growth: StageGrowth | None = None, at_least: int = 0
    ) -> None:
        self.start, self.tokens_per_step, self.max_steps = start, tokens_per_step, max_steps
        self.end = StageEnd(until, growth) if until is not None else None
        self.reason, self.at_least = "", at_least
        self._uses_time = until is not None and _uses(until, "time")
        self.uses_flops = until is not None and (_uses(until, "flops") or _uses(until, "forecast"))
        self._seconds, self._since = 0.0, time.monotonic()

    def seconds(self) -> float:
        """Wall time of this stage, also before it was interrupted."""
        return self._seconds + time.monotonic() - self._since

    def tokens(self, step: int) -> int:
        """Of the whole run, after a step of this stage."""
        return self.start.tokens + (step - self.start.step) * self.tokens_per_step

    def spent(self, step: int, flops: float) -> Spent:
        """What the run has spent after a step of this stage."""
        return Spent(step, self.tokens(step), flops, self.start.seconds + self.seconds())

    def observe(self, *, step: int, flops: float, loss: float, grad_norm: float | None, evaluation: Mapping[str, float]) -> bool:
        """After an optimizer step, once. Whether the stage ends here; every process gets the same answer."""
        if self.end is None:
            return False
        steps = step - self.start.step
        seen = Observation(
            steps, steps * self.tokens_per_step, flops - self.start.flops, self._common_seconds(), step / self.max_steps, loss, grad_norm,
            evaluation,
        )  # fmt: skip
        if not self.end.observe(seen) or steps < self.at_least:
            return False
        self.reason = self.end.reason
        return True

    def _common_seconds(self) -> float:
        """The first process's clock."""
        if not self._uses_time:
            return 0.0
        from accelerate.utils import broadcast_object_list

        return float(broadcast_object_list([self.seconds()])[0])

    def curve(self) -> Curve | None:
        """The loss curve of the stage, where its trigger keeps it."""
        return self.end.curve() if self.end is not None else None

    def state(self) -> dict[str, Any]:
        return {"seconds": self.seconds(), "reason": self.reason, "end": self.end.state() if self.end is not None else {}}

    def load(self, state: Mapping[str, Any]) -> None:
        self._seconds, self._since = float(state["seconds"]), time.monotonic()
        self.reason = str(state["reason"])
        if self.end is not None:
            self.end.load(state["end"])


def _uses(options: Trigger, key: str) -> bool:
    """Whether a key is set, here or in what belongs to it."""
    parts = [options, getattr(options, "not_before", None), getattr(options, "at_latest", None)]
    return any(getattr(p, key, None) is not None for p in parts) or any(_uses(o, key) for o in (*(options.any or ()), *(options.all or ())))
