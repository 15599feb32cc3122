"""The training recipe: hf-grow's sections and, at the top level beside them, any argument of transformers' TrainingArguments.

Types and keys are validated strictly here, and all mistakes are reported at once; files, tokenizer and Fisher are checked in `training/setup/recipe_checks.py`.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, ValidationError

from hf_grow.common.suggest import did_you_mean
from hf_grow.errors import InputError
from hf_grow.options import Options, nested_keys, unmet_requirements, validate
from hf_grow.training.config.data_options import DataOptions
from hf_grow.training.config.train_options import TrainOptions, contradictions, missing_eval_set

if TYPE_CHECKING:
    from transformers import TrainingArguments


class _ModelAndData(Options):
    model: str
    """Checkpoint folder or Hub id; usually a grown one, whose growth.json records what is new."""
    grow: dict[str, Any] | None = None
    """Grow `model` as it is loaded, without writing the grown checkpoint: method and its options, as in a growth recipe (docs/training.md)."""
    revision: str | None = None
    """Branch, tag or commit of a Hub repository."""
    stages: list[dict[str, Any]] | None = None
    """Stages with a growth between them: what ends each (`until`), how it grows (`grow`), and the keys that it changes (docs/stages.md)."""
    output: str | None = None
    """Folder for the trained model, its checkpoints and events.jsonl (also -o). Default: the model's name with -trained, in the current folder."""
    tokenizer: str | None = None
    """Checkpoint folder or Hub id of the tokenizer. Default: the model's own."""
    data: DataOptions
    """Texts: train, replay, eval, seq_length (docs/data.md)."""


class TrainRecipe(TrainOptions, _ModelAndData):
    """hf-grow's keys of a training recipe."""


SET_BY_HF_GROW = {"output_dir": "output", "do_train": "", "do_eval": "", "do_predict": "", "local_rank": "", "remove_unused_columns": "", "train_sampling_strategy": "",
        "label_names": "", "ignore_data_skip": "", "push_to_hub": "hf-grow push OUTPUT afterwards"}  # fmt: skip
"""TrainingArguments that hf-grow sets, and the key to use instead, if any."""
COMMAND_FLAGS = ("--resume", "--overwrite", "--dry-run", "--json", "--accelerate", "--processes")
"""Flags of `hf-grow train` that are not keys, for suggestions."""
DEFAULTS: Mapping[str, Any] = {
    "per_device_train_batch_size": 8, "num_train_epochs": 1.0, "learning_rate": 1e-4, "lr_scheduler_type": "cosine", "warmup_steps": 0.05,
    "weight_decay": 0.1, "adam_beta2": 0.95, "logging_steps": 10, "save_steps": 500, "save_total_limit": 2, "eval_steps": 100,
    "report_to": "none",
}  # fmt: skip
"""Defaults that differ from those of TrainingArguments."""
STEPS_ONLY: Mapping[str, Any] = {
    "save_strategy": "no", "eval_strategy": "no", "eval_on_start": False, "load_best_model_at_end": False, "report_to": "none",
    "resume_from_checkpoint": None,
}  # fmt: skip
"""TrainingArguments of a short run that is measured and thrown away."""


@dataclass(frozen=True)
class RecipeData:
    """A recipe with its valid keys, and its mistakes."""

    where: str
    given: Mapping[str, Any]
    """All keys of file and command line."""
    recipe: TrainRecipe | None
    arguments: Mapping[str, Any]
    """The valid TrainingArguments among them."""
    mistakes: tuple[str, ...]


def _in_range(low: float, below: float = math.inf, *, open: bool = False) -> AfterValidator:
    """Validates low <= value < below (open: low < value); other types pass."""
    words = f"should be {'more than' if open else 'at least'} {low:g}" + (f" and less than {below:g}" if below < math.inf else "")

    def check(value: Any) -> Any:
        if isinstance(value, int | float) and (value < low or (open and value == low) or value >= below):
            raise ValueError(f"{words}, got {value:g}.")
        return value

    return AfterValidator(check)


def _valid_max_steps(value: int) -> int:
    if value < 1 and value != -1:
        raise ValueError(f"{value} is not a number of steps. Remove max_steps to train for num_train_epochs.")
    return value


RANGES: Mapping[str, AfterValidator] = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "save_total_limit"), _in_range(1)),
    **dict.fromkeys(("weight_decay", "max_grad_norm", "save_steps", "eval_steps", "logging_steps", "warmup_steps", "seed"), _in_range(0)),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), _in_range(0, 1)),
    **dict.fromkeys(("learning_rate", "num_train_epochs", "adam_epsilon"), _in_range(0, open=True)),
    "max_steps": AfterValidator(_valid_max_steps),
}  # fmt: skip
"""Ranges that TrainingArguments does not validate, although training fails outside them."""


@cache
def training_arguments_model() -> type[Options]:
    """The fields of TrainingArguments as an options class, for the same strict validation and messages."""
    import dataclasses
    import enum
    import typing

    from pydantic import create_model
    from transformers import TrainingArguments

    hints = typing.get_type_hints(TrainingArguments)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(TrainingArguments):
        kinds = typing.get_args(hints[field.name]) or (hints[field.name],)
        enums = [k for k in kinds if isinstance(k, type) and issubclass(k, enum.Enum)]
        if field.name in SET_BY_HF_GROW or any("parallelism_config" in str(k) or "DebugOption" in str(k) for k in kinds):
            continue
        # An enum by its value.
        kind: Any = Literal[tuple(str(m.value) for m in enums[0])] if enums else hints[field.name]
        if field.name in RANGES:
            kind = Annotated[kind, RANGES[field.name]]
        fields[field.name] = (kind, None)
    model: type[Options] = create_model("Arguments", __base__=Options, **fields)
    return model


def read_recipe(data: Mapping[str, Any], where: str = "The recipe") -> RecipeData:
    """Validates keys and types of a recipe; opens no file. ``where`` names it in messages."""
    own = {k: v for k, v in data.items() if k in TrainRecipe.model_fields}
    known = training_arguments_model().model_fields
    # YAML parses `no` as false.
    if own.get("stages") and isinstance(own.get("model"), Mapping):
        own["model"] = ""  # a fresh model, which the run makes
    theirs = {k: "no" if v is False and k.endswith("_strategy") else v for k, v in data.items() if k in known}
    recipe, errors = validate(TrainRecipe, own)
    errors += unmet_requirements(recipe) if recipe else []
    _, more = validate(training_arguments_model(), theirs)
    errors += more
    for key in data.keys() - own.keys() - theirs.keys():
        instead = SET_BY_HF_GROW.get(key)
        if instead is not None:
            errors.append(f"{key}: is set by hf-grow{f'; use {instead}' if instead else ''}.")
        else:
            near = did_you_mean(key, [*nested_keys(TrainRecipe), *known, *COMMAND_FLAGS])
            errors.append(f"{key}: unknown key.{near} Known: {', '.join(TrainRecipe.model_fields)}, and TrainingArguments.")
    bad = {re.split(r"[.:]", line)[0] for line in errors}
    theirs = {k: v for k, v in theirs.items() if k not in bad}
    if recipe is None:
        recipe = _without_invalid_keys(own)
    if recipe is not None and "data" not in bad:
        errors += _contradictions(recipe, theirs)
    return RecipeData(where, data, recipe, theirs, tuple(errors))


def _without_invalid_keys(own: Mapping[str, Any]) -> TrainRecipe | None:
    """The recipe without its invalid keys, so that files, Fisher and so on can be checked all the same."""
    data = copy.deepcopy(dict(own))
    while True:
        data.setdefault("model", "")
        data.setdefault("data", DataOptions.model_construct(train=[]))
        try:
            return TrainRecipe.model_validate(data, strict=True)
        except ValidationError as error:
            if not _remove_key(data, error.errors()[0]["loc"]):
                return None


def _remove_key(data: Any, path: tuple[str | int, ...]) -> bool:
    """Removes the value at ``path`` in nested data, or its nearest existing parent; False if there is none."""
    parent, last = None, None
    for key in path:
        exists = key in data if isinstance(data, dict) else isinstance(data, list) and isinstance(key, int) and key < len(data)
        if not exists:
            break
        parent, last, data = data, key, data[key]
    if parent is not None:
        del parent[last]
    return parent is not None


def _contradictions(recipe: TrainRecipe, arguments: Mapping[str, Any]) -> list[str]:
    errors = contradictions(recipe, arguments, recipe.data.eval)
    steps = arguments.get("max_steps")
    if recipe.data.streaming and not (isinstance(steps, int) and steps > 0):
        errors.append("max_steps: is missing; the length of streamed text is unknown.")
    if recipe.data.streaming and isinstance(workers := arguments.get("dataloader_num_workers"), int) and workers > 1:
        errors.append(f"dataloader_num_workers: streamed text cannot be read by {workers} workers. Use 1.")
    if recipe.data.streaming and recipe.distill and recipe.distill.cached:
        errors.append(f"distill.{recipe.distill.cached}: does not work with streaming; the teacher reads the text beforehand.")
    if not recipe.data.eval:
        errors += missing_eval_set(recipe, arguments, "data.eval")
    metric = arguments.get("metric_for_best_model")
    names = {f"{name}_loss" for name in recipe.data.eval} | {"forgetting", *(("kl",) if recipe.kl_rows else ())}
    if isinstance(metric, str) and metric.removeprefix("eval_") not in names:
        errors.append(f"metric_for_best_model: {metric!r} is not measured. Measured: {', '.join(sorted('eval_' + n for n in names))}.")
    return errors


def collect_mistakes(errors: list[str], key: str, work: Callable[[], Any]) -> Any:
    """Returns ``work()``; an InputError is added to ``errors`` under ``key`` instead, and None returned."""
    try:
        return work()
    except InputError as error:
        errors.append(f"{key}: {error.message}{f' {error.hint}' if error.hint else ''}")
        return None


def tokens_per_step(arguments: TrainingArguments, length: int, processes: int = 1) -> int:
    """Tokens of one optimizer step over all processes; ``length``: tokens per sequence."""
    return int(arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * processes * length)
