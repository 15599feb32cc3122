"""Tasks of lm-evaluation-harness: found, loaded, refused before anything runs what cannot run, and run on one model.

A task may name Python code, in YAML (`!function`) or as a metric of `evaluate`, and the harness runs it: use task files that you trust.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_grow.common import yaml_io as yaml_text
from hf_grow.common.safe_files import read_text
from hf_grow.errors import ExecutionError, InputError
from hf_grow.options import MAX_YAML
from hf_grow.verification.quiet import first_line, inside, quiet, seeded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

YAML = (".yaml", ".yml")
FEWSHOT_SEED = 1234
"""The harness's own default: which examples are shown before a question follows from it."""


@dataclass(frozen=True)
class _Spec:
    """One thing to load, as the harness wants it: the name of a task, of a group of a file, or a file with one task."""

    name: str
    file: Path | None = None
    """Paths inside a file count from its folder."""


class Harness:
    """The chosen tasks, loaded and checked. Raises InputError for whatever would fail later for a reason that is known now."""

    def __init__(self, tasks: str, *, limit: int | None = None, shots: int | None = None, batch_size: int = 8) -> None:
        if find_spec("lm_eval") is None:
            raise InputError("--tasks needs lm-evaluation-harness, which is not installed.", hint="pip install 'hf-grow[eval]'")
        try:
            with quiet():
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
        with quiet():
            # The index of its own tasks takes seconds to read; other files beside a task matter only to groups, which name them.
            groups = {f: str(named["group"]) for f in files if "group" in (named := _named(f))}
            folders = sorted({str(f.parent) for f in groups})
            self._manager: Any = TaskManager(include_path=folders or None, include_defaults=bool(names))
        _check_names(names, self._manager.all_tasks)
        self._specs = [_Spec(n) for n in names] + [_Spec(groups.get(f, str(f)), f) for f in files]
        self.names: list[str] = []
        self._loaded: dict[str, Any] | None = self._load()

    def _load(self) -> dict[str, Any]:
        """Tasks and groups with their data; anew for each model, since a task keeps the requests of its last run."""
        found: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
        for spec in self._specs:
            try:
                with quiet(), inside(spec.file.parent if spec.file else None):
                    loaded = self._manager.load([spec.name])
            except Exception as error:  # tasks fail in many ways; each is a reason, none is ours
                raise _unusable(spec, error) from None
            twice = sorted(found["tasks"].keys() & loaded["tasks"].keys())
            if twice:
                raise InputError(f"Task {twice[0]} is asked for twice.", hint="A group runs all of its tasks; leave them out.")
            for part, held in found.items():
                held.update(loaded.get(part) or {})
        for name, task in found["tasks"].items():
            _check_task(name, task)
            if self.shots is not None and task.get_config("num_fewshot") != 0:
                task.set_config(key="num_fewshot", value=self.shots)
            elif task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        self.names = list(found["tasks"])
        return found

    @property
    def told(self) -> str:
        """The names of the tasks, or the first of them."""
        return ", ".join(self.names[:4]) + (f" and {len(self.names) - 4} more" if len(self.names) > 4 else "")

    def run(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ref: str) -> dict[str, Any]:
        """The harness's results for one model, on the device it is on. Raises ExecutionError with what went wrong."""
        import torch
        from lm_eval import evaluator

        tasks, self._loaded = self._loaded or self._load(), None
        try:
            with quiet(), seeded():
                lm = self._model_class(pretrained=model, tokenizer=tokenizer, batch_size=self.batch_size)
                found = evaluator.evaluate(lm=lm, task_dict=tasks, limit=self.limit, log_samples=False)
        except torch.OutOfMemoryError:
            raise ExecutionError(
                f"Running tasks on {ref} takes more memory than the GPU has.",
                hint=f"Use a --batch-size below {self.batch_size}, or --dtype bfloat16.",
            ) from None
        except MemoryError:
            raise
        except Exception as error:
            raise ExecutionError(f"Running {self.told} on {ref} failed: {type(error).__name__}: {first_line(error)}") from None
        return dict(found or {})


# Finding tasks, and refusing


def _is_path(part: str) -> bool:
    """As for a source: what looks like a path, or is there; anything else is a name."""
    return part.endswith(YAML) or part.startswith((".", "/", "~")) or Path(part).expanduser().exists()


def _task_files(path: Path) -> list[Path]:
    """The files that hold a task or a group: the one given, or all of a folder; what others include only is none of them."""
    path = path.expanduser().absolute()
    if not path.exists():
        raise InputError(
            f"There is no task file {path}.", hint="Paths start with ., / or ~, or end in .yaml; anything else is a task's name."
        )
    if path.is_file():
        if not _named(path):
            raise InputError(f"{path} is no task file: it has neither `task` nor `group`.")
        return [path]
    found = [f for f in sorted(path.glob("**/*.yaml")) if "task" in _named(f)]
    if not found:
        raise InputError(f"{path} holds no task file: no *.yaml in it has a `task`.")
    return found


def _named(path: Path) -> dict[str, Any]:
    """The `group` of a YAML file, or its `task`, or neither. The tag !function is left alone: nothing is imported here."""
    import yaml

    try:
        data = yaml_text.loads(read_text(path, most=MAX_YAML, error=InputError), local_tags=True)
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise InputError(f"{path} must hold `key: value` lines, got {type(data).__name__}.")
    return next(({key: data[key]} for key in ("group", "task") if key in data), {})


def _check_names(names: list[str], known: list[str]) -> None:
    unknown = [n for n in names if n not in known]
    if unknown:
        lines = []
        for name in unknown:
            near = difflib.get_close_matches(name, known, n=4)
            lines.append(f"{name!r}" + (f" (near: {', '.join(near)})" if near else ""))
        raise InputError(f"Unknown task{'s' * (len(lines) > 1)}: {'; '.join(lines)}.", hint="`lm-eval ls tasks` lists them all.")


def _check_task(name: str, task: Any) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise InputError(f"Task {name} runs code that a model wrote; hf-grow does not.", hint="Run it with lm-eval itself, in a sandbox.")
    if getattr(task, "MULTIMODAL", False):
        raise InputError(f"Task {name} shows pictures or sound; these are language models.")
    own = getattr(getattr(task, "config", None), "process_results", None)  # then the names of metrics stand for nothing
    missing = [metric for metric, function in getattr(task, "_metric_fn_list", {}).items() if function is None and own is None]
    if missing:
        raise InputError(
            f"Task {name}: there is no metric {missing[0]!r} in the harness, nor could `evaluate` load it.",
            hint="A metric script of yours is a folder beside the task file, such as my_metric/my_metric.py, with `hf_evaluate: true`.",
        )


def _unusable(spec: _Spec, error: Exception) -> InputError:
    what = f"The task file {spec.file}" if spec.file else f"Task {spec.name}"
    chain = list(_causes(error))
    if any(isinstance(e, ConnectionError) or type(e).__name__ in ("HfHubHTTPError", "OfflineModeIsEnabled") for e in chain):
        return InputError(
            f"The data of {what[0].lower()}{what[1:]} cannot be fetched: {first_line(error)}",
            hint="Check network and proxy. What is in the cache of datasets needs none, nor does a task file whose data is on disk.",
        )
    if isinstance(error, FileNotFoundError) and spec.file:
        return InputError(f"{what}: {first_line(error)}", hint="Paths in a task file count from the file's folder.")
    return InputError(f"{what} cannot be used: {type(error).__name__}: {first_line(error)}")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
