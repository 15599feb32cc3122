"""The old text of a training, sampled from its source model once and kept in the cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from hf_grow.checkpoint.reader import GROWTH, Checkpoint
from hf_grow.checkpoint.source import open_source
from hf_grow.common.progress_bars import token_progress
from hf_grow.common.safe_files import read_json
from hf_grow.errors import ExecutionError, GrowError, InputError, SourceError
from hf_grow.training.config.data_options import SelfReplay
from hf_grow.training.config.replay_options import ReplayOptions
from hf_grow.training.data import cache
from hf_grow.training.data.replay import help_sampling, sample_replay
from hf_grow.training.data.replay_files import FORMAT_VERSION, read_record
from hf_grow.training.data.shared_batches import SamplingGroup, SharedBatches
from hf_grow.training.data.sources import Notify
from hf_grow.training.data.vllm_engine import VllmEngine, check_engine, engine_of, with_engine

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_NAME_MODEL = "Name it: replay: {self: {model: FOLDER_OR_ID}}."


def source_model(options: SelfReplay, trained: str | None) -> tuple[str, str | None]:
    """The model to sample from and its revision: the options' model, else the source that `trained` was grown from, else `trained`."""
    if options.model is not None:
        return options.model, options.revision
    if trained is None:
        raise InputError("Self-replay needs a model to sample from.", hint=_NAME_MODEL)
    growth = Path(trained) / GROWTH
    if not growth.is_file():
        return trained, options.revision
    source = read_json(growth, "").get("source", {})
    ref, revision = source.get("ref"), source.get("revision")
    if not isinstance(ref, str) or not isinstance(revision, (str, type(None))):
        raise SourceError(f"{growth} does not name the source model of {trained}.", hint=_NAME_MODEL)
    return ref, revision or None


def sample_from_source(
    options: SelfReplay, root: Path, *, seq_length: int, trained: str | None, notify: Notify, group: SamplingGroup | None = None
) -> tuple[Path, int]:
    """The replay folder under `root` for these options, sampled now if it is missing or unfinished, and the FLOPs that this took in this process.

    ``seq_length``: of the training; default for max_length. ``trained``: the checkpoint to be trained. ``group``: processes that sample together, all of
    which call this.
    Raises SourceError, OutputError, ExecutionError.
    """
    ref, revision = source_model(options, trained)
    try:
        checkpoint = open_source(ref, revision=revision, weights=False, notify=notify)
    except SourceError as error:
        raise SourceError(
            f"Self-replay cannot sample from {ref}: {error.message}", hint="Name the model: replay: {self: {model: FOLDER_OR_ID}}."
        ) from None
    sampling = ReplayOptions(**options.model_dump(exclude={"model", "revision"}))
    sampling = with_engine(sampling.model_copy(update={"max_length": sampling.max_length or seq_length}))
    files = {name: dict(facts) for name, facts in checkpoint.files.items()}
    parts = {"format": FORMAT_VERSION, "files": files, "config": dict(checkpoint.config), "options": sampling.identity()}
    folder = root / cache.key(parts)
    if not _is_complete(folder):
        check_engine(sampling, ref)
    shared = None if group is None or group.count == 1 else SharedBatches(folder, group)
    if shared is None or shared.group.index == 0:
        with cache.locked(folder):
            return folder, _sample(ref, revision, checkpoint, folder, sampling, shared, notify)
    if _is_complete(folder):
        return folder, 0
    with _failure_told(shared):
        model, tokenizer, _ = _load(checkpoint, sampling, notify)
        return folder, help_sampling(model, tokenizer, sampling, shared)


def _sample(
    ref: str,
    revision: str | None,
    checkpoint: Checkpoint,
    folder: Path,
    sampling: ReplayOptions,
    shared: SharedBatches | None,
    notify: Notify,
) -> int:
    if _is_complete(folder):
        return 0
    notify(f"Sampling {sampling.tokens:,} tokens from {ref} into {folder}.")
    with _failure_told(shared):
        model, tokenizer, engine = _load(checkpoint, sampling, notify)
        with token_progress("sampling", sampling.tokens, note=notify) as progress, engine or nullcontext():
            sampled = sample_replay(
                model, tokenizer, folder, sampling, ref=ref, revision=revision or "", progress=progress, on_token=progress.within,
                shared=shared, engine=engine,
            )  # fmt: skip
    if shared is not None:
        shared.clear()
    return sampled.flops


def _is_complete(folder: Path) -> bool:
    record = read_record(folder)
    return record is not None and bool(record["complete"])


def _load(
    checkpoint: Checkpoint, sampling: ReplayOptions, notify: Notify
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, VllmEngine | None]:
    from hf_grow.training.data.source_model import load_with_tokenizer

    whole = open_source(checkpoint.ref, revision=checkpoint.revision or None, weights=True, notify=notify)
    engine = engine_of(sampling, whole)
    return *load_with_tokenizer(whole, sampling.dtype, None if engine is None else "cpu"), engine


@contextmanager
def _failure_told(shared: SharedBatches | None) -> Iterator[None]:
    """Tells the other processes what ends this one. Raises ExecutionError for an InputError that the first process need not have."""
    try:
        yield
    except BaseException as error:
        if shared is None:
            raise
        message = error.message if isinstance(error, GrowError) else f"{type(error).__name__}: {error}"
        shared.fail(message)
        if isinstance(error, InputError) and shared.group.index:  # the command line leaves an InputError to the first process
            raise ExecutionError(f"Process {shared.group.index} cannot sample: {message}", hint=error.hint) from None
        raise
