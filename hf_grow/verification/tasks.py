"""Evaluation tasks before and after: lm-evaluation-harness (the extra `eval`) on OLD and NEW, one model in memory at a time.

Tasks are the harness's own, by name (their data comes from the Hub, or from the cache of datasets), or YAML files of yours, which need no
network. Seeds are those of the harness's own command, so that its figures are the same.
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
from hf_grow.verification.lm_eval import Harness
from hf_grow.verification.models import load_model
from hf_grow.verification.report import Report


class TaskOptions(Options):
    """Tasks to run on both models."""

    tasks: str | None = None
    """Also run tasks of lm-evaluation-harness on both models: a YAML task file, a folder of them, or names, separated by commas."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Run only the first N examples of each task: for trying out, not for publishing."""
    shots: Annotated[int, Field(ge=0)] | None = None
    """Examples shown before each question. Default: what the task says; a task that says 0 keeps it."""
    batch_size: Annotated[int, Field(ge=1)] = 8
    """Examples that the tasks put through a model at once."""

    @model_validator(mode="after")
    def _belong_to_tasks(self) -> TaskOptions:
        idle = [n for n in ("limit", "shots", "batch_size") if n in self.model_fields_set]
        if self.tasks is None and idle:
            raise ValueError(f"{' and '.join(n.replace('_', '-') for n in idle)} without tasks: there is nothing to run")
        return self


def prepare(options: TaskOptions) -> Harness:
    """The tasks, loaded. Raises InputError for whatever is known now to fail later."""
    return Harness(options.tasks or "", limit=options.limit, shots=options.shots, batch_size=options.batch_size)


def compare_tasks(
    harness: Harness,
    old: Checkpoint,
    new: Checkpoint,
    report: Report,
    *,
    dtype: str,
    notify: Callable[[str], None],
) -> None:
    """Fills the report's metrics `tasks` (task -> metric -> [old, new]) and `task_settings`."""
    import torch

    found: list[dict[str, Any]] = []
    for checkpoint in (old, new):
        notify(f"Running {harness.told} on {checkpoint.ref} ({len(found) + 1} of 2 models) ...")
        start = time.monotonic()
        assert checkpoint.folder is not None
        model = load_model(checkpoint, dtype)
        if torch.cuda.is_available():
            model = model.to("cuda")  # tasks run a model thousands of times
        found.append(harness.run(model, load_tokenizer(checkpoint.folder, checkpoint.ref), checkpoint.ref))
        notify(f"... took {time.monotonic() - start:.0f} s.")
        del model
        gc.collect()  # the harness's wrapper and the model hold each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    before, after = found
    report.metrics["tasks"] = side_by_side(before.get("results") or {}, after.get("results") or {})
    report.metrics["task_settings"] = {
        "harness": f"lm-eval {harness.version}",
        "dtype": dtype,
        "limit": harness.limit,
        "batch_size": harness.batch_size,
        "tasks": {name: _settings(after, name) for name in report.metrics["tasks"]},
        "groups": {k: list(v) for k, v in (after.get("group_subtasks") or {}).items() if v},
    }


def side_by_side(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, dict[str, list[float | None]]]:
    """task -> metric -> [old, new]. What the harness calls `acc,none` is `acc` here; another filter's name stays, as in `exact_match,strict`.

    Standard errors keep their place beside, as `acc_stderr`; what is no number in either model ("N/A") is left out.
    """
    tables: dict[str, dict[str, list[float | None]]] = {}
    for task in [*after, *(t for t in before if t not in after)]:
        pair = [_numbers(side.get(task) or {}) for side in (before, after)]
        tables[task] = {metric: [pair[0].get(metric), pair[1].get(metric)] for metric in {**pair[0], **pair[1]}}
    return tables


def _numbers(results: Mapping[str, Any]) -> dict[str, float]:
    found = {}
    for key, value in results.items():
        metric, comma, name = key.partition(",")
        if comma and isinstance(value, numbers.Real) and not isinstance(value, bool):
            found[metric if name == "none" else key] = float(value)
    return found


def _settings(results: Mapping[str, Any], task: str) -> dict[str, Any]:
    """Shots, examples, version and which way is up, as far as the harness tells them for a task (a group has no shots of its own)."""
    examples = (results.get("n-samples") or {}).get(task) or {}
    return {
        "shots": (results.get("n-shot") or {}).get(task),
        "examples": examples.get("effective"),
        "version": (results.get("versions") or {}).get(task),
        "higher_is_better": dict((results.get("higher_is_better") or {}).get(task) or {}),
    }
