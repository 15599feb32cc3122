"""Forgetting at equal new-domain loss, as a table and a plot.

Methods learn at different speeds, so their forgetting at the end of a training does not compare. Here it is read off where the new-domain loss is
the same: a trajectory is a polygon through its evaluations (new-domain loss, rise of the old-domain loss over the source's), followed from the
start to where it first reaches that loss. The loss to compare at is the one that plain fine-tuning reaches, or, for an arm that does not get
there, the lowest that it reaches itself. The yardstick is the lower convex hull of everything that plain fine-tunings went through (YARDSTICK: four
learning rates, two lengths), so stopping early, learning slower and whatever lies between is beaten as well, not only one setting.
"""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from arms import ARMS
from measure import machine
from stage import Settings

from hf_grow.convert.metadata import versions

PLAIN = "fine-tuning"
YARDSTICK = (PLAIN, "fine-tuning, LR / 3", "fine-tuning, LR / 10", "fine-tuning, LR x 2", "fine-tuning, half the steps")
GOAL = 0.3
Run = Mapping[str, Any]
Point = tuple[float, float]


def points(run: Run, source_old: float) -> list[Point]:
    """(new-domain loss, rise of the old-domain loss) at every evaluation."""
    return [(p["new"], p["old"] - source_old) for p in run["trajectory"]]


def lowest(track: Sequence[Point]) -> float:
    return min(new for new, _ in track)


def forgotten(track: Sequence[Point], level: float) -> float | None:
    """The rise where the trajectory first reaches a new-domain loss of `level`; None if it never does."""
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
    """The rise on a hull at a new-domain loss within it."""
    for (new, rise), (later, risen) in pairwise(line):
        if new <= level <= later:
            return rise + (risen - rise) * (level - new) / (later - new)
    raise AssertionError(f"{level} is outside the hull")


@dataclass(frozen=True)
class Compared:
    """One run beside the others of its seed."""

    old: float
    new: float
    rise: float
    """At the end of the training."""
    level: float
    """New-domain loss at which it is compared."""
    rise_there: float
    plain_there: float
    time: float
    """Of the whole training, plain fine-tuning's being 1."""
    memory: float
    """Bytes without activations, likewise."""

    @property
    def ratio(self) -> float:
        """Infinite where plain fine-tuning has forgotten nothing (`--quick`), so that nobody takes it for a result."""
        return self.rise_there / self.plain_there if self.plain_there > 0 else math.inf


def compare(runs: Mapping[str, Run]) -> dict[str, Compared]:
    """All runs of one seed by arm; the yardsticks are among them."""
    plain = runs[PLAIN]
    source_old = plain["trajectory"][0]["old"]
    tracks = {name: points(run, source_old) for name, run in runs.items()}
    yardstick = hull([tracks[n] for n in YARDSTICK])
    aim = lowest(tracks[PLAIN])
    out = {}
    for name, run in runs.items():
        level = max(aim, lowest(tracks[name]))
        there, plain_there = forgotten(tracks[name], level), height(yardstick, level)
        assert there is not None
        new, rise = tracks[name][-1]
        cost = run["step_seconds"] * run["steps"] / (plain["step_seconds"] * plain["steps"])
        out[name] = Compared(source_old + rise, new, rise, level, there, plain_there, cost, held(run) / held(plain))
    return out


def held(run: Run) -> int:
    """Bytes that are held all the time: weights, gradients, optimizer, penalty, teachers."""
    return int(sum(v for k, v in run["memory"].items() if k not in ("activations", "total")))


def beside(one: Run, other: Run) -> float | None:
    """What one has forgotten over what the other has, at the lowest new-domain loss that both reach; None where that one has forgotten nothing."""
    source_old = other["trajectory"][0]["old"]
    a, b = points(one, source_old), points(other, source_old)
    level = max(lowest(a), lowest(b))
    mine, its = forgotten(a, level), forgotten(b, level)
    assert mine is not None and its is not None
    return mine / its if its > 0 else None


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean and, of several, the standard deviation."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


COLUMNS = (
    "", "old text", "seeds", "old loss", "new loss", "forgetting", "compared at", "forgetting there", "x plain", "least to most", "time", "memory",
)  # fmt: skip


def cells(seeds: Mapping[int, Mapping[str, Compared]], names: Sequence[str]) -> list[tuple[str, ...]]:
    out: list[tuple[str, ...]] = []
    for name in names:
        found = [c[name] for c in seeds.values() if name in c]
        ratios = [c.ratio for c in found]
        out.append((
            name, "yes" if ARMS[name].old_data else "no", str(len(found)), spread([c.old for c in found]), spread([c.new for c in found]),
            spread([c.rise for c in found]), f"{statistics.fmean(c.level for c in found):.3f}", spread([c.rise_there for c in found]),
            f"**{statistics.fmean(ratios):.2f}**" if statistics.fmean(ratios) <= GOAL else f"{statistics.fmean(ratios):.2f}",
            f"{min(ratios):.2f} to {max(ratios):.2f}",
            f"{statistics.median(c.time for c in found):.2f}", f"{statistics.fmean(c.memory for c in found):.2f}",
        ))  # fmt: skip
    return out


PAIRS = (
    ("EWC 1", PLAIN), ("EWC 10", PLAIN), ("EWC 10", "L2-SP 10"), ("EWC 100", "SI 1"), ("EWC 100", "distillation 0.5"),
    ("EWC 10, Fisher on sampled text", "EWC 10"), ("EWC 10 + replay 5 %", "replay 5 %"), ("EWC 10 + self-replay 5 %", "self-replay 5 %"),
    ("EWC 10 + self-replay 25 %", "self-replay 25 %"), ("self-replay 5 %", "replay 5 %"), ("depth: fine-tuning", PLAIN),
    ("depth: EWC 10", "EWC 10"), ("depth: EWC 10, inherited only", "depth: EWC 10"), ("width: fine-tuning", PLAIN),
    ("width: EWC 10, collapsed", "width: EWC 10, mapped"),
)  # fmt: skip
"""What is worth knowing of two arms."""


def pairs(runs: Mapping[int, Mapping[str, Run]]) -> list[str]:
    lines = []
    for a, b in PAIRS:
        ratios = [beside(r[a], r[b]) for r in runs.values() if a in r and b in r]
        known = [r for r in ratios if r is not None]
        if known:
            verdict = "less, every time" if max(known) < 1 else "more, every time" if min(known) > 1 else "now less, now more"
            lines.append(f"- {a} beside {b}: {', '.join(f'{r:.2f}' for r in known)} ({verdict})")
    return lines


def write(found: Sequence[Run], names: Sequence[str], settings: Settings, base: Path, command: str) -> list[Path]:
    """BASE.md and BASE.png. Returns the paths."""
    runs: dict[int, dict[str, Run]] = {}
    for run in found:
        runs.setdefault(run["seed"], {})[run["arm"]] = run
    seeds = {seed: compare(r) for seed, r in runs.items()}
    names = [name for name in names if any(name in compared for compared in seeds.values())]
    starts = [r[PLAIN]["trajectory"][0] for r in runs.values()]
    about = {
        "model": f"{settings.shape.layers} layers, hidden size {settings.shape.hidden}, before training on the new domain: "
        f"old {spread([s['old'] for s in starts])}, new {spread([s['new'] for s in starts])} nats a token",
        "training": f"{settings.steps} steps of {settings.batch} x {settings.length} tokens, AdamW, peak learning rate {settings.rate:g}, cosine",
        "seeds": f"{len(runs)}; each has its own source model, sampled text, Fisher and order of the text",
        "date": time.strftime("%Y-%m-%d"),
        "command": f"`{command}`",
        **{k: v for k, v in machine(base.parent).items() if k not in ("disk", "scratch")},
        "versions": ", ".join(f"{k} {v}" for k, v in versions().items()) + f", Python {platform.python_version()}",
    }
    lines = [
        "# Forgetting",
        "",
        "Losses in nats a token, mean ± standard deviation over seeds. README.md one folder up says what is compared.",
        "",
    ]
    lines += [f"| {' | '.join(COLUMNS)} |", f"|---|---|{'---:|' * (len(COLUMNS) - 2)}"]
    lines += [f"| {' | '.join(line)} |" for line in cells(seeds, names)]
    if beside_each_other := pairs(runs):
        lines += [
            "",
            "One arm's forgetting over another's, at the lowest new-domain loss that both reach, for each seed:",
            "",
            *beside_each_other,
        ]
    lines += ["", *(f"- {name}: {value}" for name, value in about.items()), ""]
    table = base.with_suffix(".md")
    table.write_text("\n".join(lines), encoding="utf-8")
    try:
        from tradeoff_plot import figure
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print("matplotlib is not installed, so there is no plot.")
        return [table]
    picture = base.with_suffix(".png")
    figure(seeds, runs, names, picture)
    return [table, picture]
