"""A folder of sampled text: its files, and what its record says."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_grow.common.safe_files import read_json
from hf_grow.errors import InputError, SourceError
from hf_grow.training.config.replay_options import ReplayOptions

if TYPE_CHECKING:
    pass

TEXTS = "texts.jsonl"


RECORD = "replay.json"


FORMAT = 2


def read_record(folder: Path) -> dict[str, Any] | None:
    """replay.json of a folder, or None where there is none. Raises InputError if it cannot be used."""
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        record = read_json(path)
        numbers = (record["tokens"], record["bytes"], record["counts"]["tokens"])
        if record["format"] != FORMAT or not all(isinstance(n, int) for n in numbers) or not isinstance(record["complete"], bool):
            raise ValueError
        if not isinstance(record["model"], str) or not isinstance(record["settings"], dict):
            raise ValueError
    except (SourceError, ValueError, KeyError, TypeError):
        raise InputError(f"{path} is damaged, or of another version of hf-grow.", hint="Sample again with --overwrite.") from None
    return dict(record)


def command(record: Mapping[str, Any], folder: Path) -> str:
    """The command that goes on with the samples of a folder: model, settings and number of tokens as its record has them."""
    given = {name: record["settings"].get(name) for name in ReplayOptions.model_fields} | {"tokens": record["tokens"]}
    words = ["hf-grow", "replay", record["model"] or "MODEL", *(("--revision", record["revision"]) if record.get("revision") else ())]
    words += ["-o", folder]
    for name, value in given.items():
        if value is not None and value != ReplayOptions.model_fields[name].default:
            words += [f"--{name.replace('_', '-')}", value]
    return shlex.join(map(str, words))
