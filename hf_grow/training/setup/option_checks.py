"""Checks of options against the model, shared by recipes and GrowTrainer: parts that train, penalty, teachers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_grow.checkpoint.reader import Checkpoint
from hf_grow.checkpoint.source import open_source
from hf_grow.errors import InputError
from hf_grow.growth.plan import GrowthPlan
from hf_grow.model import loading
from hf_grow.training.config.distill_options import SOURCE, Teacher
from hf_grow.training.config.train_config import collect_mistakes
from hf_grow.training.config.train_options import TrainOptions
from hf_grow.training.distillation.distill import check_teacher
from hf_grow.training.param_updates import param_provenance
from hf_grow.training.param_updates.masks import EVERYTHING
from hf_grow.training.regularizers.importance_file import check_same_model, checkpoint_fingerprint, open_importance
from hf_grow.training.regularizers.importance_growth import is_of_source
from hf_grow.training.regularizers.origin import PenaltyOrigin
from hf_grow.training.setup.train_setup import Notify

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def check_options(
    options: TrainOptions,
    checkpoint: Checkpoint | None,
    plan: GrowthPlan | None,
    tokenizer: Any,
    errors: list[str],
    notify: Notify,
    origin: PenaltyOrigin | None = None,
) -> None:
    """Adds a line to `errors` for each mistake. ``checkpoint``: None where it could not be opened; ``tokenizer``: compared with the teachers'."""
    known = (EVERYTHING, *param_provenance.PARTS)
    for key, wanted in (("train", options.train), ("freeze", options.freeze), *(("phases.train", p.train) for p in options.phases)):
        errors += [f"{key}: there is no part {part!r}. Parts: {', '.join(known)}." for part in wanted if part not in known]
    if checkpoint is not None:
        _check_regularizer(options, checkpoint, plan, origin, errors)
        _check_teachers(options, checkpoint, plan, tokenizer, errors, notify)


def plan_of(checkpoint: Checkpoint) -> GrowthPlan | None:
    """The plan of the growth that a checkpoint came from. Raises InputError where its growth.json is damaged or of another model."""
    if checkpoint.growth is None:
        return None
    plan = GrowthPlan.from_json(checkpoint.growth)
    param_provenance.check_plan_matches(plan, checkpoint)
    return plan


def _check_regularizer(
    options: TrainOptions, checkpoint: Checkpoint, plan: GrowthPlan | None, origin: PenaltyOrigin | None, errors: list[str]
) -> None:
    """Every file is of this model (of its source, for collapsed coordinates): its tensors, and for the newest its very weights."""
    penalty = options.regularizer
    if penalty.kind == "none":
        return
    if (penalty.collapsed or penalty.over == "inherited") and plan is None:
        errors.append(f"regularizer: needs to know what is new, and {checkpoint.ref} has no growth.json. Remove collapsed and over.")
        return
    if not checkpoint.tensors:  # a model in memory: `make_penalty` compares
        return
    own = {n: t.shape for n, t in checkpoint.tensors.items() if n in checkpoint.info.architecture.tensors}
    shapes = (
        own
        if not penalty.collapsed or plan is None
        else {n: t.shape for n, t in plan.source.tensors.items() if n not in plan.growth.dropped}
    )
    for i, path in enumerate(penalty.fisher):
        at_load = checkpoint.folder is not None and not checkpoint.files
        newest = i == len(penalty.fisher) - 1 and not penalty.collapsed and checkpoint.folder is not None and not at_load
        identity = checkpoint_fingerprint(checkpoint) if newest else None
        plans = [*(origin.plans if origin is not None else ()), *([plan] if at_load and plan is not None else [])]
        collect_mistakes(errors, "regularizer.fisher", partial(_check_fisher, path, shapes, identity if origin is None else None, plans))


def _check_fisher(path: Path, shapes: Mapping[str, tuple[int, ...]], identity: str | None, plans: Sequence[GrowthPlan]) -> None:
    """``plans``: growths whose sources the file may be of; `make_penalty` compares the weights."""
    file = open_importance(path)
    if not any(is_of_source(file, plan) for plan in plans):
        check_same_model(file, shapes, identity)


def _check_teachers(
    options: TrainOptions, checkpoint: Checkpoint, plan: GrowthPlan | None, tokenizer: Any, errors: list[str], notify: Notify
) -> None:
    wants_source = options.kl_rows or options.monitor.baseline == "source"
    teachers = list(options.distill.teachers) if options.distill else []
    if wants_source and not any(t.model == SOURCE for t in teachers):
        teachers.append(Teacher())
    for teacher in teachers:
        collect_mistakes(
            errors,
            "distill.teachers" if options.distill else "monitor",
            partial(_check_one_teacher, teacher, checkpoint, plan, tokenizer, notify),
        )


def _check_one_teacher(teacher: Teacher, checkpoint: Checkpoint, plan: GrowthPlan | None, tokenizer: Any, notify: Notify) -> None:
    ref, revision = resolve_teacher(teacher, plan)
    source = open_source(ref, revision=revision, weights=False, notify=notify)
    same: bool | None = None
    if tokenizer is not None and source.folder is not None and any((source.folder / n).is_file() for n in TOKENIZER_FILES):
        same = load_tokenizer(str(source.folder), None).get_vocab() == tokenizer.get_vocab()
    check_teacher(ref, source.info.architecture.size("vocab"), checkpoint.info.architecture.size("vocab"), same)


def resolve_teacher(teacher: Teacher, plan: GrowthPlan | None) -> tuple[str, str | None]:
    """Reference and revision of a teacher; `source` is what the plan grew from. Raises InputError without a plan."""
    if teacher.model != SOURCE:
        return teacher.model, teacher.revision
    if plan is None:
        raise InputError("The model has no growth.json, so it has no source.", hint="Name a checkpoint instead of `source`.")
    return plan.source.ref, plan.source.revision or None


def load_tokenizer(place: str, revision: str | None) -> PreTrainedTokenizerBase:
    """Raises InputError if there is none that can be used."""
    folder = Path(place).expanduser()
    if folder.is_dir() and not any((folder / n).is_file() for n in TOKENIZER_FILES):
        raise InputError(f"{place} has no tokenizer.", hint="Name one with `tokenizer`.")
    return loading.load_tokenizer(folder if folder.is_dir() else place, place, revision)
