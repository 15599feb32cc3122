"""growth.json of a trained model: that of the growth, with a `training` section (docs/growth-json.md); and the files of a result."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_grow.checkpoint.provenance import add_training_stage
from hf_grow.checkpoint.reader import GROWTH, hash_weight_files, open_folder
from hf_grow.common.safe_files import read_json
from hf_grow.convert.metadata import versions
from hf_grow.model.config_compat import portable_config
from hf_grow.model.loading import output_flags
from hf_grow.training.setup.result_dtype import main_dtype
from hf_grow.training.trainer.checkpointing import write_json

if TYPE_CHECKING:
    from hf_grow.training.setup.train_setup import TrainSetup

SECRET = ("hub_token",)
"""Settings that are never recorded."""


def recorded_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as growth.json and training.json record them."""
    return {k: v for k, v in given.items() if k not in SECRET}


def growth_record(setup: TrainSetup, facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """growth.json after a training; None for a model that was not grown. ``facts``: steps, tokens, data, losses, ..."""
    growth = setup.checkpoint.growth
    if growth is None:
        return None
    revision = {"revision": setup.checkpoint.revision} if setup.checkpoint.revision else {}
    stage = {"recipe": recorded_settings(setup.given), "model": setup.checkpoint.ref, **revision, **facts, "made_by": versions()}
    return add_training_stage(growth, stage)


def finish_result(setup: TrainSetup, folder: Path) -> None:
    """config.json of a result as every reader takes it, and the digests of its weight files in growth.json."""
    source = setup.checkpoint.config
    config = read_json(folder / "config.json") | output_flags(source)  # loading had reset these
    config |= {"use_cache": source.get("use_cache", True), "dtype": main_dtype(folder)}  # Trainer turns the cache off
    write_json(folder / "config.json", portable_config(config))
    record = open_folder(folder).growth
    if record is not None:
        write_json(folder / GROWTH, {**record, "training": {**record["training"], "files": hash_weight_files(folder)}})
