"""The old text of a training, sampled from its source model once and kept in the cache."""

from __future__ import annotations

from pathlib import Path

from hf_grow.checkpoint.reader import GROWTH
from hf_grow.checkpoint.source import open_source
from hf_grow.common.progress_bars import token_progress
from hf_grow.common.safe_files import read_json
from hf_grow.errors import InputError, SourceError
from hf_grow.training.config.data_options import SelfReplay
from hf_grow.training.config.replay_options import ReplayOptions
from hf_grow.training.data import cache
from hf_grow.training.data.replay import sample_replay
from hf_grow.training.data.replay_files import FORMAT_VERSION, read_record
from hf_grow.training.data.sources import Notify

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


def sample_from_source(options: SelfReplay, root: Path, *, seq_length: int, trained: str | None, notify: Notify) -> tuple[Path, int]:
    """The replay folder under `root` for these options, sampled now if it is missing or unfinished, and the FLOPs that this took.

    ``seq_length``: of the training; default for max_length. ``trained``: the checkpoint to be trained.
    Raises SourceError, OutputError, ExecutionError.
    """
    from hf_grow.training.data.source_model import load_with_tokenizer

    ref, revision = source_model(options, trained)
    try:
        checkpoint = open_source(ref, revision=revision, weights=False, notify=notify)
    except SourceError as error:
        raise SourceError(
            f"Self-replay cannot sample from {ref}: {error.message}", hint="Name the model: replay: {self: {model: FOLDER_OR_ID}}."
        ) from None
    sampling = ReplayOptions(**options.model_dump(exclude={"model", "revision"}))
    sampling = sampling.model_copy(update={"max_length": sampling.max_length or seq_length})
    files = {name: dict(facts) for name, facts in checkpoint.files.items()}
    parts = {"format": FORMAT_VERSION, "files": files, "config": dict(checkpoint.config), "options": sampling.model_dump(mode="json")}
    folder, flops = root / cache.key(parts), 0
    with cache.locked(folder):
        record = read_record(folder)
        if record is None or not record["complete"]:
            notify(f"Sampling {sampling.tokens:,} tokens from {ref} into {folder}.")
            checkpoint = open_source(checkpoint.ref, revision=checkpoint.revision or None, weights=True, notify=notify)
            model, tokenizer = load_with_tokenizer(checkpoint, sampling.dtype)
            with token_progress("sampling", sampling.tokens, note=notify) as progress:
                flops = sample_replay(
                    model, tokenizer, folder, sampling, ref=ref, revision=revision or "", progress=progress, on_token=progress.within
                ).flops
    return folder, flops
