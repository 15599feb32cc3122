"""Proving that a grown checkpoint is what its plan says: by its tables, by its bytes, and by what it computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hf_grow.checkpoint.reader import Checkpoint
from hf_grow.errors import InputError
from hf_grow.verification.report import Check, Report
from hf_grow.verification.tasks import TaskOptions, compare_tasks, prepare

__all__ = ["Check", "Report", "TaskOptions", "verify_checkpoints"]


def verify_checkpoints(
    old: Checkpoint,
    new: Checkpoint,
    *,
    structure_only: bool = False,
    text: Path | None = None,
    tokens: int = 2048,
    dtype: str = "auto",
    tasks: TaskOptions | None = None,
    progress: Callable[[int], None] = lambda nbytes: None,
    notify: Callable[[str], None] = lambda message: None,
) -> Report:
    """All checks in order of cost; the functional ones and the tasks only on a checkpoint whose structure is sound.

    Raises InputError, before anything else is done, for tasks that cannot be run.
    """
    from hf_grow.verification import eval_text as texts
    from hf_grow.verification import function, structure
    from hf_grow.verification import models as running

    harness = None
    if tasks is not None and tasks.tasks is not None:
        if structure_only:
            raise InputError("--structure-only runs no model, so --tasks cannot be run.", hint="Leave one of them out.")
        for checkpoint in (old, new):
            if not texts.has_tokenizer(checkpoint):
                raise InputError(f"{checkpoint.ref} has no tokenizer, so --tasks cannot be run.", hint="Put its tokenizer files there.")
        harness = prepare(tasks)
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
    dtype, why = running.choose_dtype(old, new, dtype, notify)
    since = structure.trained_since(new)
    function.compare(old, new, report, text=text, tokens=tokens, dtype=dtype, why_dtype=why, notify=notify, plan=plan, since=since)
    if harness is not None and all(c.status != "fail" for c in report.checks if c.name == "logits"):
        compare_tasks(harness, old, new, report, dtype=dtype, notify=notify)
    return report
