"""Reads and writes the parts of growth.json beyond the plan: earlier growths, training after the growth, and the files written.

growth.json may come from anywhere: malformed parts are ignored, and reading them never raises.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

MAX_STAGES = 100


def growth_history(growth: Mapping[str, Any] | None) -> tuple[Mapping[str, Any], ...]:
    """All growths of a checkpoint, oldest first, without their tensor maps; with the totals of the training after each."""
    if not growth:
        return ()
    try:
        step = {
            "source": {k: growth["source"][k] for k in ("ref", "revision")},
            **{k: growth["growth"][k] for k in ("method", "options", "guarantee")},
            "layers": [growth[side]["config"].get("num_hidden_layers") for side in ("source", "target")],
        }
        stages = training_stages(growth)
        return (*map(dict, growth["source"].get("history", ())), step | ({"training": training_totals(stages)} if stages else {}))
    except (KeyError, TypeError, ValueError, AttributeError):
        return ()


def training_stages(growth: Mapping[str, Any] | None) -> tuple[Mapping[str, Any], ...]:
    """Training runs and merged adapters since the growth, oldest first."""
    stages: list[Mapping[str, Any]] = []
    stage = growth.get("training") if growth else None
    while (
        isinstance(stage, Mapping)
        and (positive_int(stage.get("steps")) or isinstance(stage.get("adapter"), Mapping))
        and len(stages) < MAX_STAGES
    ):
        stages.append(stage)
        stage = stage.get("earlier")
    return tuple(reversed(stages))


def training_totals(stages: tuple[Mapping[str, Any], ...]) -> dict[str, int]:
    """Total steps and tokens of all stages, and the number of merged adapters."""
    return {
        "steps": sum(positive_int(s.get("steps")) for s in stages),
        "tokens": sum(positive_int(s.get("tokens")) for s in stages),
        "adapters": sum(isinstance(s.get("adapter"), Mapping) for s in stages),
    }


def describe_training(training: object) -> str:
    """Totals from `training_totals`, or from a file, as text: 'trained for 12 steps (384 tokens)'; empty if there was no training."""
    if not isinstance(training, Mapping):
        return ""
    steps, tokens, adapters = (positive_int(training.get(k)) for k in ("steps", "tokens", "adapters"))
    parts = [f"trained for {steps:,} steps" + (f" ({tokens:,} tokens)" if tokens else "")] if steps else []
    parts += [f"merged with {adapters} adapter{'s' * (adapters > 1)}"] if adapters else []
    return " and ".join(parts)


def positive_int(value: object) -> int:
    """The value if it is a positive 63-bit integer, else 0."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**63 else 0


def recorded_files(growth: Mapping[str, Any] | None) -> Mapping[str, Mapping[str, Any]]:
    """Weight file -> size and SHA-256, as recorded by the last growth or training; empty if not recorded."""
    growth = growth or {}
    part = growth.get("training") if training_stages(growth) else growth.get("target")
    files = part.get("files") if isinstance(part, Mapping) else None
    return files if isinstance(files, dict) and all(isinstance(f, dict) for f in files.values()) else {}


def add_training_stage(growth: Mapping[str, Any], stage: Mapping[str, Any]) -> dict[str, Any]:
    """growth.json with a new training stage; entries about the previous weights move into the stage or are removed."""
    record = {k: v for k, v in growth.items() if k not in ("verification", "training")}
    record["target"] = {k: v for k, v in growth["target"].items() if k != "files"}
    section = dict(stage)
    if "verification" in growth:
        section["verification_before"] = growth["verification"]
    if "training" in growth:
        section["earlier"] = growth["training"]
    return {**record, "training": section}


def format_growth_json(record: Mapping[str, Any]) -> str:
    """The text of growth.json: indented down to the third level, compact below. Full indentation would make the file of a model with many experts
    several times larger."""
    return _indented(record, "\n", 3) + "\n"


def _indented(value: object, line: str, levels: int) -> str:
    inner = line + "  "
    if levels and isinstance(value, Mapping) and value:
        entries = (f"{json.dumps(str(k), ensure_ascii=False)}: {_indented(v, inner, levels - 1)}" for k, v in value.items())
        return "{" + inner + f",{inner}".join(entries) + line + "}"
    if levels and isinstance(value, list | tuple) and any(isinstance(v, Mapping) for v in value):
        return "[" + inner + f",{inner}".join(_indented(v, inner, 0) for v in value) + line + "]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
