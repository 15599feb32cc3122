"""The verbs of hf-grow for Python: plan, grow, verify, train, push."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_grow.api.growth_job import GrowthJob
from hf_grow.api.output_options import OutputOptions
from hf_grow.checkpoint.donors import parse_donor_refs, with_donors
from hf_grow.checkpoint.model_ids import ALIASES
from hf_grow.checkpoint.reader import Checkpoint, open_folder
from hf_grow.checkpoint.source import open_source
from hf_grow.checkpoint.writer import Progress, Result
from hf_grow.convert.planning import Notify, find_method, ignore, open_sources, plan_for
from hf_grow.errors import InputError
from hf_grow.growth.plan import GrowthPlan
from hf_grow.options import combined, parse, part
from hf_grow.publish.push import Destination, PushResult

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_grow.training.stages.runner import RunResult
    from hf_grow.training.train import TrainResult
    from hf_grow.verification import Report


@dataclass(frozen=True)
class GrowthResult(Result):
    """What `grow` wrote, and what it published."""

    pushed: PushResult | None
    """The commit on the Hub, where a repository was given."""


def plan(
    source: str | Path | PreTrainedModel, method: str = "dus", *, revision: str | None = None, notify: Notify = ignore, **options: Any
) -> GrowthPlan:
    """Plans a growth; reads only config and headers (of a folder or a Hub repository), or a model in memory.

    ``options`` are those of the method, as on the command line: ``plan("mistralai/Mistral-7B-v0.1", "dus", to="10.7B")``. Several growths as one:
    ``plan(source, "pipeline", steps=[{"method": "tile", "factor": 2}, {"method": "identity"}])``.
    Raises InputError (SourceError, PlanError).
    """
    found = find_method(method)
    parsed = parse(found.options, options, where=f"method {method}", strict=False)
    if isinstance(source, str | Path):
        info = open_sources(str(source), parsed, revision=revision, notify=notify).info
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
    workers: int = 0,
    progress: Progress = lambda nbytes: None,
    notify: Notify = ignore,
    **options: Any,
) -> GrowthResult:
    """Grows a checkpoint (folder or Hub id) into the folder ``out``, and publishes it where ``push`` names a repository.

    ``options`` are those of the method (``plan`` takes the same) and those of `OutputOptions`, which the command line has as flags:

    - writing: ``max_shard_size``, ``resume``, ``overwrite``, ``memory_budget`` (bytes, or text such as "5GB"), ``allow_nonfinite``
    - a Hub source, tensor by tensor instead of whole: ``stream_source``, ``source_cache``
    - the optimizer state of a Trainer checkpoint: ``with_optimizer``, ``optimizer_policy``, ``exact_steps``
    - publishing: ``push``, ``private``, ``push_revision``, ``create_pr``, ``message``; shard by shard while growing: ``stream_push``

    ``workers``: threads that write, 0 for one per core, at most 4. ``progress`` gets the bytes written and checked since its last call, ``notify``
    notes for the user. Raises InputError before a byte is written, ExecutionError if writing or publishing fails.
    """
    found = find_method(method)
    texts = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
    parsed = parse(combined(found.options, OutputOptions), texts, where=f"method {method}", strict=False)
    chosen, output = part(parsed, found.options), part(parsed, OutputOptions)
    job = GrowthJob(str(source), found, chosen, output, out=Path(out), revision=revision, workers=workers, notify=notify)
    job.check()
    job.prepare()
    result = job.carry_out(progress)
    return GrowthResult(**vars(result), pushed=job.publish())


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
    notify: Notify = ignore,
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
            f"verify: {', '.join(idle)} would do nothing beside structure_only, which compares no outputs.", hint="Remove one."
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
    notify: Notify = ignore,
) -> PushResult:
    """Sends a grown or trained folder to the Hub, with its model card, as one commit.

    Raises OutputError before anything is sent if the folder is not whole, failed its verification, or the repository may not be written.
    """
    from hf_grow.publish.manifest import make_manifest
    from hf_grow.publish.push import push as send

    return send(make_manifest(Path(folder)), Destination(repo, private, revision, create_pr, message), progress=progress, notify=notify)


def train(
    recipe: str | Path | Mapping[str, Any],
    *,
    output: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    notify: Notify = ignore,
    **changes: Any,
) -> TrainResult | RunResult:
    """Carries out a training recipe: a YAML file, or its content; with `stages`, all of them. ``changes`` replace keys of it, nested ones with dots in a mapping's name.

    Raises InputError, with every mistake, before anything is written.
    """
    from hf_grow.training import train as run
    from hf_grow.training.config import recipe_files, stage_options, train_config

    read = (
        train_config.read_recipe({**recipe, **changes}) if isinstance(recipe, Mapping) else recipe_files.load_recipe(Path(recipe), changes)
    )
    folder = None if output is None else str(output)
    if stage_options.is_staged(read.given):
        from hf_grow.training.stages.runner import train_stages

        return train_stages(read, output=folder, resume=resume, overwrite=overwrite, notify=notify)
    return run.train(read, output=folder, resume=resume, overwrite=overwrite, notify=notify)


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
