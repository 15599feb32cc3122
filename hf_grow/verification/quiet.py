"""Running a library that talks: its warnings and bars are held back, it gets the seeds it expects, and paths count from a folder."""

from __future__ import annotations

import contextlib
import io
import logging
import random
from collections.abc import Iterator
from pathlib import Path

LOGGERS = ("lm_eval", "datasets", "evaluate", "huggingface_hub", "transformers")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No log lines, no bars, no prints of the libraries: stdout is for the result, and stderr has one bar at most, which is ours."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    sink = io.StringIO()
    with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextlib.contextmanager
def seeded() -> Iterator[None]:
    """The seeds that the harness's own command sets, and the caller's generators as they were afterwards."""
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


@contextlib.contextmanager
def inside(folder: Path | None) -> Iterator[None]:
    """Relative paths count from this folder. Of the whole process, so keep it short; nothing where the folder is None."""
    if folder is None:
        yield
        return
    with contextlib.chdir(folder):
        yield


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
