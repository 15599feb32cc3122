"""The verification that growth.json records, in Markdown: what was checked, what was measured, and evaluations before and after.

The record is read as somebody else's: what has not the right form is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from hf_grow.publish.markdown import plain, table

MARKS = {"pass": "ok", "fail": "**failed**", "skip": "not run"}
PRIVATE = {"source", "provenance"}
"""Checks whose details hold the path of a local source."""
MOST_ROWS = 200


def state(verification: object) -> str:
    """'not verified', 'failed', 'structure only' or 'verified'."""
    if not isinstance(verification, Mapping):
        return "not verified"
    if verification.get("ok") is not True:
        return "failed"
    return "verified" if number(metrics(verification).get("kl_nats_per_token")) is not None else "structure only"


def metrics(verification: object) -> Mapping[str, Any]:
    found = verification.get("metrics") if isinstance(verification, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None


def checks_table(verification: Mapping[str, Any]) -> str:
    rows = []
    checks = verification.get("checks")
    for check in checks[:MOST_ROWS] if isinstance(checks, list) else ():
        if isinstance(check, Mapping) and check.get("status") in MARKS:
            detail = "" if check.get("name") in PRIVATE else plain(check.get("detail", ""), 300)
            rows.append([plain(check.get("name", ""), 80), MARKS[str(check["status"])], detail])
    return "\n".join(["| check | | found |", "| --- | --- | --- |", *("| " + " | ".join(r) + " |" for r in rows)])


def function_table(verification: Mapping[str, Any]) -> str:
    """Both models on one text; empty if they were not run."""
    m = metrics(verification)
    kl = number(m.get("kl_nats_per_token"))
    if kl is None:
        return ""

    def shown(key: str, form: str = ".4g") -> str:
        value = number(m.get(key))
        return "-" if value is None else format(value, form)

    text = str(m.get("text", ""))
    told = plain(text if " " in text else PurePath(text).name, 80)  # a file's name, never its path
    rows = [
        ["perplexity", shown("perplexity_old"), shown("perplexity_new")],
        ["loss, nats a token", shown("loss_old"), shown("loss_new")],
    ]
    return "\n\n".join([
        f"Both models on the same text ({told}, {shown('tokens', '.0f')} tokens, computed in {plain(m.get('dtype', '?'), 20)}):",
        table(["", "source", "grown"], rows),
        f"KL(source || grown) is {kl:.3g} nats a token; logits differ by at most {shown('logit_difference_max', '.3g')}; "
        f"the likeliest next token is the same for {shown('greedy_agreement', '.2%')} of the tokens.",
    ])  # fmt: skip


@dataclass(frozen=True)
class Score:
    """One metric of one task, before and after; None where it was not measured."""

    task: str
    metric: str
    old: float | None
    new: float | None
    errors: tuple[float | None, float | None]
    """Standard errors."""


def tasks(verification: object) -> Iterator[Score]:
    """Every evaluation in the record."""
    found = metrics(verification).get("tasks")
    for task, results in list(found.items())[:MOST_ROWS] if isinstance(found, Mapping) else ():
        results = results if isinstance(results, Mapping) else {}
        for metric, pair in list(results.items())[:MOST_ROWS]:
            name, comma, kind = str(metric).partition(",")
            old, new = _pair(pair)
            if (old is not None or new is not None) and not name.endswith("_stderr"):
                yield Score(str(task), str(metric), old, new, _pair(results.get(f"{name}_stderr{comma}{kind}")))


def _pair(value: Any) -> tuple[float | None, float | None]:
    return (number(value[0]), number(value[1])) if isinstance(value, list | tuple) and len(value) == 2 else (None, None)


def tasks_table(verification: object) -> str:
    """Empty where nothing was evaluated."""
    settings = metrics(verification).get("task_settings")
    settings = settings if isinstance(settings, Mapping) else {}
    each = settings.get("tasks")
    rows = []
    for s in tasks(verification):
        own = each.get(s.task) if isinstance(each, Mapping) else None
        shots = number(own.get("shots")) if isinstance(own, Mapping) else None
        scores = [_score(s.old, s.errors[0]), _score(s.new, s.errors[1])]
        rows.append([plain(s.task, 80), plain(s.metric, 80), "-" if shots is None else f"{shots:.0f}", *scores])
    if not rows:
        return ""
    parts = [plain(settings["harness"], 60)] if isinstance(settings.get("harness"), str) else []
    parts += [f"computed in {plain(settings['dtype'], 20)}"] if isinstance(settings.get("dtype"), str) else []
    limit = number(settings.get("limit"))
    if limit is not None:
        parts.append(
            f"**only the first {limit:g} examples of each task**" if limit >= 1 else f"**only {limit:.2%} of the examples of each task**"
        )
    told = f"`hf-grow verify --tasks` ran the same tasks on both models{' (' + ', '.join(parts) + ')' if parts else ''}; ± is the standard error."
    return told + "\n\n" + table(["task", "metric", "shots", "source", "grown"], rows)


def _score(value: float | None, error: float | None) -> str:
    return "-" if value is None else f"{value:.4g}" + ("" if error is None else f" ± {error:.2g}")
