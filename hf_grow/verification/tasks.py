"""Runs evaluation tasks (lm-evaluation-harness, the extra `eval`) on the source and on the grown model, one model in memory at a time.

Tasks are the harness's own, by name (their data comes from the Hub or the datasets cache), or your YAML files, which need no network. The seeds
are those of the `lm-eval` command, so the results are the same.
"""

from __future__ import annotations

import gc
import numbers
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import Field, model_validator

from hf_grow.checkpoint.reader import Checkpoint
from hf_grow.model.loading import load_tokenizer
from hf_grow.options import Options
from hf_grow.verification.lm_eval import TaskRunner
from hf_grow.verification.models import load_model
from hf_grow.verification.report import Report


class TaskOptions(Options):
    """Tasks to run on both models."""

    tasks: str | None = None
    """Also run lm-evaluation-harness tasks on both models: a YAML task file, a folder of them, or task names, separated by commas."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Run only the first N examples of each task: for a first look, not for publishing."""
    shots: Annotated[int, Field(ge=0)] | None = None
    """Number of few-shot examples. Default: as the task says; tasks that say 0 keep it."""
    batch_size: Annotated[int, Field(ge=1)] = 8
    """Batch size for the tasks."""

    @model_validator(mode="after")
    def _need_tasks(self) -> TaskOptions:
        unused = [n for n in ("limit", "shots", "batch_size") if n in self.model_fields_set]
        if self.tasks is None and unused:
            raise ValueError(f"{' and '.join(n.replace('_', '-') for n in unused)} without tasks has no effect")
        return self


def prepare_tasks(options: TaskOptions) -> TaskRunner:
    """The tasks, loaded. Raises InputError for everything that is known now to fail later."""
    return TaskRunner(options.tasks or "", limit=options.limit, shots=options.shots, batch_size=options.batch_size)


def compare_tasks(
    runner: TaskRunner,
    old: Checkpoint,
    new: Checkpoint,
    report: Report,
    *,
    dtype: str,
    notify: Callable[[str], None],
) -> None:
    """Adds the metrics `tasks` (task -> metric -> [old, new]) and `task_settings` to the report."""
    import torch

    results: list[dict[str, Any]] = []
    for checkpoint in (old, new):
        notify(f"Running {runner.summary} on {checkpoint.ref} ({len(results) + 1} of 2 models) ...")
        start = time.monotonic()
        assert checkpoint.folder is not None
        model = load_model(checkpoint, dtype)
        if torch.cuda.is_available():
            model = model.to("cuda")  # tasks run a model thousands of times
        results.append(runner.run(model, load_tokenizer(checkpoint.folder, checkpoint.ref), checkpoint.ref))
        notify(f"... took {time.monotonic() - start:.0f} s.")
        del model
        gc.collect()  # the harness's wrapper and the model refer to each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    before, after = results
    report.metrics["tasks"] = side_by_side(before.get("results") or {}, after.get("results") or {})
    report.metrics["task_settings"] = {
        "harness": f"lm-eval {runner.version}",
        "dtype": dtype,
        "limit": runner.limit,
        "batch_size": runner.batch_size,
        "tasks": {name: _settings(after, name) for name in report.metrics["tasks"]},
        "groups": {k: list(v) for k, v in (after.get("group_subtasks") or {}).items() if v},
    }


def side_by_side(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, dict[str, list[float | None]]]:
    """task -> metric -> [old, new]. The harness's `acc,none` becomes `acc`; the name of any other filter stays, as in `exact_match,strict`.

    Standard errors are kept as `acc_stderr`; values that are not numbers in either model ("N/A") are left out.
    """
    tables: dict[str, dict[str, list[float | None]]] = {}
    for task in [*after, *(t for t in before if t not in after)]:
        pair = [_numbers(side.get(task) or {}) for side in (before, after)]
        tables[task] = {metric: [pair[0].get(metric), pair[1].get(metric)] for metric in {**pair[0], **pair[1]}}
    return tables


def _numbers(results: Mapping[str, Any]) -> dict[str, float]:
    out = {}
    for key, value in results.items():
        metric, comma, name = key.partition(",")
        if comma and isinstance(value, numbers.Real) and not isinstance(value, bool):
            out[metric if name == "none" else key] = float(value)
    return out


def _settings(results: Mapping[str, Any], task: str) -> dict[str, Any]:
    """Shots, examples, version and metric direction of a task, where the harness reports them (a group has no shots of its own)."""
    examples = (results.get("n-samples") or {}).get(task) or {}
    return {
        "shots": (results.get("n-shot") or {}).get(task),
        "examples": examples.get("effective"),
        "version": (results.get("versions") or {}).get(task),
        "higher_is_better": dict((results.get("higher_is_better") or {}).get(task) or {}),
    }
