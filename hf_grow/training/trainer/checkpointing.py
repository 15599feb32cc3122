"""Files of a training's output: finding the checkpoint to go on from, and writing JSON that is never half there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from hf_grow.checkpoint.provenance import format_growth_json
from hf_grow.common.safe_files import read_bytes, replace_nonfinite
from hf_grow.errors import SourceError
from hf_grow.training.growth_state.state_files import GROWTH_STATE

PENALTY = "penalty.pt"
"""In every checkpoint of a training with a penalty: what the penalty needs to go on."""


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole: Trainer writes trainer_state.json last, and one cut off by kill -9 has none, or half of one."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]) if p.name.rpartition("-")[2].isdigit() else -1)
    for path in reversed(found):
        try:
            state = json.loads(read_bytes(path / "trainer_state.json"))  # not strictly: Trainer writes NaN into its log
        except (SourceError, ValueError):
            continue
        if isinstance(state, dict) and (path / GROWTH_STATE).is_file():
            return path
    return None


def write_json(path: Path, data: Any) -> None:
    """In one step, so that no reader ever sees half of it."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(format_growth_json(replace_nonfinite(data, nonfinite=str)), encoding="utf-8")
    os.replace(temporary, path)
