"""Prints a verification report: checks, metrics, router statistics, tasks."""

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
    for column in ("check", "", "result"):
        table.add_column(column, overflow="fold")
    marks = {"pass": Text("ok", "green"), "fail": Text("FAIL", "red"), "skip": Text("-", "yellow")}
    for check in report.checks:
        table.add_row(check.name, marks[check.status], check.detail)
    console.print(table)
    metrics = report.metrics
    if any(c.name == "logits" and c.status == "pass" for c in report.checks):
        count = (
            f"{metrics['tokens']} of the {metrics['tokens_asked']} tokens asked for"
            if metrics["tokens"] < metrics["tokens_asked"]
            else f"{metrics['tokens']} tokens"
        )
        because = f" ({metrics['dtype_because']})" if "dtype_because" in metrics else ""
        console.print(f"{count}, {metrics['text']}, computed in {metrics['dtype']}{because}", markup=False)
        figures = Table(show_header=False, box=None, padding=(0, 2))
        figures.add_row("perplexity before / after", f"{metrics['perplexity_old']:.4g} / {metrics['perplexity_new']:.4g}")
        figures.add_row("KL(old || new)", f"{metrics['kl_nats_per_token']:.3g} nats per token")
        figures.add_row("relative logit error", f"{metrics['logit_error']:.3g}, at worst {metrics['logit_error_worst']:.3g}")
        figures.add_row("logit difference, max / mean", f"{metrics['logit_difference_max']:.3g} / {metrics['logit_difference_mean']:.3g}")
        figures.add_row("greedy agreement", f"{metrics['greedy_agreement']:.2%}")
        if experts := metrics.get("experts"):
            _add_routing(figures, experts)
        console.print(figures)
        if experts and experts["new"] and experts["new"]["dead"]:
            console.print(f"warning    {_dead(experts['new'])}", style="yellow", markup=False)
    if "tasks" in metrics:
        _show_tasks(metrics["tasks"], metrics["task_settings"])
    for warning in report.warnings:
        console.print(f"warning    {warning}", style="yellow", markup=False)


def _add_routing(figures: Table, experts: dict[str, Any]) -> None:
    """Adds the router statistics, before / after; "-" for a dense model."""

    def row(name: str, text: Callable[[dict[str, Any]], str]) -> None:
        figures.add_row(name, " / ".join(text(experts[side]) if experts[side] else "-" for side in ("old", "new")))

    row("experts", lambda r: f"{r['experts']}, top {r['top_k']}")
    row("router entropy, nats", lambda r: f"{r['entropy']:.3g}")
    row("router entropy / log(experts)", lambda r: "-" if r["entropy_share"] is None else f"{r['entropy_share']:.0%}")
    row("most loaded expert", lambda r: f"{r['most_loaded']['share']:.1%}")
    row("least loaded expert", lambda r: f"{r['least_loaded']['share']:.1%}")
    row("load variation", lambda r: f"{r['load_variation']:.2f}")
    if agreement := experts["agreement"]:
        mean, inherited = agreement["mean"], agreement["inherited"]
        figures.add_row("top-k agreement", f"{mean:.1%}" + ("" if inherited in (None, mean) else f", {inherited:.1%} in inherited layers"))


def _dead(routing: dict[str, Any], most: int = 4) -> str:
    """Lists the dead experts by layer."""
    layers: dict[int, list[str]] = {}
    for layer, expert in routing["dead"]:
        layers.setdefault(layer, []).append(str(expert))
    parts = [f"layer {layer}: {', '.join(experts)}" for layer, experts in layers.items()]
    more = f"; and {len(parts) - most} more layers" if len(parts) > most else ""
    count = len(routing["dead"])
    return f"{count} dead expert{'s' * (count > 1)}, chosen by none of the {routing['tokens']} tokens: {'; '.join(parts[:most])}{more}"


def _show_tasks(tasks: dict[str, dict[str, list[float | None]]], settings: dict[str, Any]) -> None:
    """One row per metric, with its standard error; for a group only its own rows, if it has any."""
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
        console.print(f"{len(parts)} tasks of groups not shown: see --json, or verification.metrics.tasks in growth.json", markup=False)


def _score(value: float | None, error: float | None) -> str:
    return "-" if value is None else f"{value:.4g}" + ("" if error is None else f" ± {error:.2g}")
