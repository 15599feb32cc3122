"""The old text of a training without any: sampled from the source model once, and kept in the cache."""

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
from hf_grow.training.data.replay_files import FORMAT, read_record
from hf_grow.training.data.sources import Notify


def source_of(options: SelfReplay, trained: str | None) -> tuple[str, str | None]:
    """What to sample from, and its revision: the options' model, else what `trained` was grown from, else `trained` itself."""
    if options.model is not None:
        return options.model, options.revision
    if trained is None:
        raise InputError("Self-replay needs a model to sample from.", hint="Name it: replay: {self: {model: FOLDER_OR_ID}}.")
    growth = Path(trained) / GROWTH
    if not growth.is_file():
        return trained, options.revision
    source = read_json(growth, "").get("source", {})
    ref, revision = source.get("ref"), source.get("revision")
    if not isinstance(ref, str) or not isinstance(revision, (str, type(None))):
        raise SourceError(f"{growth} does not say what {trained} was grown from.", hint="Name it: replay: {self: {model: FOLDER_OR_ID}}.")
    return ref, revision or None


def sampled_from(options: SelfReplay, root: Path, *, seq_length: int, trained: str | None, notify: Notify) -> Path:
    """The folder of samples under `root`, made now where it is missing or unfinished. Raises SourceError, OutputError, ExecutionError.

    ``seq_length``: of the training, which is how long a text may be where the options do not say.
    """
    from hf_grow.training.data.sampling import load

    ref, revision = source_of(options, trained)
    try:
        checkpoint = open_source(ref, revision=revision, weights=False, notify=notify)
    except SourceError as error:
        raise SourceError(
            f"Self-replay cannot sample from {ref}: {error.message}", hint="Name the model: replay: {self: {model: FOLDER_OR_ID}}."
        ) from None
    sampling = ReplayOptions(**options.model_dump(exclude={"model", "revision"}))
    sampling = sampling.model_copy(update={"max_length": sampling.max_length or seq_length})
    files = {name: dict(facts) for name, facts in checkpoint.files.items()}
    parts = {"format": FORMAT, "files": files, "config": dict(checkpoint.config), "options": sampling.model_dump(mode="json")}
    folder = root / cache.key(parts)
    with cache.locked(folder):
        record = read_record(folder)
        if record is None or not record["complete"]:
            notify(f"Sampling {sampling.tokens:,} tokens from {ref}; they are kept in {folder}.")
            checkpoint = open_source(checkpoint.ref, revision=checkpoint.revision or None, weights=True, notify=notify)
            model, tokenizer = load(checkpoint, sampling.dtype)
            with token_progress("sampling", sampling.tokens, note=notify) as progress:
                sample_replay(
                    model, tokenizer, folder, sampling, ref=ref, revision=revision or "", progress=progress, drawing=progress.within
                )
    return folder
