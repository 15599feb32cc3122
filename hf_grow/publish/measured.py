"""The verification that growth.json records, in Markdown: what was checked, what was measured, and evaluations before and after.

The record is read as somebody else's: what has not the right form is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
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


def tasks(verification: object) -> Iterator[tuple[str, str, float | None, float | None]]:
    """(task, metric, before, after) of every evaluation in the record."""
    found = metrics(verification).get("tasks")
    for task, results in list(found.items())[:MOST_ROWS] if isinstance(found, Mapping) else ():
        for metric, pair in list(results.items())[:MOST_ROWS] if isinstance(results, Mapping) else ():
            if isinstance(pair, list | tuple) and len(pair) == 2:
                old, new = map(number, pair)
                if old is not None or new is not None:
                    yield str(task), str(metric), old, new


def tasks_table(verification: object) -> str:
    """Empty where nothing was evaluated."""
    rows = [
        [plain(task, 80), plain(metric, 80), "-" if old is None else f"{old:.4g}", "-" if new is None else f"{new:.4g}"]
        for task, metric, old, new in tasks(verification)
    ]
    return table(["task", "metric", "source", "grown"], rows) if rows else ""
