"""The plot of `forgetting.py`: learning against forgetting, and forgetting at equal new-domain loss."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from arms import ARMS
from matplotlib.figure import Figure
from tradeoff import BASELINES, GOAL, PLAIN, Compared, Run, points

# Okabe and Ito's colours, which are distinct with every kind of colour vision.
COLOURS = {
    "plain": "#333333", "ewc": "#0072B2", "si": "#56B4E9", "l2sp": "#CC79A7", "replay": "#E69F00", "self-replay": "#D55E00",
    "ewc + replay": "#999933", "ewc + self-replay": "#009E73", "distillation": "#882255", "frozen": "#777777", "lora": "#AAAAAA",
}  # fmt: skip


def figure(seeds: Mapping[int, Mapping[str, Compared]], runs: Mapping[int, Mapping[str, Run]], names: Sequence[str], path: Path) -> None:
    fig = Figure(figsize=(15, max(6.0, 0.27 * len(names) + 1.6)), dpi=130, layout="constrained")
    fig.suptitle("Continued pretraining on code: learning, and forgetting of prose", fontsize=14, fontweight="bold")
    left, right = fig.subplots(1, 2, width_ratios=(1.1, 1))
    _tradeoff(left, seeds, runs, names)
    _ratios(right, seeds, names)
    for axes in (left, right):
        axes.grid(color="#E4E4E4", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    fig.savefig(path)


def _tradeoff(axes: Any, seeds: Mapping[int, Mapping[str, Compared]], runs: Mapping[int, Mapping[str, Run]], names: Sequence[str]) -> None:
    """Final losses, mean over seeds; for plain fine-tuning also the trajectories of the first seed."""
    first = next(iter(runs.values()))
    for name in BASELINES:
        track = points(first[name], first[PLAIN]["trajectory"][0]["old"])[1:]
        axes.plot(*zip(*track, strict=True), color="#BBBBBB", linewidth=1, zorder=1)
    labelled: set[str] = set()
    for name in names:
        arm, found = ARMS[name], [c[name] for c in seeds.values() if name in c]
        x, y = statistics.fmean(c.new for c in found), statistics.fmean(c.rise for c in found)
        colour = COLOURS[arm.family]
        axes.scatter(
            x, y, s=42, marker={"": "o", "depth": "^", "width": "s", "ffn": "D"}[arm.growth], color=colour if not arm.growth else "white",
            edgecolors=colour, linewidths=1.5, zorder=3, label=arm.family if arm.family not in labelled else None,
        )  # fmt: skip
        labelled.add(arm.family)
    axes.set_xlabel("loss on code (nats per token; lower is better)")
    axes.set_ylabel("rise of the loss on prose (nats per token; lower is better)")
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    title = "final losses; ○ not grown, △ depth, □ width, ◇ FFN\ngrey lines: trajectories of plain fine-tuning"
    axes.legend(frameon=False, fontsize=9, title=title, title_fontsize=9)


def _ratios(axes: Any, seeds: Mapping[int, Mapping[str, Compared]], names: Sequence[str]) -> None:
    ratios = {n: [c[n].ratio for c in seeds.values() if n in c and math.isfinite(c[n].ratio)] for n in names}
    order = sorted((n for n in names if ratios[n]), key=lambda n: -statistics.fmean(ratios[n]))
    for place, name in enumerate(order):
        alpha = 0.55 if ARMS[name].old_data else 1.0
        axes.barh(place, statistics.fmean(ratios[name]), color=COLOURS[ARMS[name].family], alpha=alpha, height=0.7)
        axes.scatter(ratios[name], [place] * len(ratios[name]), s=9, color="black", zorder=3)
    axes.set_yticks(range(len(order)), [f"{n}{' *' if ARMS[n].old_data else ''}" for n in order], fontsize=8)
    axes.set_ylim(-0.7, len(order) - 0.3)
    axes.axvline(1, color="#333333", linewidth=1)
    axes.axvline(GOAL, color="#009E73", linewidth=1.2, linestyle="--")
    axes.set_xlabel("forgetting at equal loss on code, best plain fine-tuning = 1\n(dots: seeds; pale and *: needs old text)")
