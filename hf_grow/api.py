"""The verbs of hf-grow for Python: plan, grow, verify, train, push."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_grow.checkpoint.donors import parse_donor_refs, with_donors
from hf_grow.checkpoint.model_ids import ALIASES
from hf_grow.checkpoint.reader import Checkpoint, open_folder
from hf_grow.checkpoint.source import open_source
from hf_grow.checkpoint.writer import DEFAULT_MEMORY, DEFAULT_SHARD_SIZE, Progress, layout
from hf_grow.common.suggest import did_you_mean
from hf_grow.convert.measure import measure
from hf_grow.errors import InputError
from hf_grow.growth.growth import Method
from hf_grow.growth.plan import GrowthPlan, SourceInfo, check_source, make_plan
from hf_grow.methods import METHODS
from hf_grow.methods.no_effect import reject_ineffective_options
from hf_grow.methods.pipeline import PIPELINE
from hf_grow.options import Options, parse

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_grow.convert.execute import Result
    from hf_grow.publish.push import Pushed
    from hf_grow.training.train import TrainResult
    from hf_grow.verification import Report

Notify = Callable[[str], None]


def _quiet(message: str) -> None:
    pass


def find_method(name: str) -> Method:
    known = {**METHODS, PIPELINE.name: PIPELINE}
    if name not in known:
        raise InputError(f"Unknown method {name!r}.{did_you_mean(name, known)}", hint=f"Methods: {', '.join(known)}.")
    return known[name]


def plan_for(info: SourceInfo, method: Method, options: Options) -> GrowthPlan:
    """A checked plan for a described source. The source is checked first: its faults explain themselves better than a plan's."""
    check_source(info)
    for other in info.donors.values():
        check_source(other)
    others = [other.architecture for other in info.donors.values()]
    plan = make_plan(info, method.build(info.architecture, options, others) if others else method.build(info.architecture, options))
    if not method.checks_own_options:
        reject_ineffective_options(method, info.architecture, options, others)
    return plan


def open_sources(ref: str, options: Options, *, revision: str | None = None, weights: bool, notify: Notify = _quiet) -> Checkpoint:
    """The source, with the further checkpoints that the options name (a Hub id may carry a revision: OWNER/NAME@REVISION).

    Raises SourceError as `open_source` does, and where tokenizers differ.
    """
    main = open_source(ref, revision=revision, weights=weights, notify=notify)
    return with_donors(main, parse_donor_refs(options.extra_sources()), weights=weights, notify=notify)


def plan(
    source: str | Path | PreTrainedModel, method: str = "dus", *, revision: str | None = None, notify: Notify = _quiet, **options: Any
) -> GrowthPlan:
    """Plans a growth; reads only config and headers (of a folder, or of a Hub repository), or a model in memory.

    ``options`` are those of the method, as on the command line: ``plan("mistralai/Mistral-7B-v0.1", "dus", to="10.7B")``.
    Raises InputError (SourceError, PlanError) with what is wrong.
    """
    found = find_method(method)
    parsed = parse(found.options, options, where=f"method {method}", strict=False)
    if isinstance(source, str | Path):
        info = open_sources(str(source), parsed, revision=revision, weights=False, notify=notify).info
    else:
        from hf_grow.convert.in_memory import describe_model

        others = {
            label: open_source(ref, revision=r, weights=False, notify=notify).info
            for label, ref, r in parse_donor_refs(parsed.extra_sources())
        }
        info = replace(describe_model(source), donors=others)
    return plan_for(info, found, parsed)


def grow(
    source: str | Path,
    out: str | Path,
    method: str = "dus",
    *,
    revision: str | None = None,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    resume: bool = False,
    overwrite: bool = False,
    memory_budget: int = DEFAULT_MEMORY,
    workers: int = 0,
    allow_nonfinite: bool = False,
    progress: Progress = lambda nbytes: None,
    notify: Notify = _quiet,
    **options: Any,
) -> Result:
    """Grows a checkpoint (folder or Hub id) into the folder `out`.

    Raises InputError before a byte is written, ExecutionError if writing fails; see `hf_grow.convert.execute.execute`.
    """
    from hf_grow.convert.execute import execute

    found = find_method(method)
    parsed = parse(found.options, options, where=f"method {method}", strict=False)
    checkpoint = open_sources(str(source), parsed, revision=revision, weights=True, notify=notify)
    plan = measure(plan_for(checkpoint.info, found, parsed), checkpoint, notify=notify)
    return execute(
        plan,
        checkpoint,
        Path(out),
        layout(plan.targets, max_shard_size),
        resume=resume,
        overwrite=overwrite,
        memory_budget=memory_budget,
        workers=workers,
        allow_nonfinite=allow_nonfinite,
        progress=progress,
    )


def verify(
    old: str | Path,
    new: str | Path,
    *,
    revision: str | None = None,
    structure_only: bool = False,
    text: str | Path | None = None,
    tokens: int = 2048,
    dtype: str = "auto",
    progress: Progress = lambda nbytes: None,
    notify: Notify = _quiet,
    **options: Any,
) -> Report:
    """Checks the grown checkpoint `new` against its source `old` (folder or Hub id); `Report.ok` tells the outcome.

    ``options`` are those of evaluation tasks, as on the command line: ``tasks``, ``limit``, ``shots``, ``batch_size``.
    Raises InputError for what cannot be read; a wrong checkpoint is no error but a report that is not ok.
    """
    from hf_grow.verification import TaskOptions, verify_checkpoints

    idle = [k for k, v in {"text": text is not None, "tokens": tokens != 2048, "dtype": dtype != "auto"}.items() if structure_only and v]
    if idle:
        raise InputError(
            f"verify: {', '.join(idle)} would do nothing beside structure_only, which compares no outputs.", hint="Leave one out."
        )
    parsed = parse(TaskOptions, {k: str(v) if isinstance(v, Path) else v for k, v in options.items()}, where="verify", strict=False)
    grown = open_folder(Path(new))
    source = open_source(str(old), revision=revision or _grown_from(str(old), grown), weights=True, notify=notify)
    source = with_donors(source, _further_of(grown), weights=True, notify=notify)
    return verify_checkpoints(
        source,
        grown,
        structure_only=structure_only,
        text=None if text is None else Path(text),
        tokens=tokens,
        dtype=dtype,
        tasks=parsed,
        progress=progress,
        notify=notify,
    )


def push(
    folder: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    progress: Progress = lambda nbytes: None,
    notify: Notify = _quiet,
) -> Pushed:
    """Sends a grown or trained folder to the Hub, with its model card, as one commit.

    Raises OutputError before anything is sent if the folder is not whole, failed its verification, or the repository may not be written.
    """
    from hf_grow.publish.push import Destination
    from hf_grow.publish.push import push as send

    return send(Path(folder), Destination(repo, private, revision, create_pr, message), progress=progress, notify=notify)


def train(
    recipe: str | Path | Mapping[str, Any],
    *,
    output: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    notify: Notify = _quiet,
    **changes: Any,
) -> TrainResult:
    """Carries out a training recipe: a YAML file, or its content. ``changes`` replace keys of it, nested ones with dots in a mapping's name.

    Raises InputError, with every mistake, before anything is written.
    """
    from hf_grow.training import train as run
    from hf_grow.training.config import recipe_files, train_config

    read = (
        train_config.read_recipe({**recipe, **changes}) if isinstance(recipe, Mapping) else recipe_files.load_recipe(Path(recipe), changes)
    )
    return run.train(read, output=None if output is None else str(output), resume=resume, overwrite=overwrite, notify=notify)


def _grown_from(old: str, new: Checkpoint) -> str | None:
    """The commit that `new` was grown from, where `old` names the same Hub repository."""
    source = (new.growth or {}).get("source", {})
    return (
        source.get("revision") or None
        if isinstance(source, dict) and source.get("ref") == ALIASES.get(old.lower(), old) and not Path(old).is_dir()
        else None
    )


def _further_of(new: Checkpoint) -> list[tuple[str, str, str | None]]:
    """Label, ref and revision of the further checkpoints that `new` was made from; none where its growth.json is damaged, which is told later."""
    try:
        others = (new.growth or {})["source"].get("others", {})
        return [(str(label), str(o["ref"]), o["revision"] or None) for label, o in others.items()]
    except (KeyError, TypeError, AttributeError):
        return []
