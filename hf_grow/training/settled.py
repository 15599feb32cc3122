"""Whether a training has had its time since its last growth, as its checkpoint says; growth commands warn where it has not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

STATE = "growth_state.json"
"""In every checkpoint of `hf-grow train`: where the run stands since the growth, and what the monitor knows."""


def warn_unsettled(checkpoint: Path, notify: Callable[[str], None]) -> None:
    """Tells of a consolidation (after_growth.consolidate_steps of the recipe) that is not over. Silent for any other checkpoint."""
    try:
        left = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))["consolidation_left"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if isinstance(left, int) and left > 0:
        notify(f"{checkpoint} was grown a short while ago: its recipe asks for {left} more steps before the next growth.")
