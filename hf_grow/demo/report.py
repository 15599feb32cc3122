"""The result of the demo as numbers, a table, a sentence and a figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from hf_grow.checkpoint.reader import open_folder
from hf_grow.common.safe_files import read_json
from hf_grow.model.param_count import count_parameters
from hf_grow.training.trainer.events import read_events

RUNS = {"plain": ("trained", "trained without EWC", "#D55E00"), "ewc": ("trained-ewc", "trained with EWC", "#0072B2")}
"""Run -> its folder, label and colour (of Okabe and Ito's, which are distinct with every kind of colour vision)."""
LEVEL = 0.005
"""Nats per token; a smaller difference is within what another seed changes."""


def result(out: Path) -> dict[str, Any]:
    """The numbers of a finished demo in the folder ``out``; losses in nats per token on held-out text, old: prose, new: code."""
    small, grown = (open_folder(out / name).info.architecture for name in ("small", "grown"))
    numbers: dict[str, Any] = {
        "layers": [small.layers, grown.layers],
        "parameters": [count_parameters(small).total, count_parameters(grown).total],
        "small": {"old": read_json(out / "small" / "training.json")["result"]["end"]["prose"]},
    }
    for name, (folder, _, _) in RUNS.items():
        trained = read_json(out / folder / "training.json")["result"]
        events = [e for e in read_events(out / folder / "events.jsonl") if e["event"] == "evaluation"]
        numbers[name] = {key: trained[key] for key in ("start", "end", "forgetting", "tokens", "seconds")}
        numbers[name]["evaluations"] = [{"step": e["step"], **e["losses"]} for e in events]
    return numbers


def table(numbers: dict[str, Any]) -> Table:
    out = Table(title="Held-out loss, nats per token (lower is better)", title_style="bold", title_justify="left")
    for column in ("model", "layers", "parameters", "prose (old)", "code (new)"):
        out.add_column(column, justify="left" if column == "model" else "right")
    small, grown = ([str(numbers["layers"][i]), f"{numbers['parameters'][i]:,}"] for i in (0, 1))
    start = numbers["plain"]["start"]
    out.add_row("small", *small, f"{numbers['small']['old']:.3f}", "")
    out.add_row("grown", *grown, f"{start['old']:.3f}", f"{start['new']:.3f}")
    for name, (_, label, _) in RUNS.items():
        end = numbers[name]["end"]
        out.add_row(label, *grown, f"{end['old']:.3f}", f"{end['new']:.3f}")
    return out


def summary(numbers: dict[str, Any]) -> str:
    """What this run showed, whichever way it came out."""
    plain, ewc, growth = numbers["plain"], numbers["ewc"], numbers["plain"]["start"]["old"] - numbers["small"]["old"]
    saved, cost = plain["forgetting"] - ewc["forgetting"], ewc["end"]["new"] - plain["end"]["new"]
    forgot, learned = _difference(saved), _difference(cost)
    return (
        f"Growth changed the loss on prose by {growth:+.4f}. {plain['tokens']:,} tokens of code then raised it by {plain['forgetting']:+.3f} "
        f"without EWC and by {ewc['forgetting']:+.3f} with it. EWC forgot {forgot} and learned {learned}. "
        "This is one short run of a tiny model; docs/training.md has measurements over several seeds at equal loss on the new text."
    )


def _difference(less: float) -> str:
    return "the same" if abs(less) < LEVEL else f"{abs(less):.3f} {'less' if less > 0 else 'more'}"


def figure(numbers: dict[str, Any], path: Path) -> None:
    """Both losses of both runs, evaluation by evaluation, as a PNG."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    fig.suptitle(f"Grown from {numbers['layers'][0]} to {numbers['layers'][1]} layers, then trained on code", fontweight="bold")
    for axes, key, title in zip(fig.subplots(1, 2), ("old", "new"), ("prose (old)", "code (new)"), strict=True):
        for name, (_, label, colour) in RUNS.items():
            points = numbers[name]["evaluations"]
            axes.plot(
                [p["step"] for p in points], [p[key] for p in points], color=colour, linewidth=2, marker="o", markersize=4, label=label
            )
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel("training steps")
        axes.set_ylabel("held-out loss, nats per token")
        axes.grid(color="#E4E4E4", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    fig.savefig(path)
