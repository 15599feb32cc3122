"""The table of `forgetting.py`, in Markdown."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from arms import ARMS
from measure import machine
from results_file import markdown_list, markdown_table
from stage import Settings
from tradeoff import GOAL, PLAIN, Compared, Run, compare, relative_forgetting

from hf_grow.convert.metadata import versions


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
"""Arms to compare with each other."""


def pairs(runs: Mapping[int, Mapping[str, Run]]) -> list[str]:
    lines = []
    for a, b in PAIRS:
        ratios = [relative_forgetting(r[a], r[b]) for r in runs.values() if a in r and b in r]
        known = [r for r in ratios if r is not None]
        if known:
            verdict = "less, every time" if max(known) < 1 else "more, every time" if min(known) > 1 else "less in some, more in others"
            lines.append(f"- {a} against {b}: {', '.join(f'{r:.2f}' for r in known)} ({verdict})")
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
        f"old {spread([s['old'] for s in starts])}, new {spread([s['new'] for s in starts])} nats per token",
        "training": f"{settings.steps} steps of {settings.batch} x {settings.length} tokens, AdamW, peak learning rate {settings.rate:g}, cosine",
        "seeds": f"{len(runs)}; each with its own source model, sampled text, Fisher and order of the text",
        "date": time.strftime("%Y-%m-%d"),
        "command": f"`{command}`",
        **{k: v for k, v in machine(base.parent).items() if k not in ("disk", "scratch")},
        "versions": ", ".join(f"{k} {v}" for k, v in versions().items()) + f", Python {platform.python_version()}",
    }
    lines = [
        "# Forgetting",
        "",
        "Losses in nats per token, mean ± standard deviation over seeds. README.md one folder up explains the columns.",
        "",
    ]
    lines += markdown_table(COLUMNS, cells(seeds, names), left=2)
    if compared := pairs(runs):
        lines += [
            "",
            "Forgetting of one arm relative to another, at the lowest new-domain loss that both reach, for each seed:",
            "",
            *compared,
        ]
    lines += ["", *markdown_list(about), ""]
    table = base.with_suffix(".md")
    table.write_text("\n".join(lines), encoding="utf-8")
    try:
        from tradeoff_plot import figure  # needs matplotlib
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print("matplotlib is not installed, so there is no plot.")
        return [table]
    picture = base.with_suffix(".png")
    figure(seeds, runs, names, picture)
    return [table, picture]
