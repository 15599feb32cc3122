"""The result of the demo: one table, one sentence that says what came out (whichever way), and one figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from hf_grow.demo.pretrain import Point

# Okabe and Ito's colours: told apart with every kind of colour vision, and in grey.
_BEFORE, _SMALL, _GROWN, _QUIET = "#333333", "#0072B2", "#D55E00", "#777777"
_EVEN = 0.005  # nats; closer than this nobody is ahead: another seed would move it as far


@dataclass(frozen=True)
class Run:
    """One training: what was trained, and its held-out losses from the first step on."""

    layers: int
    parameters: int
    points: tuple[Point, ...]
    seconds: float
    cached: bool = False

    @property
    def first(self) -> float:
        return self.points[0].loss

    @property
    def last(self) -> float:
        return self.points[-1].loss

    @property
    def tokens(self) -> int:
        return self.points[-1].tokens


@dataclass(frozen=True)
class Story:
    small: Run
    """The small model's own training."""
    grown: Run
    """Continued pretraining of the grown model."""
    going_on: Run
    """The small model trained on without growth: same text, same steps, same schedule."""
    growth_seconds: float

    @property
    def dip(self) -> float:
        """How much the growth alone cost, in nats."""
        return self.grown.first - self.going_on.first

    @property
    def gain(self) -> float:
        """How far the grown model is ahead of the small one at the end (negative: behind)."""
        return self.going_on.last - self.grown.last


def table(story: Story) -> Table:
    out = Table(title="Held-out loss, in nats a token (lower is better)", title_style="bold", title_justify="left")
    out.add_column("stage")
    for name in ("layers", "parameters", "loss", "tokens seen", "time"):
        out.add_column(name, justify="right")
    small, grown, on = story.small, story.grown, story.going_on
    trained = "cached" if small.cached else _time(small.seconds)
    total = small.tokens + grown.tokens
    out.add_row("small model", *_model(small), f"{small.last:.3f}", f"{small.tokens:,}", trained)
    out.add_row("grown, not trained yet", *_model(grown), f"{grown.first:.3f}", f"{small.tokens:,}", _time(story.growth_seconds))
    out.add_row("grown, trained on", *_model(grown), f"[bold]{grown.last:.3f}[/]", f"{total:,}", _time(grown.seconds))
    out.add_row("small, trained on", *_model(on), f"{on.last:.3f}", f"{total:,}", _time(on.seconds), style="dim")
    return out


def verdict(story: Story) -> str:
    """What came out, in words; nothing is promised, so nothing needs hiding."""
    grown, on = story.grown, story.going_on
    if abs(story.gain) < _EVEN:
        result = "the grown model and the small model that simply went on are level"
    else:
        side = "ahead of" if story.gain > 0 else "behind"
        result = f"the grown model is {abs(story.gain):.3f} {side} the small model that simply went on"
    cost = grown.parameters / on.parameters
    return (
        f"The growth itself changed the loss by {story.dip:+.3f}. After {grown.tokens:,} more tokens each, {result} "
        f"({grown.last:.3f} and {on.last:.3f}); each step of the grown model computes {cost:.1f} times as much. "
        "A minute is too short to tell what growth is worth: that shows on longer runs, and judged the same way."
    )


def as_json(story: Story) -> dict[str, Any]:
    def run(run: Run) -> dict[str, Any]:
        return {
            "layers": run.layers,
            "parameters": run.parameters,
            "seconds": round(run.seconds, 2),
            "cached": run.cached,
            "heldout": [{"tokens": p.tokens, "loss": round(p.loss, 5)} for p in run.points],
        }

    return {
        "small": run(story.small),
        "grown": run(story.grown),
        "small_going_on": run(story.going_on),
        "growth_seconds": round(story.growth_seconds, 2),
        "dip": round(story.dip, 5),
        "gain": round(story.gain, 5),
    }


def figure(story: Story, path: Path) -> None:
    """Left the whole run, right what happens from the growth on."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(11, 4.6), dpi=150, layout="constrained")
    fig.suptitle(f"Depth up-scaling from {story.small.layers} to {story.grown.layers} layers", fontsize=14, fontweight="bold")
    whole, after = fig.subplots(1, 2, width_ratios=(1, 1.25))
    _whole(whole, story)
    _after(after, story)
    for axes in (whole, after):
        axes.grid(color="#E4E4E4", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylabel("held-out loss (nats a token)")
    fig.savefig(path)


def _whole(axes: Any, story: Story) -> None:
    start = story.small.tokens
    _line(axes, story.small.points, 0, _BEFORE, label=f"small model, {_size(story.small)}")
    _line(axes, story.going_on.points, start, _SMALL, label="small model going on")
    _line(axes, story.grown.points, start, _GROWN, label=f"grown model, {_size(story.grown)}")
    axes.axvline(start / 1e3, color=_QUIET, linestyle="--", linewidth=1)
    axes.annotate(
        "growth",
        (start / 1e3, 0.62),
        xycoords=("data", "axes fraction"),
        xytext=(-5, 0),
        textcoords="offset points",
        rotation=90,
        ha="right",
        color=_QUIET,
    )
    axes.legend(loc="upper right", framealpha=1, edgecolor="none")
    axes.set_title("The whole run", loc="left", fontsize=11)
    axes.set_xlabel("thousand tokens")
    axes.set_xlim(left=0)


def _after(axes: Any, story: Story) -> None:
    grown, on = story.grown, story.going_on
    _line(axes, on.points, 0, _SMALL, marker="o", linewidth=4, markersize=7)  # wider, so that it shows where both lie on each other
    _line(axes, grown.points, 0, _GROWN, marker="s", markersize=4)
    losses = [p.loss for p in (*grown.points, *on.points)]
    low, high = min(losses), max(losses)
    room = max(high - low, 0.02)
    end = grown.tokens / 1e3
    axes.set_ylim(low - 0.12 * room, high + 0.15 * room)
    axes.set_xlim(-0.04 * end, 1.5 * end)
    # The dip: a bracket from the small model's loss to the grown one's, at the moment of growth.
    axes.annotate("", (0, grown.first), xytext=(0, on.first), arrowprops={"arrowstyle": "->", "color": _GROWN, "lw": 1.5})
    axes.annotate(
        f"the growth alone: {story.dip:+.3f}",
        (0, grown.first),
        xytext=(14, 10),
        textcoords="offset points",
        color=_GROWN,
        va="bottom",
    )
    # Labels at the ends of the lines, kept apart by at least a line of text.
    names = [
        (grown.last, f"grown, {grown.layers} layers: {grown.last:.3f}", _GROWN),
        (on.last, f"small, {on.layers} layers: {on.last:.3f}", _SMALL),
    ]
    for y, (_, text, colour) in zip(_apart([n[0] for n in names], 0.07 * room), names, strict=True):
        axes.annotate(text, (end, y), xytext=(8, 0), textcoords="offset points", color=colour, va="center", fontsize=9)
    axes.set_title("From the growth on: the same text, the same steps", loc="left", fontsize=11)
    axes.set_xlabel("thousand tokens after the growth")
    axes.set_xticks([t for t in axes.get_xticks() if 0 <= t <= end])


def _line(axes: Any, points: Sequence[Point], offset: int, colour: str, **style: Any) -> None:
    axes.plot([(offset + p.tokens) / 1e3 for p in points], [p.loss for p in points], color=colour, **{"linewidth": 2, **style})


def _apart(values: Sequence[float], gap: float) -> list[float]:
    """Two positions, moved away from their middle where they are closer than `gap`."""
    first, second = values
    if abs(first - second) >= gap:
        return [first, second]
    middle, up = (first + second) / 2, (1 if first >= second else -1) * gap / 2
    return [middle + up, middle - up]


def _model(run: Run) -> tuple[str, str]:
    return str(run.layers), f"{run.parameters:,}"


def _size(run: Run) -> str:
    return f"{run.layers} layers, {run.parameters / 1e6:.2g}M"


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
