"""Reading verification reports in tests."""

from __future__ import annotations

from hf_grow.verification import Report


def failed_checks(report: Report) -> set[str]:
    """Names of the failed checks, without the transformers version."""
    assert report.ok == (not any(c.status == "fail" for c in report.checks))
    return {c.name.split(" in transformers")[0] for c in report.checks if c.status == "fail"}
