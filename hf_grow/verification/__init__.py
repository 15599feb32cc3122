"""Verifies a grown checkpoint against its source: structure, bytes, and outputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hf_grow.checkpoint.reader import Checkpoint
from hf_grow.errors import InputError
from hf_grow.verification.report import Check, Report
from hf_grow.verification.tasks import TaskOptions, compare_tasks, prepare_tasks

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
    """Runs all checks in order of cost; the models and tasks run only if the structure is correct.

    Args:
        text: the text to compare the models on; default: the built-in one.
        tokens: compare on at most this many tokens.
        dtype: dtype of the computation; ``auto`` is fp32 where the larger model fits into memory, else bfloat16.
        progress: called with the number of bytes checked since the last call.
        notify: called with messages for the user.

    Raises InputError, before any check, for tasks that cannot run.
    """
    from hf_grow.verification import eval_text, function, models, structure

    runner = None
    if tasks is not None and tasks.tasks is not None:
        if structure_only:
            raise InputError("--tasks cannot be run with --structure-only, which loads no model.", hint="Remove one of them.")
        for checkpoint in (old, new):
            if not eval_text.has_tokenizer(checkpoint):
                raise InputError(
                    f"{checkpoint.ref} has no tokenizer, which --tasks needs.", hint="Copy its tokenizer files into the folder."
                )
        runner = prepare_tasks(tasks)
    report = Report(old.ref, new.ref)
    plan = structure.check_tables(new, report)
    if plan and structure.check_same_source(old, plan, report):
        structure.recompute_tensors(old, new, plan, report, progress)
    structure.check_builds(new, report)
    if structure_only:
        return report
    if not report.ok:
        report.add("function", None, "not run: the structure is wrong")
        return report
    dtype, dtype_reason = models.choose_dtype(old, new, dtype, notify)
    since = structure.training_since(new)
    function.compare(
        old, new, report, text=text, tokens=tokens, dtype=dtype, dtype_reason=dtype_reason, notify=notify, plan=plan, since=since
    )
    if runner is not None and all(c.status != "fail" for c in report.checks if c.name == "logits"):
        compare_tasks(runner, old, new, report, dtype=dtype, notify=notify)
    return report
