"""What a verification looks like to people: checks, figures, what routers do."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from hf_grow.cli.render import console

if TYPE_CHECKING:
    from hf_grow.verification import Report


def show_report(report: Report) -> None:
    table = Table(title=f"verify: {report.old} -> {report.new}", title_justify="left", title_style="bold")
    for column in ("check", "", "found"):
        table.add_column(column, overflow="fold")
    marks = {"pass": Text("ok", "green"), "fail": Text("FAIL", "red"), "skip": Text("-", "yellow")}
    for check in report.checks:
        table.add_row(check.name, marks[check.status], check.detail)
    console.print(table)
    m = report.metrics
    if any(c.name == "logits" and c.status == "pass" for c in report.checks):
        of = f"{m['tokens']} of the {m['tokens_asked']} tokens asked for" if m["tokens"] < m["tokens_asked"] else f"{m['tokens']} tokens"
        because = f" ({m['dtype_because']})" if "dtype_because" in m else ""
        console.print(f"{of}, {m['text']}, computed in {m['dtype']}{because}", markup=False)
        figures = Table(show_header=False, box=None, padding=(0, 2))
        figures.add_row("perplexity before / after", f"{m['perplexity_old']:.4g} / {m['perplexity_new']:.4g}")
        figures.add_row("KL(old || new)", f"{m['kl_nats_per_token']:.3g} nats a token")
        figures.add_row("logit error, share of the logits", f"{m['logit_error']:.3g}, at worst {m['logit_error_worst']:.3g}")
        figures.add_row("logit difference max / mean", f"{m['logit_difference_max']:.3g} / {m['logit_difference_mean']:.3g}")
        figures.add_row("greedy agreement", f"{m['greedy_agreement']:.2%}")
        if experts := m.get("experts"):
            _add_routing(figures, experts)
        console.print(figures)
        if experts and experts["new"] and experts["new"]["dead"]:
            console.print(f"warning    {_dead(experts['new'])}", style="yellow", markup=False)
    if "tasks" in m:
        _show_tasks(m["tasks"], m["task_settings"])
    for warning in report.warnings:
        console.print(f"warning    {warning}", style="yellow", markup=False)


def _add_routing(figures: Table, experts: dict[str, Any]) -> None:
    """The rows of what `hf_grow.verification.routing` measured, before / after; a dense model is a dash."""

    def row(name: str, text: Callable[[dict[str, Any]], str]) -> None:
        figures.add_row(name, " / ".join(text(experts[side]) if experts[side] else "-" for side in ("old", "new")))

    row("experts", lambda r: f"{r['experts']}, top {r['top_k']}")
    row("router entropy, nats", lambda r: f"{r['entropy']:.3g}")
    row("as a share of the most", lambda r: "-" if r["entropy_share"] is None else f"{r['entropy_share']:.0%}")
    row("most loaded expert", lambda r: f"{r['most_loaded']['share']:.1%}")
    row("least loaded expert", lambda r: f"{r['least_loaded']['share']:.1%}")
    row("variation of the load", lambda r: f"{r['load_variation']:.2f}")
    if found := experts["agreement"]:
        kept = "" if found["inherited"] in (None, found["mean"]) else f", {found['inherited']:.1%} in inherited layers"
        figures.add_row("top-k agreement", f"{found['mean']:.1%}{kept}")


def _dead(routing: dict[str, Any], most: int = 4) -> str:
    """Which experts no token of the text chose, by layer."""
    layers: dict[int, list[str]] = {}
    for layer, expert in routing["dead"]:
        layers.setdefault(layer, []).append(str(expert))
    parts = [f"layer {layer}: {', '.join(experts)}" for layer, experts in layers.items()]
    more = f"; and {len(parts) - most} more layers" if len(parts) > most else ""
    count = len(routing["dead"])
    return f"{count} expert{'s' * (count > 1)} got none of the {routing['tokens']} tokens: {'; '.join(parts[:most])}{more}"


def _show_tasks(tasks: dict[str, dict[str, list[float | None]]], settings: dict[str, Any]) -> None:
    """One row a metric, with its standard error; of a group only its own rows, where it has some."""
    limit = "" if settings["limit"] is None else f", first {settings['limit']} examples only"
    table = Table(title=f"tasks: {settings['harness']}{limit}", title_justify="left", title_style="bold")
    for column in ("task", "shots", "metric", "before", "after"):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right", overflow="fold")
    parts = {task for group, members in settings["groups"].items() if tasks.get(group) for task in members}
    for task, metrics in tasks.items():
        shots = settings["tasks"][task]["shots"]
        if task not in parts:
            for metric, pair in metrics.items():
                name, _, kind = metric.partition(",")
                if not name.endswith("_stderr"):
                    errors = metrics.get(f"{name}_stderr" + (f",{kind}" if kind else ""), [None, None])
                    table.add_row(task, "-" if shots is None else str(shots), metric, *map(_score, pair, errors))
    console.print(table)
    if parts:
        console.print(f"and {len(parts)} parts of groups: --json, or verification.metrics.tasks in growth.json", markup=False)


def _score(value: float | None, error: float | None) -> str:
    return "-" if value is None else f"{value:.4g}" + ("" if error is None else f" ± {error:.2g}")
