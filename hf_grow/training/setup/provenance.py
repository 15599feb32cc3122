"""growth.json of a trained model: the growth's, with a `training` section (docs/growth-json.md)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_grow.checkpoint.provenance import add_training_stage
from hf_grow.checkpoint.reader import GROWTH, hash_weight_files, open_folder
from hf_grow.convert.metadata import versions

if TYPE_CHECKING:
    from hf_grow.training.setup.train_setup import TrainSetup

SECRET = ("hub_token",)
"""Keys of a recipe that are written down nowhere."""


def kept(given: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe as it is recorded."""
    return {k: v for k, v in given.items() if k not in SECRET}


def record_of(checked: TrainSetup, facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """None for a model that was not grown."""
    grown = checked.checkpoint.growth
    if grown is None:
        return None
    revision = {"revision": checked.checkpoint.revision} if checked.checkpoint.revision else {}
    stage = {"recipe": kept(checked.read.given), "model": checked.checkpoint.ref, **revision, **facts, "made_by": versions()}
    return add_training_stage(grown, stage)


def note_files(folder: Path) -> None:
    """Adds the files of a trained model to its growth.json, where it has one."""
    from hf_grow.training.trainer.checkpointing import write_json

    record = open_folder(folder).growth
    if record is not None:
        write_json(folder / GROWTH, {**record, "training": {**record["training"], "files": hash_weight_files(folder)}})
