"""Finding the checkpoint to resume from, and writing JSON files atomically."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from hf_grow.checkpoint.provenance import format_growth_json
from hf_grow.common.safe_files import read_bytes, replace_nonfinite
from hf_grow.errors import SourceError
from hf_grow.training.growth_state.state_files import GROWTH_STATE

PENALTY, PENALTY_SHARDS = "penalty.pt", "penalty.json"
"""In every checkpoint of a training with a penalty: its state, whole; of a sharded training what is no tensor, the tensors in penalty/."""


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint: Trainer writes trainer_state.json last, so an interrupted checkpoint has none, or an incomplete one."""
    checkpoints = sorted(
        folder.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]) if p.name.rpartition("-")[2].isdigit() else -1
    )
    for path in reversed(checkpoints):
        try:
            state = json.loads(read_bytes(path / "trainer_state.json"))  # not read_json: Trainer writes NaN into its log
        except (SourceError, ValueError):
            continue
        if isinstance(state, dict) and (path / GROWTH_STATE).is_file():
            return path
    return None


def write_json(path: Path, data: Any) -> None:
    """Replaces the file atomically."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(format_growth_json(replace_nonfinite(data, nonfinite=str)), encoding="utf-8")
    os.replace(temporary, path)
