"""The verification that growth.json records, in Markdown: what was checked, what was measured, and evaluations before and after.

The record is read as somebody else's: what has not the right form is left out.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from hf_grow.growth.plan import GrowthPlan
from hf_grow.publish.markdown import plain, table
from hf_grow.publish.names import public_ref

MARKS = {"pass": "ok", "fail": "**failed**", "skip": "-"}
PRIVATE = {"source", "provenance"}
"""Checks whose details hold the path of a local source: the card has words of its own for them."""
MOST_ROWS = 200
MOST_WARNINGS = 10


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
    fits = isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1000)
    return float(value) if fits and math.isfinite(value) else None


def checks_table(verification: Mapping[str, Any], plan: GrowthPlan, only: Collection[str] | None = None) -> str:
    source = public_ref(plan.source.ref, plan.source.revision)
    public = {
        "provenance": f"{plan.growth.method} from {source}: {plan.guarantee.kind}",
        "source": f"{source} has the tensors of the plan's source",
    }
    rows = []
    checks = verification.get("checks")
    for check in checks[:MOST_ROWS] if isinstance(checks, list) else ():
        name, status = (str(check.get(key, "")) for key in ("name", "status")) if isinstance(check, Mapping) else ("", "")
        if status in MARKS and (only is None or name in only):
            detail = check.get("detail", "") if name not in PRIVATE else public[name] if status == "pass" else ""
            rows.append([plain(name, 80), MARKS[status], plain(detail, 300)])
    return "\n".join(["| check | | found |", "| --- | --- | --- |", *("| " + " | ".join(r) + " |" for r in rows)])


def function_table(verification: Mapping[str, Any], called: str = "grown") -> str:
    """Both models on one text; empty if they were not run. `called`: what the card calls the second."""
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
        table(["", "source", called], rows),
        f"KL(source || {called}) is {kl:.3g} nats a token; logits differ by at most {shown('logit_difference_max', '.3g')}; "
        f"the likeliest next token is the same for {shown('greedy_agreement', '.2%')} of the tokens.",
    ])  # fmt: skip


def warned(verification: Mapping[str, Any]) -> str:
    """What the verification warned of, as a list; empty where it did not."""
    found = verification.get("warnings")
    return "\n".join(f"- **Warning:** {plain(w, 400)}" for w in (found[:MOST_WARNINGS] if isinstance(found, list) else ()))


def beside_source(verification: object) -> str:
    """How a trained model does beside its source, as far as anybody looked."""
    old, new = (number(metrics(verification).get(f"perplexity_{k}")) for k in ("old", "new"))
    if old is None or new is None:
        return "Nobody has compared it with its source."
    told = f"On the text of the verification (below) its perplexity is {new:.4g}, that of the source {old:.4g}"
    return f"{told}: **there it is still behind its source.**" if new > old else f"{told}."


def routing_table(verification: object, called: str = "grown") -> str:
    """What the routers of a mixture do on the text; empty for dense models."""
    experts = metrics(verification).get("experts")
    experts = experts if isinstance(experts, Mapping) else {}
    both = [side if isinstance(side, Mapping) else {} for side in (experts.get("old"), experts.get("new"))]
    if not any(both):
        return ""

    def shown(form: str, *keys: str) -> list[str]:
        return ["-" if value is None else format(value, form) for value in (_at(side, *keys) for side in both)]

    dead = [str(len(side["dead"])) if isinstance(side.get("dead"), list) else "-" for side in both]
    rows = [
        ["experts a layer", *shown(".0f", "experts")],
        ["of them for a token", *shown(".0f", "top_k")],
        ["entropy of the router, nats", *shown(".3g", "entropy")],
        ["as a share of the most it can be", *shown(".0%", "entropy_share")],
        ["most loaded expert, share of its layer", *shown(".1%", "most_loaded", "share")],
        ["least loaded expert, share of its layer", *shown(".1%", "least_loaded", "share")],
        ["variation of the load", *shown(".2f", "load_variation")],
        ["experts that no token chose, all layers", *dead],
    ]
    told = table(["", "source", called], rows)
    agreement = experts.get("agreement")
    mean, inherited = (_at(agreement, k) if isinstance(agreement, Mapping) else None for k in ("mean", "inherited"))
    if mean is not None:
        kept = "" if inherited in (None, mean) else f" ({inherited:.1%} in layers that are no further copies)"
        told += f"\n\n{mean:.1%} of the experts that the {called} model chooses for a token come from one that the source chose for it there{kept}."
    return "Routers on the same text (variation: 0 where all experts get the same):\n\n" + told


def _at(data: Any, *keys: str) -> float | None:
    for key in keys:
        data = data.get(key) if isinstance(data, Mapping) else None
    return number(data)


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


def tasks_table(verification: object, called: str = "grown") -> str:
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
    return told + "\n\n" + table(["task", "metric", "shots", "source", called], rows)


def _score(value: float | None, error: float | None) -> str:
    return "-" if value is None else f"{value:.4g}" + ("" if error is None else f" ± {error:.2g}")
