"""Whether a training has had its time since its last growth, as its checkpoint says; growth commands warn where it has not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hf_grow.common.safe_files import read_json
from hf_grow.errors import SourceError

GROWTH_STATE = "growth_state.json"
"""In every checkpoint of `hf-grow train`: where the run stands since the growth, and what the monitor knows."""
DATA_STATE = "data_state.json"
"""Beside it: where in its text the run stands."""


def warn_unsettled(checkpoint: Path, notify: Callable[[str], None]) -> None:
    """Tells of a consolidation (after_growth.consolidate_steps of the recipe) that is not over. Silent for any other checkpoint."""
    try:
        left = read_json(checkpoint / GROWTH_STATE)["consolidation_left"]
    except (SourceError, KeyError):
        return
    if isinstance(left, int) and left > 0:
        notify(f"{checkpoint} was grown a short while ago: its recipe asks for {left} more steps before the next growth.")
