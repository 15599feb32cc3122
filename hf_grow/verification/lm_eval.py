"""Loads tasks of lm-evaluation-harness, checks them before anything runs, and runs them on a model.

Task files can name Python code, in YAML (`!function`) or as a metric of `evaluate`, and the harness runs it: use only task files you trust.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_grow.common import yaml_io
from hf_grow.common.safe_files import read_text
from hf_grow.errors import ExecutionError, InputError
from hf_grow.options import MAX_YAML

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

YAML_SUFFIXES = (".yaml", ".yml")
FEWSHOT_SEED = 1234
"""The harness's default; it decides which examples are shown before each question."""
SILENCED_LOGGERS = ("lm_eval", "datasets", "evaluate", "huggingface_hub", "transformers")


@dataclass(frozen=True)
class _TaskSpec:
    """One thing to load, as the harness expects it: a task name, the name of a group in a file, or a file with one task."""

    name: str
    file: Path | None = None
    """Paths inside a task file are relative to its folder."""


class TaskRunner:
    """Tasks of lm-evaluation-harness, loaded and checked.

    Args:
        tasks: YAML task files, folders of them, or task names, separated by commas.
        limit: run only the first N examples of each task.
        shots: examples shown before each question; default: as the task says.
        batch_size: examples per forward pass.

    Raises InputError for everything that is known now to fail later.
    """

    def __init__(self, tasks: str, *, limit: int | None = None, shots: int | None = None, batch_size: int = 8) -> None:
        if find_spec("lm_eval") is None:
            raise InputError("--tasks needs lm-evaluation-harness, which is not installed.", hint="pip install 'hf-grow[eval]'")
        try:
            with silence_output():
                import lm_eval
                from lm_eval.models.huggingface import HFLM
                from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise InputError(f"lm-evaluation-harness cannot be imported: {first_line(error)}", hint="pip install 'hf-grow[eval]'") from None
        self.version: str = lm_eval.__version__
        self.limit, self.shots, self.batch_size = limit, shots, batch_size
        self._model_class: Any = HFLM
        given = [part.strip() for part in tasks.split(",") if part.strip()]
        if not given:
            raise InputError("--tasks is empty.", hint="Give a YAML task file, a folder of them, or names such as arc_easy,hellaswag.")
        files = [f for part in given if _is_path(part) for f in _task_files(Path(part))]
        names = [part for part in given if not _is_path(part)]
        with silence_output():
            # Indexing the built-in tasks takes seconds. Files next to a task matter only to groups, which refer to them by name.
            groups = {f: str(declared["group"]) for f in files if "group" in (declared := _declared(f))}
            folders = sorted({str(f.parent) for f in groups})
            self._manager: Any = TaskManager(include_path=folders or None, include_defaults=bool(names))
        _check_names(names, self._manager.all_tasks)
        self._specs = [_TaskSpec(n) for n in names] + [_TaskSpec(groups.get(f, str(f)), f) for f in files]
        self.names: list[str] = []
        self._loaded: dict[str, Any] | None = self._load()

    def _load(self) -> dict[str, Any]:
        """Tasks and groups with their data; loaded again for each model, because a task keeps the requests of its last run."""
        loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
        for spec in self._specs:
            try:
                # chdir affects the whole process, so only while loading
                with silence_output(), contextlib.chdir(spec.file.parent) if spec.file else contextlib.nullcontext():
                    parts = self._manager.load([spec.name])
            except Exception as error:  # tasks fail in many ways, none of them a bug here
                raise _load_error(spec, error) from None
            duplicates = sorted(loaded["tasks"].keys() & parts["tasks"].keys())
            if duplicates:
                raise InputError(
                    f"Task {duplicates[0]} is requested twice.", hint="A group runs all of its tasks; do not list them as well."
                )
            for part, content in loaded.items():
                content.update(parts.get(part) or {})
        for name, task in loaded["tasks"].items():
            _check_task(name, task)
            if self.shots is not None and task.get_config("num_fewshot") != 0:
                task.set_config(key="num_fewshot", value=self.shots)
            elif task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        self.names = list(loaded["tasks"])
        return loaded

    @property
    def summary(self) -> str:
        """The names of the tasks, shortened."""
        return ", ".join(self.names[:4]) + (f" and {len(self.names) - 4} more" if len(self.names) > 4 else "")

    def run(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ref: str) -> dict[str, Any]:
        """The harness's results for one model, on the model's device. Raises ExecutionError."""
        import torch
        from lm_eval import evaluator

        tasks, self._loaded = self._loaded or self._load(), None
        try:
            with silence_output(), harness_seeds():
                lm = self._model_class(pretrained=model, tokenizer=tokenizer, batch_size=self.batch_size)
                results = evaluator.evaluate(lm=lm, task_dict=tasks, limit=self.limit, log_samples=False)
        except torch.OutOfMemoryError:
            raise ExecutionError(
                f"Out of GPU memory while running tasks on {ref}.",
                hint=f"Use a --batch-size below {self.batch_size}, or --dtype bfloat16.",
            ) from None
        except MemoryError:
            raise
        except Exception as error:
            raise ExecutionError(f"Running {self.summary} on {ref} failed: {type(error).__name__}: {first_line(error)}") from None
        return dict(results or {})


# Finding and checking tasks


def _is_path(part: str) -> bool:
    """What looks like a path or exists is a path; anything else is a task name."""
    return part.endswith(YAML_SUFFIXES) or part.startswith((".", "/", "~")) or Path(part).expanduser().exists()


def _task_files(path: Path) -> list[Path]:
    """The given file, or all files of a folder that define a task (not those that are only included by others)."""
    path = path.expanduser().absolute()
    if not path.exists():
        raise InputError(
            f"Task file {path} does not exist.", hint="Paths start with ., / or ~, or end in .yaml; anything else is a task name."
        )
    if path.is_file():
        if not _declared(path):
            raise InputError(f"{path} is not a task file: it has neither `task` nor `group`.")
        return [path]
    files = [f for f in sorted(path.glob("**/*.yaml")) if "task" in _declared(f)]
    if not files:
        raise InputError(f"{path} contains no task file: none of its *.yaml files has a `task`.")
    return files


def _declared(path: Path) -> dict[str, Any]:
    """The `group` of a YAML file, else its `task`, else nothing. !function tags are ignored: nothing is imported here."""
    import yaml

    try:
        data = yaml_io.loads(read_text(path, max_bytes=MAX_YAML, error=InputError), local_tags=True)
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise InputError(f"{path} must contain `key: value` lines, got {type(data).__name__}.")
    return next(({key: data[key]} for key in ("group", "task") if key in data), {})


def _check_names(names: list[str], known: list[str]) -> None:
    lines = []
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=4)
            lines.append(f"{name!r}" + (f" (did you mean {', '.join(near)}?)" if near else ""))
    if lines:
        raise InputError(f"Unknown task{'s' * (len(lines) > 1)}: {'; '.join(lines)}.", hint="List all tasks with `lm-eval ls tasks`.")


def _check_task(name: str, task: Any) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise InputError(
            f"Task {name} executes code generated by the model, which hf-grow does not do.", hint="Run it with lm-eval in a sandbox."
        )
    if getattr(task, "MULTIMODAL", False):
        raise InputError(f"Task {name} is multimodal; only text tasks are supported.")
    own = getattr(getattr(task, "config", None), "process_results", None)  # then metric names need not exist
    missing = [metric for metric, function in getattr(task, "_metric_fn_list", {}).items() if function is None and own is None]
    if missing:
        raise InputError(
            f"Task {name}: metric {missing[0]!r} exists neither in the harness nor for `evaluate`.",
            hint="Put your own metric script into a folder next to the task file, such as my_metric/my_metric.py, with `hf_evaluate: true`.",
        )


def _load_error(spec: _TaskSpec, error: Exception) -> InputError:
    what = f"Task file {spec.file}" if spec.file else f"Task {spec.name}"
    if any(isinstance(e, ConnectionError) or type(e).__name__ in ("HfHubHTTPError", "OfflineModeIsEnabled") for e in _causes(error)):
        return InputError(
            f"{what}: its data cannot be downloaded: {first_line(error)}",
            hint="Check network and proxy. Cached datasets, and task files whose data is on disk, need no network.",
        )
    if isinstance(error, FileNotFoundError) and spec.file:
        return InputError(f"{what}: {first_line(error)}", hint="Paths in a task file are relative to the file's folder.")
    return InputError(f"{what} cannot be used: {type(error).__name__}: {first_line(error)}")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


# Calling the library


@contextlib.contextmanager
def silence_output() -> Iterator[None]:
    """Suppresses log messages, progress bars and prints of the libraries."""
    loggers = [logging.getLogger(name) for name in SILENCED_LOGGERS]
    levels = [logger.level for logger in loggers]
    discarded = io.StringIO()
    with contextlib.redirect_stdout(discarded), contextlib.redirect_stderr(discarded):
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextlib.contextmanager
def harness_seeds() -> Iterator[None]:
    """Sets the seeds of the `lm-eval` command, and restores the random states afterwards."""
    import numpy as np
    import torch

    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            random.seed(0)
            np.random.seed(1234)
            torch.manual_seed(1234)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def first_line(error: BaseException) -> str:
    """The first line of an error message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
