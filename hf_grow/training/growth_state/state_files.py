"""State files of hf-grow in a training checkpoint, and the warning about an unfinished consolidation."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_grow.common.safe_files import read_json
from hf_grow.errors import SourceError

GROWTH_STATE = "growth_state.json"
"""In every checkpoint of `hf-grow train`: step of the last growth, baselines, and the state of the monitor."""
DATA_STATE = "data_state.json"
"""In the same folder: the data position of the run."""
NEXT_STEP = "Delete this checkpoint, and resume from an earlier one."
"""The hint of errors about a damaged one."""


@contextmanager
def damaged_state(path: Path) -> Iterator[None]:
    """Inside, errors about the content of a state file become a SourceError."""
    try:
        yield
    except SourceError as error:
        raise error if error.hint else SourceError(error.message, hint=NEXT_STEP) from None
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise SourceError(f"{path} is damaged: {reason}.", hint=NEXT_STEP) from None


def read_torch_state(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    """The dictionary in a file of torch.save, on the CPU; no code in it is executed. ``mmap``: tensors are read when they are used.

    Raises SourceError for a damaged file.
    """
    import torch

    with damaged_state(path):
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        if not isinstance(found, dict):
            raise ValueError("it holds no dictionary")
    return found


def warn_if_consolidating(checkpoint: Path, notify: Callable[[str], None]) -> None:
    """Notifies if the consolidation after the last growth (after_growth.consolidate_steps of the recipe) is not finished."""
    try:
        left = read_json(checkpoint / GROWTH_STATE)["consolidation_left"]
    except (SourceError, KeyError):
        return
    if isinstance(left, int) and left > 0:
        notify(f"{checkpoint} is still consolidating after its last growth: its recipe asks for {left} more steps before the next one.")
