"""What a verification found: checks that pass or fail, and measurements."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from hf_grow.common.safe_files import replace_nonfinite

Status = Literal["pass", "fail", "skip"]


@dataclass(frozen=True)
class Check:
    name: str
    status: Status
    detail: str


@dataclass
class Report:
    old: str
    new: str
    checks: list[Check] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    """Measured on a text: nats a token, perplexities, logit differences, what routers do; empty with structure only."""

    warnings: list[str] = field(default_factory=list)
    """What is no failure, and should be known before the model is used."""

    @property
    def ok(self) -> bool:
        return all(c.status != "fail" for c in self.checks)

    def add(self, name: str, ok: bool | None, detail: str) -> None:
        self.checks.append(Check(name, "skip" if ok is None else "pass" if ok else "fail", detail))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; what is no number (NaN of a broken model) becomes null."""
        data = {"ok": self.ok, **asdict(self)}
        data["metrics"] = replace_nonfinite(self.metrics)
        return data
