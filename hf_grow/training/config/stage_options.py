"""The `stages` of a training recipe: what each changes, how its model grows from that of the stage before, and what ends it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hf_grow.errors import InputError
from hf_grow.options import Options, validate
from hf_grow.training.config.train_config import RecipeData, read_recipe
from hf_grow.training.config.trigger_options import Trigger, Until

SCHEDULE: Mapping[str, Any] = {"lr_scheduler_type": "warmup_stable_decay"}
"""Default schedule of a run in stages: growth in its stable phase, one decay at the end of the run."""
DECAY_SHARE = 0.2
"""Share of all steps that decay, by default."""
PER_RUN = ("model", "revision", "output", "tokenizer", "max_steps", "num_train_epochs", "seed", "stages", "resume_from_checkpoint")
"""Keys that a stage cannot change."""


NOT_IN_STAGES: Mapping[str, str] = {
    "early_stopping_patience": "ends a training by its best checkpoint. In stages use until: {plateau: ...}.",
    "load_best_model_at_end": "a stage goes on from its last weights.",
    "save_only_model": "a stage needs the optimizer's state of the one before.",
}
"""Keys of a recipe that have no meaning in stages."""


class FreshModel(Options):
    """A model that starts from random weights."""

    config: str
    """A config.json or YAML file with its keys, or a checkpoint whose config to take."""
    tokenizer: str
    """Checkpoint folder or Hub id of the tokenizer."""


class StageKeys(Options):
    """The keys of a stage besides those of a recipe, which it changes for its own steps."""

    name: str = ""
    """Name, for logs."""
    until: Until | None = None
    """What ends the stage. Default for the last one: the end of the run."""
    grow: dict[str, Any] | None = None
    """How its model grows from that of the stage before: `method` and its options, as in a growth recipe. Default: it does not grow."""
    optimizer_policy: Literal["map", "keep-and-zero", "reset"] = "map"
    """What becomes of the optimizer's state in that growth (docs/optimizer-state.md)."""
    anchor: Literal["run", "stage"] = "run"
    """Where a regularizer holds the weights: at the run's first weights, grown along with the model (run), or at those of the stage's beginning."""


@dataclass(frozen=True)
class Stage:
    """One stage: its keys and its whole recipe."""

    index: int
    keys: StageKeys
    recipe: Mapping[str, Any]
    """Keys of a training recipe, without the model."""

    @property
    def folder(self) -> str:
        return f"stage-{self.index:02d}"

    @property
    def title(self) -> str:
        return self.keys.name or self.folder


def is_staged(data: Mapping[str, Any]) -> bool:
    return data.get("stages") is not None


def read_stages(data: Mapping[str, Any]) -> tuple[Stage, ...]:
    """The stages of a recipe. Raises InputError that lists every mistake, each with its stage."""
    given = data["stages"]
    if not isinstance(given, list) or not given or not all(isinstance(s, dict) for s in given):
        raise InputError(
            "stages: should be a list of mappings.", hint="As in: stages: [{until: {tokens: 20M}}, {grow: {method: identity}}]"
        )
    errors: list[str] = []
    base = _with_schedule({k: v for k, v in data.items() if k not in ("stages", "model", "output", "revision")}, errors)
    if data.get("grow") is not None:
        errors.append("grow: belongs to a stage: stages: [{grow: ...}, ...].")
        del base["grow"]
    if isinstance(data.get("model"), Mapping) and data.get("revision") is not None:
        errors.append("revision: a fresh model has none.")
    sets = _eval_sets(data)
    stages = []
    for i, stage in enumerate(given):
        own = {k: v for k, v in stage.items() if k in StageKeys.model_fields}
        changes = {k: v for k, v in stage.items() if k not in own}
        keys, mistakes = validate(StageKeys, own)
        mistakes += [f"{k}: cannot change in a stage." for k in changes if k in PER_RUN]
        if "lr_scheduler_type" in changes:
            changes.setdefault("lr_scheduler_kwargs", None)  # those of the run are another schedule's
        recipe = merged(base, {k: v for k, v in changes.items() if k not in PER_RUN})
        recipe = {k: v for k, v in recipe.items() if k != "lr_scheduler_kwargs" or v is not None}
        mistakes += read_recipe({**recipe, "model": "."}).mistakes
        mistakes += [f"{k}: {why}" for k, why in NOT_IN_STAGES.items() if recipe.get(k)]
        if recipe.get("save_strategy") in ("no", False):
            mistakes.append("save_strategy: a stage starts from the last checkpoint of the one before. Use steps.")
        if keys is not None and i < len(given) - 1 and keys.until is None:
            mistakes.append("until: is missing; every stage but the last needs it.")
        if keys is not None and keys.grow is None and "optimizer_policy" in own:
            mistakes.append("optimizer_policy: has no effect without grow.")
        if keys is not None and keys.until is not None:
            mistakes += [f"until: there is no {name!r}. Known: {', '.join(known)}." for name, known in _unknown_names(keys.until, sets)]
        errors += [f"stages.{i}.{m}" for m in mistakes]
        if keys is not None:
            stages.append(Stage(i, keys, recipe))
    if errors:
        raise InputError("The recipe has " + f"{len(errors)} mistake{'s' * (len(errors) > 1)}:\n  " + "\n  ".join(errors))
    return tuple(stages)


def recipe_of(stage: Stage, model: str, **changes: Any) -> RecipeData:
    """The recipe that a stage trains by. ``model``: what it starts from, or grows from."""
    growth: dict[str, Any] = {}
    if stage.keys.grow is not None:
        growth["grow"] = {"optimizer_policy": stage.keys.optimizer_policy, **stage.keys.grow}
    return read_recipe({**stage.recipe, "model": model, **growth, **changes}, f"Stage {stage.index} of the recipe")


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe with changed keys; nested sections are changed key by key."""
    out = dict(base)
    for key, value in changes.items():
        old = out.get(key)
        out[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return out


def _with_schedule(data: dict[str, Any], errors: list[str]) -> dict[str, Any]:
    """With the default schedule over the whole run, whose length must be known."""
    steps = data.get("max_steps")
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        errors.append("max_steps: is missing; a run in stages needs its length in steps.")
        return data
    if "lr_scheduler_type" in data:
        return data
    given = data.get("lr_scheduler_kwargs") or {}
    return {**data, **SCHEDULE, "lr_scheduler_kwargs": {"num_decay_steps": max(1, round(DECAY_SHARE * steps)), **given}}


def _eval_sets(data: Mapping[str, Any]) -> list[str]:
    section = data.get("data")
    sets = section.get("eval") if isinstance(section, Mapping) else None
    return [str(n) for n in sets] if isinstance(sets, Mapping) else []


def _unknown_names(trigger: Trigger, sets: Sequence[str]) -> Iterator[tuple[str, Sequence[str]]]:
    """Names of losses and metrics that no training measures, with those that it does."""
    losses, metrics = ["train", *sets], ["loss", "grad_norm", *sets, "forgetting", "kl"]
    for part, known in ((trigger.plateau, losses), (trigger.forecast, losses)):
        if part is not None and part.on not in known:
            yield part.on, known
    if trigger.metric is not None and trigger.metric.name not in metrics:
        yield trigger.metric.name, metrics
    for member in (*(trigger.any or ()), *(trigger.all or ())):
        yield from _unknown_names(member, sets)
