"""State files of hf-grow in a training checkpoint, and the warning about an unfinished consolidation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hf_grow.common.safe_files import read_json
from hf_grow.errors import SourceError

GROWTH_STATE = "growth_state.json"
"""In every checkpoint of `hf-grow train`: step of the last growth, baselines, and the state of the monitor."""
DATA_STATE = "data_state.json"
"""In the same folder: the data position of the run."""


def warn_if_consolidating(checkpoint: Path, notify: Callable[[str], None]) -> None:
    """Notifies if the consolidation after the last growth (after_growth.consolidate_steps of the recipe) is not finished."""
    try:
        left = read_json(checkpoint / GROWTH_STATE)["consolidation_left"]
    except (SourceError, KeyError):
        return
    if isinstance(left, int) and left > 0:
        notify(f"{checkpoint} is still consolidating after its last growth: its recipe asks for {left} more steps before the next one.")
