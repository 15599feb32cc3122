"""Work on files that all processes of a training do together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import distributed

from hf_grow.common.safe_files import error_text
from hf_grow.errors import ExecutionError, GrowError


def is_first() -> bool:
    """Whether this is the first process."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


@contextmanager
def on_every_process(folder: Path) -> Iterator[None]:
    """Waits for all processes at the end; any error of one while it writes to `folder` is raised on all."""
    failed: Exception | None = None
    try:
        yield
    except OSError as error:
        failed = ExecutionError(f"{folder} could not be written: {error_text(error)}.", hint="Free some disk space, or choose another.")
    except Exception as error:
        failed = error
    if distributed.is_initialized():
        found: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(found, None if failed is None else _texts(failed))
        first = next((f for f in found if f is not None), None)
        if failed is None and first is not None:
            failed = ExecutionError(first[0], hint=first[1])
    if failed is not None:
        raise failed


def _texts(error: Exception) -> tuple[str, str]:
    """Message and hint of an error for the other processes."""
    return (error.message, error.hint) if isinstance(error, GrowError) else (f"Another process failed: {type(error).__name__}: {error}", "")


def make_shared_folder(folder: Path) -> None:
    """Creates a folder that every process sees. Raises an error on all of them where one does not."""
    with on_every_process(folder):
        if is_first():
            folder.mkdir(parents=True, exist_ok=True)
    with on_every_process(folder):
        if not folder.is_dir():
            raise ExecutionError(
                f"{folder}, which the first process created, is not there for process {distributed.get_rank()}.",
                hint="All processes write to it: give the full path of a folder on shared storage.",
            )
