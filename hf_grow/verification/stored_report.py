"""What growth.json keeps of a verification: the latest, and what an earlier one measured on the same weights and this one did not.

Perplexities take minutes and evaluations hours. They outlive a verification that runs no model, or no tasks, as long as both found the weight
files that growth.json names by their SHA-256, and nothing wrong with the structure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_grow.verification.report import Report

FUNCTION = ("logits", "lossless", "rounding")
"""Checks that run the models."""
TASKS = ("tasks", "task_settings")


def kept(earlier: object, report: Report) -> dict[str, Any]:
    """What to record of `report` after `earlier`, the `verification` that growth.json holds already (which may be anything)."""
    found = report.to_json()
    if not isinstance(earlier, Mapping) or not (_same_weights(earlier.get("checks")) and _same_weights(found["checks"])):
        return found
    metrics = earlier.get("metrics")
    metrics = metrics if isinstance(metrics, Mapping) else {}
    measured = any(c.name in FUNCTION for c in report.checks)
    if measured or not report.ok:
        return found | {"metrics": {**{k: metrics[k] for k in TASKS if k in metrics}, **found["metrics"]}}
    checks = found["checks"] + [c for c in earlier["checks"] if c["name"] in FUNCTION]
    return found | {"ok": all(c["status"] != "fail" for c in checks), "checks": checks, "metrics": {**metrics, **found["metrics"]}}


def _same_weights(checks: Any) -> bool:
    """Whether a verification found the weight files that growth.json names."""
    well_formed = isinstance(checks, list) and all(
        isinstance(c, Mapping) and all(isinstance(c.get(k), str) for k in ("name", "status", "detail")) for c in checks
    )
    return well_formed and any(c["name"] == "SHA-256" and c["status"] == "pass" for c in checks)
