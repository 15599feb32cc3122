"""The result of a verification, and how it is stored in growth.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from hf_grow.common.safe_files import replace_nonfinite

Status = Literal["pass", "fail", "skip"]
FUNCTION_CHECKS = ("logits", "lossless", "rounding")
"""Checks that run the models."""
TASK_METRICS = ("tasks", "task_settings")


@dataclass(frozen=True)
class Check:
    """One check of a `Report`."""

    name: str
    """What was checked, such as "tensors" or "SHA-256"; names are stable and used as keys."""
    status: Status
    """`skip`: nothing to check, or not applicable to this checkpoint; `detail` says why."""
    detail: str
    """One sentence for people; its wording may change."""


@dataclass
class Report:
    """Everything `verify` found: checks that pass or fail, and metrics. It raises nothing itself; a wrong checkpoint gives ``ok == False``."""

    old: str
    """The source, as the user named it."""
    new: str
    """The grown checkpoint, as the user named it."""
    checks: list[Check] = field(default_factory=list)
    """In the order in which they ran."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """Losses and KL divergences in nats per token, perplexities, logit differences, router statistics and tasks; the keys are listed in
    docs/growth-json.md. Empty with `structure_only`."""
    warnings: list[str] = field(default_factory=list)
    """Not failures, but worth knowing before the model is used."""

    @property
    def ok(self) -> bool:
        """Whether no check failed; skipped checks do not count."""
        return all(c.status != "fail" for c in self.checks)

    def add(self, name: str, ok: bool | None, detail: str) -> None:
        """Appends a check; ``ok=None`` means skipped."""
        self.checks.append(Check(name, "skip" if ok is None else "pass" if ok else "fail", detail))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; NaN and infinities (of a broken model) become null."""
        data = {"ok": self.ok, **asdict(self)}
        data["metrics"] = replace_nonfinite(self.metrics)
        return data


def merge_verification(earlier: object, report: Report) -> dict[str, Any]:
    """The `verification` section to store: the latest report, plus what only an earlier one measured on the same weights.

    Perplexities take minutes and tasks take hours, so they are kept when a later run does not measure them, as long as both runs found the weight
    files that growth.json lists by SHA-256 and the structure is correct. ``earlier`` is the section that growth.json holds now, of any form.
    """
    latest = report.to_json()
    if not isinstance(earlier, Mapping) or not (_same_weights(earlier.get("checks")) and _same_weights(latest["checks"])):
        return latest
    metrics = earlier.get("metrics")
    metrics = metrics if isinstance(metrics, Mapping) else {}
    if any(c.name in FUNCTION_CHECKS for c in report.checks) or not report.ok:
        return latest | {"metrics": {**{k: metrics[k] for k in TASK_METRICS if k in metrics}, **latest["metrics"]}}
    checks = latest["checks"] + [c for c in earlier["checks"] if c["name"] in FUNCTION_CHECKS]
    return latest | {"ok": all(c["status"] != "fail" for c in checks), "checks": checks, "metrics": {**metrics, **latest["metrics"]}}


def _same_weights(checks: Any) -> bool:
    """Whether a verification found the weight files that growth.json lists."""
    well_formed = isinstance(checks, list) and all(
        isinstance(c, Mapping) and all(isinstance(c.get(k), str) for k in ("name", "status", "detail")) for c in checks
    )
    return well_formed and any(c["name"] == "SHA-256" and c["status"] == "pass" for c in checks)
