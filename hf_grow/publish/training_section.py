"""Facts for a card from the `training` section of growth.json: what was trained since the growth, and the recipes to repeat it.

The section may come from anyone: values of an unexpected form are left out. Local paths are reduced to their last part.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hf_grow.checkpoint.provenance import positive_int, training_stages, training_totals
from hf_grow.common import yaml_io
from hf_grow.publish.eval_section import mapping, number
from hf_grow.publish.names import folder_name, is_hub_id, public_path

MOST_LISTED = 20
MAX_RECIPE = 20_000  # characters
MAX_DEPTH = 12
USES = ("train", "replay")
NOT_SHOWN = ("model", "revision", "output", "hub_token")
"""Keys of a recipe that the card leaves out, or replaces."""

Stage = Mapping[str, Any]


def training_facts(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Everything that a card says of the trainings since the growth; None for weights as they were grown."""
    stages = training_stages(record)
    if not stages:
        return None
    described = [_stage_facts(stage) for stage in stages]
    trained = [stage for stage in described if stage["steps"]]
    return {**training_totals(stages), "stages": described, "trainings": len(trained), "last": trained[-1] if trained else None}


def _stage_facts(stage: Stage) -> dict[str, Any]:
    """One training, or an adapter that was merged (then without steps)."""
    recipe = mapping(stage, "recipe")
    losses = list(_losses(stage))
    regularizer, distill, lora = mapping(recipe, "regularizer"), recipe.get("distill"), recipe.get("lora")
    teachers = mapping(recipe, "distill").get("teachers")
    models = [t.get("model", "source") if isinstance(t, Mapping) else t for t in teachers] if isinstance(teachers, list) else ["source"]
    return {
        "steps": positive_int(stage.get("steps")),
        "tokens": positive_int(stage.get("tokens")),
        "flops": number(stage.get("flops")),
        "adapter": _settings(mapping(stage, "adapter")),
        "train": _listed(recipe.get("train", "everything")),
        "freeze": _listed(recipe.get("freeze")),
        "regularizer": None
        if regularizer.get("kind") in (None, "none")
        else {"kind": str(regularizer["kind"]), "settings": _settings({k: v for k, v in regularizer.items() if k != "kind"})},
        "teachers": _listed([public_path(m) for m in models if isinstance(m, str)]) if isinstance(distill, Mapping) else [],
        "lora": _settings(lora) if isinstance(lora, Mapping) else None,
        "settings": [
            (title, recipe[key])
            for key, title in (("learning_rate", "learning rate"), ("lr_scheduler_type", "lr scheduler"), ("seed", "seed"))
            if isinstance(recipe.get(key), str | int | float)
        ],
        "texts": _texts(stage),
        "losses": losses,
        "old": next((x for x in losses if x["old"]), None),
        "measured": [x for x in losses if x["rise"] is not None],
        "source_measured": any(x["source"] is not None for x in losses),
    }


def _losses(stage: Stage) -> Iterator[dict[str, Any]]:
    """Losses of the named sets in nats per token. `rise`: over the source's loss where that was measured, else over the start. `old`: the set
    that forgetting is measured on."""
    start, end, source = (mapping(stage, "losses", key) for key in ("start", "end", "source"))
    for name in list(dict.fromkeys([*start, *end]))[:MOST_LISTED]:
        loss: dict[str, Any] = {"start": number(start.get(name)), "end": number(end.get(name)), "source": number(source.get(name))}
        before = loss["start"] if loss["source"] is None else loss["source"]
        rise = None if before is None or loss["end"] is None else loss["end"] - before
        if loss["start"] is not None or loss["end"] is not None:
            yield {
                "name": str(name),
                **loss,
                "rise": rise,
                "old": name == mapping(stage, "recipe").get("old_set", "old") and rise is not None,
            }


def _settings(options: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The scalar values of a section."""
    shown = [(k, v) for k, v in options.items() if isinstance(v, str | int | float) and not isinstance(v, bool)]
    return [(str(k), public_path(v) if isinstance(v, str) else v) for k, v in shown[:MOST_LISTED]]


def _listed(value: Any) -> list[str]:
    values = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return [v for v in values[:MOST_LISTED] if isinstance(v, str)]


def _texts(stage: Stage) -> list[dict[str, Any]]:
    """The texts of a training: share, tokens, and passes over them."""
    parts = stage.get("data")
    parts = [p for p in parts if isinstance(p, Mapping) and isinstance(p.get("label"), str)] if isinstance(parts, list) else []
    parts.sort(key=lambda part: USES.index(str(part["use"])) if str(part.get("use")) in USES else len(USES))
    return [
        {
            "use": str(part.get("use", "")),
            "label": ", ".join(map(public_path, part["label"].split(", "))),
            **{key: number(part.get(key)) for key in ("share", "tokens", "passes")},
        }
        for part in parts[:MOST_LISTED]
    ]


def reproduce_trainings(record: Mapping[str, Any], name: str) -> tuple[str, list[dict[str, Any]]]:
    """How to repeat the trainings: the folder that the growth has to write, and for each training its recipe `file`, the `recipe` (None where none
    was recorded that can be shown), the `output` folder, and the files it reads that other commands wrote (`fisher`, `replay`).

    name: the output folder of the last training.
    """
    stages = training_stages(record)
    if not stages:
        return name, []
    models: list[str] = []
    for stage in stages:
        model = stage.get("model") or stage.get("merged_into")
        folder = re.sub(r"[^\w.-]", "_", folder_name(model)) if isinstance(model, str) else "grown"
        models.append(folder if folder not in (name, *models) else f"{name}-{len(models)}")
    described = [
        {
            "file": "train.yaml" if len(stages) == 1 else f"train-{i + 1}.yaml",
            "recipe": _recipe(stage, models[i]) if positive_int(stage.get("steps")) else None,
            "output": output,
            "fisher": _public_paths(mapping(stage, "recipe", "regularizer").get("fisher")),
            "replay": _public_paths(mapping(stage, "recipe", "data", "replay").get("path")),
        }
        for i, (stage, output) in enumerate(zip(stages, [*models[1:], name], strict=True))
    ]
    return models[0], described


def _public_paths(value: Any) -> list[str]:
    return [public_path(path) for path in _listed(value)]


def _recipe(stage: Stage, model: str) -> str | None:
    given, revision = stage.get("model"), stage.get("revision")
    on_hub = is_hub_id(given) and isinstance(revision, str) and bool(re.fullmatch(r"[0-9a-f]{7,64}", revision))
    head = {"model": given, "revision": revision} if on_hub else {"model": f"./{model}"}
    renamed = {given: f"./{model}"} if isinstance(given, str) and not on_hub else {}
    recipe = mapping(stage, "recipe")
    try:
        rest = {k: _without_local_paths(v, renamed) for k, v in recipe.items() if k not in NOT_SHOWN}
    except RecursionError:
        return None
    text = yaml_io.dumps({**head, **rest})
    return text if recipe and len(text) <= MAX_RECIPE else None


def _without_local_paths(value: Any, renamed: Mapping[str, str], depth: int = 0) -> Any:
    """A value of a recipe with local paths reduced. Raises RecursionError for one nested too deeply."""
    if depth > MAX_DEPTH:
        raise RecursionError
    if isinstance(value, Mapping):
        return {k: _without_local_paths(v, renamed, depth + 1) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_without_local_paths(v, renamed, depth + 1) for v in value]
    return renamed.get(value) or public_path(value) if isinstance(value, str) else value
