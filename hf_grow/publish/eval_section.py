"""Facts for a card from the verification in growth.json: checks, both models on one text, routers, evaluation tasks.

The record may come from anyone: values of an unexpected form are left out.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import PurePath
from typing import Any

from hf_grow.growth.plan import GrowthPlan
from hf_grow.publish.names import public_ref

STATUSES = ("pass", "fail", "skip")
MOST_ROWS = 200
MOST_WARNINGS = 10


def number(value: Any) -> float | None:
    """`value` as a finite float; None for anything else."""
    fits = isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1000)
    return float(value) if fits and math.isfinite(value) else None


def mapping(data: object, *keys: str) -> Mapping[str, Any]:
    """The mapping at data[key][key]...; empty if there is none."""
    for key in keys:
        data = data.get(key) if isinstance(data, Mapping) else None
    return data if isinstance(data, Mapping) else {}


def state(verification: object) -> str:
    """'not verified', 'failed', 'structure only' or 'verified'."""
    if not isinstance(verification, Mapping):
        return "not verified"
    if verification.get("ok") is not True:
        return "failed"
    return "verified" if number(mapping(verification, "metrics").get("kl_nats_per_token")) is not None else "structure only"


def verification_facts(verification: object, plan: GrowthPlan) -> dict[str, Any]:
    """Everything that a card says of a verification; see templates/verification.md.jinja."""
    metrics = mapping(verification, "metrics")
    warnings = verification.get("warnings") if isinstance(verification, Mapping) else None
    text = str(metrics.get("text", ""))
    keys = ("perplexity_old", "perplexity_new", "loss_old", "loss_new", "tokens", "logit_difference_max", "greedy_agreement")
    function = {key: number(metrics.get(key)) for key in keys} | {
        "kl": number(metrics.get("kl_nats_per_token")),
        "text": text if " " in text else PurePath(text).name,  # the name of a file, not its path
        "dtype": str(metrics.get("dtype", "?")),
    }
    return {
        "state": state(verification),
        "checks": list(_checks(verification, plan)),
        "warnings": [str(w) for w in warnings[:MOST_WARNINGS]] if isinstance(warnings, list) else [],
        "function": function,
        "routing": _routing(mapping(metrics, "experts")),
        "tasks": list(tasks(verification)),
        "settings": _task_settings(mapping(metrics, "task_settings")),
    }


def _checks(verification: object, plan: GrowthPlan) -> Iterator[dict[str, str]]:
    source = public_ref(plan.source.ref, plan.source.revision)
    # The details of these checks hold the path of a local source.
    public = {
        "provenance": f"{plan.growth.method} from {source}: {plan.guarantee.kind}",
        "source": f"{source} has the tensors of the plan's source",
    }
    checks = verification.get("checks") if isinstance(verification, Mapping) else None
    for check in checks[:MOST_ROWS] if isinstance(checks, list) else ():
        name, status = (str(check.get(key, "")) for key in ("name", "status")) if isinstance(check, Mapping) else ("", "")
        if status in STATUSES:
            detail = check.get("detail", "") if name not in public else public[name] if status == "pass" else ""
            yield {"name": name, "status": status, "detail": str(detail)}


def only(checks: Collection[Mapping[str, str]], *names: str) -> list[Mapping[str, str]]:
    return [check for check in checks if check["name"] in names]


def _routing(experts: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the routers of both models do on the text; None for dense models."""
    sides = [mapping(experts, "old"), mapping(experts, "new")]
    if not any(sides):
        return None
    return {
        "sides": [
            {key: number(side.get(key)) for key in ("experts", "top_k", "entropy", "entropy_share", "load_variation")}
            | {key: number(mapping(side, key).get("share")) for key in ("most_loaded", "least_loaded")}
            | {"dead": len(side["dead"]) if isinstance(side.get("dead"), list) else None}
            for side in sides
        ],
        "agreement": {key: number(mapping(experts, "agreement").get(key)) for key in ("mean", "inherited")},
    }


def tasks(verification: object) -> Iterator[dict[str, Any]]:
    """One dict for each metric of each evaluation task: task, metric, shots, and (value, standard error) of both models as `old` and `new`."""
    metrics = mapping(verification, "metrics")
    settings = mapping(metrics, "task_settings", "tasks")
    for task, results in list(mapping(metrics, "tasks").items())[:MOST_ROWS]:
        for metric, values in list(mapping({"of": results}, "of").items())[:MOST_ROWS]:
            name, comma, kind = str(metric).partition(",")
            old, new = _pair(values)
            if (old is not None or new is not None) and not name.endswith("_stderr"):
                errors = _pair(results.get(f"{name}_stderr{comma}{kind}"))
                shots = number(mapping(settings, task).get("shots"))
                yield {"task": str(task), "metric": str(metric), "shots": shots, "old": (old, errors[0]), "new": (new, errors[1])}


def _pair(value: Any) -> tuple[float | None, float | None]:
    return (number(value[0]), number(value[1])) if isinstance(value, list | tuple) and len(value) == 2 else (None, None)


def _task_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    texts = {key: settings[key] for key in ("harness", "dtype") if isinstance(settings.get(key), str)}
    return {**texts, "limit": number(settings.get("limit"))}
