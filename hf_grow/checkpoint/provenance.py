"""What growth.json says besides the plan: how the checkpoint was grown before, what was trained since, which files were written.

A record may come from anywhere: what has not the right form is left out, never believed, and nothing here raises.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

MOST_STAGES = 100


def growth_history(growth: Mapping[str, Any] | None) -> tuple[Mapping[str, Any], ...]:
    """All growths of a checkpoint, oldest first, without their maps; `training` of one: what was trained after it."""
    if not growth:
        return ()
    try:
        step = {
            "source": {k: growth["source"][k] for k in ("ref", "revision")},
            **{k: growth["growth"][k] for k in ("method", "options", "guarantee")},
            "layers": [_depth(growth["source"]["config"]), _depth(growth["target"]["config"])],
        }
        found = training_stages(growth)
        return (*map(dict, growth["source"].get("history", ())), step | ({"training": training_totals(found)} if found else {}))
    except (KeyError, TypeError, ValueError, AttributeError):
        return ()


def _depth(config: Mapping[str, Any]) -> Any:
    return config.get("num_hidden_layers")


def training_stages(growth: Mapping[str, Any] | None) -> tuple[Mapping[str, Any], ...]:
    """What was trained (or merged, from an adapter) since the growth, oldest first; empty for weights as they were grown."""
    found: list[Mapping[str, Any]] = []
    stage = growth.get("training") if growth else None
    while (
        isinstance(stage, Mapping)
        and (positive_int(stage.get("steps")) or isinstance(stage.get("adapter"), Mapping))
        and len(found) < MOST_STAGES
    ):
        found.append(stage)
        stage = stage.get("earlier")
    return tuple(reversed(found))


def training_totals(stages: tuple[Mapping[str, Any], ...]) -> dict[str, int]:
    """Steps and tokens of all training_stages together, and adapters merged."""
    return {
        "steps": sum(positive_int(s.get("steps")) for s in stages),
        "tokens": sum(positive_int(s.get("tokens")) for s in stages),
        "adapters": sum(isinstance(s.get("adapter"), Mapping) for s in stages),
    }


def describe_training(training: object) -> str:
    """'trained for 12 steps (384 tokens)'; `training`: what `training_totals` gives, or a file says that it gave. Empty where there was nothing."""
    if not isinstance(training, Mapping):
        return ""
    steps, tokens, adapters = (positive_int(training.get(k)) for k in ("steps", "tokens", "adapters"))
    parts = [f"trained for {steps:,} steps" + (f" ({tokens:,} tokens)" if tokens else "")] if steps else []
    parts += [f"merged with {adapters} adapter{'s' * (adapters > 1)}"] if adapters else []
    return " and ".join(parts)


def positive_int(value: object) -> int:
    """A number of things; 0 for what is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**63 else 0


def recorded_files(growth: Mapping[str, Any] | None) -> Mapping[str, Mapping[str, Any]]:
    """Weight file -> size and sha256, as whatever wrote the weights last recorded them; empty where nothing did."""
    growth = growth or {}
    part = growth.get("training") if training_stages(growth) else growth.get("target")
    files = part.get("files") if isinstance(part, Mapping) else None
    return files if isinstance(files, dict) and all(isinstance(f, dict) for f in files.values()) else {}


def add_training_stage(growth: Mapping[str, Any], stage: Mapping[str, Any]) -> dict[str, Any]:
    """growth.json after `stage`. What speaks of the weights as they were goes into the stage, or goes."""
    record = {k: v for k, v in growth.items() if k not in ("verification", "training")}
    record["target"] = {k: v for k, v in growth["target"].items() if k != "files"}
    section = dict(stage)
    if "verification" in growth:
        section["verification_before"] = growth["verification"]
    if "training" in growth:
        section["earlier"] = growth["training"]
    return {**record, "training": section}


def format_growth_json(record: Mapping[str, Any]) -> str:
    """growth.json as it is written: an entry a line down to the third level, and what is deeper on that line. Fully indented, the record of a
    model with many experts is several times as large, and no easier to read."""
    return _indented(record, "\n", 3) + "\n"


def _indented(value: object, line: str, levels: int) -> str:
    inner = line + "  "
    if levels and isinstance(value, Mapping) and value:
        entries = (f"{json.dumps(str(k), ensure_ascii=False)}: {_indented(v, inner, levels - 1)}" for k, v in value.items())
        return "{" + inner + f",{inner}".join(entries) + line + "}"
    if levels and isinstance(value, list | tuple) and any(isinstance(v, Mapping) for v in value):
        return "[" + inner + f",{inner}".join(_indented(v, inner, 0) for v in value) + line + "]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
