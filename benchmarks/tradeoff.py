"""Forgetting at equal new-domain loss.

Methods learn at different speeds, so their forgetting at the end of training is not comparable. Forgetting is therefore read at the same
new-domain loss: a trajectory is the polygon through a run's evaluations (new-domain loss, rise of the old-domain loss over the source's), followed
from the start to where it first reaches that loss. The loss to compare at is the lowest of plain fine-tuning, or of the arm itself if that is
higher. The baseline is the lower convex hull of all evaluations of several plain fine-tunings (BASELINES: four learning rates, two lengths), so an
arm has to beat early stopping and lower learning rates too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

PLAIN = "fine-tuning"
BASELINES = (PLAIN, "fine-tuning, LR / 3", "fine-tuning, LR / 10", "fine-tuning, LR x 2", "fine-tuning, half the steps")
GOAL = 0.3
Run = Mapping[str, Any]
Point = tuple[float, float]


def points(run: Run, source_old: float) -> list[Point]:
    """(new-domain loss, rise of the old-domain loss) at every evaluation."""
    return [(p["new"], p["old"] - source_old) for p in run["trajectory"]]


def lowest(track: Sequence[Point]) -> float:
    return min(new for new, _ in track)


def forgetting_at(track: Sequence[Point], level: float) -> float | None:
    """The rise where the trajectory first reaches a new-domain loss of ``level``, or None if it never does."""
    for (new, rise), (later, risen) in pairwise(track):
        if new >= level >= later:
            return rise if new == later else rise + (risen - rise) * (new - level) / (new - later)
    return None


def hull(tracks: Sequence[Sequence[Point]]) -> list[Point]:
    """The lower convex hull of all points, by rising new-domain loss (Andrew 1979)."""
    out: list[Point] = []
    for new, rise in sorted({p for track in tracks for p in track}):
        while len(out) > 1 and (out[-1][0] - out[-2][0]) * (rise - out[-2][1]) <= (out[-1][1] - out[-2][1]) * (new - out[-2][0]):
            out.pop()
        out.append((new, rise))
    return out


def height(line: Sequence[Point], level: float) -> float:
    """The rise on a hull at a new-domain loss of ``level``."""
    for (new, rise), (later, risen) in pairwise(line):
        if new <= level <= later:
            return rise + (risen - rise) * (level - new) / (later - new)
    raise AssertionError(f"{level} is outside the hull")


@dataclass(frozen=True)
class Compared:
    """One run, compared with plain fine-tuning of the same seed."""

    old: float
    new: float
    rise: float
    """At the end of the training."""
    level: float
    """New-domain loss at which it is compared."""
    rise_there: float
    plain_there: float
    time: float
    """Of the whole training, relative to plain fine-tuning."""
    memory: float
    """Bytes without activations, relative to plain fine-tuning."""

    @property
    def ratio(self) -> float:
        """Forgetting relative to plain fine-tuning; infinite where that forgot nothing (`--quick`), so that it is not taken for a result."""
        return self.rise_there / self.plain_there if self.plain_there > 0 else math.inf


def compare(runs: Mapping[str, Run]) -> dict[str, Compared]:
    """Compares all runs of one seed, by arm; BASELINES must be among them."""
    plain = runs[PLAIN]
    source_old = plain["trajectory"][0]["old"]
    tracks = {name: points(run, source_old) for name, run in runs.items()}
    baseline = hull([tracks[n] for n in BASELINES])
    target = lowest(tracks[PLAIN])
    out = {}
    for name, run in runs.items():
        level = max(target, lowest(tracks[name]))
        there, plain_there = forgetting_at(tracks[name], level), height(baseline, level)
        assert there is not None
        new, rise = tracks[name][-1]
        cost = run["step_seconds"] * run["steps"] / (plain["step_seconds"] * plain["steps"])
        out[name] = Compared(source_old + rise, new, rise, level, there, plain_there, cost, memory_held(run) / memory_held(plain))
    return out


def memory_held(run: Run) -> int:
    """Bytes held during the whole training: weights, gradients, optimizer, penalty, teachers."""
    return int(sum(v for k, v in run["memory"].items() if k not in ("activations", "step", "total")))


def relative_forgetting(one: Run, other: Run) -> float | None:
    """What ``one`` forgot divided by what ``other`` forgot, at the lowest new-domain loss that both reach; None where ``other`` forgot nothing."""
    source_old = other["trajectory"][0]["old"]
    a, b = points(one, source_old), points(other, source_old)
    level = max(lowest(a), lowest(b))
    forgot, other_forgot = forgetting_at(a, level), forgetting_at(b, level)
    assert forgot is not None and other_forgot is not None
    return forgot / other_forgot if other_forgot > 0 else None
