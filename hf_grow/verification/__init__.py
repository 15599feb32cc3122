"""Proving that a grown checkpoint is what its plan says: by its tables, by its bytes, and by what it computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hf_grow.checkpoint.reader import Checkpoint
from hf_grow.verification.report import Check, Report

__all__ = ["Check", "Report", "verify_checkpoints"]


def verify_checkpoints(
    old: Checkpoint,
    new: Checkpoint,
    *,
    structure_only: bool = False,
    text: Path | None = None,
    tokens: int = 2048,
    dtype: str = "auto",
    progress: Callable[[int], None] = lambda nbytes: None,
    notify: Callable[[str], None] = lambda message: None,
) -> Report:
    """All checks in order of cost; the functional ones only on a checkpoint whose structure is sound."""
    from hf_grow.verification import function, structure

    report = Report(old.ref, new.ref)
    plan = structure.check_tables(new, report)
    if plan and structure.check_same_source(old, plan, report):
        structure.rederive(old, new, plan, report, progress)
    structure.check_builds(new, report)
    if structure_only:
        return report
    if not report.ok:
        report.add("function", None, "not run: the structure is wrong")
        return report
    function.compare(old, new, report, text=text, tokens=tokens, dtype=dtype, notify=notify, plan=plan)
    return report
