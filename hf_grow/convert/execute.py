"""Carries out a growth plan: writes the grown checkpoint to a folder."""

from __future__ import annotations

import errno
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from hf_grow._version import __version__
from hf_grow.checkpoint.partial_folder import PartialFolder
from hf_grow.checkpoint.provenance import recorded_files
from hf_grow.checkpoint.reader import GROWTH, Checkpoint
from hf_grow.checkpoint.shard_sink import ShardSink
from hf_grow.checkpoint.tensor_cache import TensorCache
from hf_grow.checkpoint.tied_heads import check_tied_heads
from hf_grow.checkpoint.writer import DEFAULT_MEMORY, WORKERS, Progress, Result, Shard
from hf_grow.common.safe_files import error_text, read_json
from hf_grow.convert.metadata import write_metadata
from hf_grow.convert.shard_writer import WriteJob, write_shards
from hf_grow.errors import ExecutionError, OutputError
from hf_grow.growth.plan import GrowthPlan


def execute(
    plan: GrowthPlan,
    checkpoint: Checkpoint,
    out: Path,
    shards: Sequence[Shard],
    *,
    companions: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    memory_budget: int = DEFAULT_MEMORY,
    workers: int = 0,
    allow_nonfinite: bool = False,
    progress: Progress = lambda nbytes: None,
    also: Callable[[Path], set[str]] = lambda folder: set(),
    sink: ShardSink | None = None,
    cache: TensorCache | None = None,
) -> Result:
    """Writes the plan's target to the folder `out`.

    Args:
        shards: the layout to write, from `layout(plan.targets)`.
        companions: folder of the tokenizer, code and license files to copy; default: that of the checkpoint.
        resume: continue an interrupted run, whose files are in `out`.partial.
        overwrite: replace an existing `out`, once the new one is complete.
        memory_budget: bytes for evaluating tensors that are not copies.
        workers: writer threads; 0 for the default.
        allow_nonfinite: write NaN and infinite values of the source as they are.
        progress: called with the number of bytes written and checked since the last call.
        also: writes further files into the folder before it gets its name, and returns their names.
        sink: receives finished shards; default: they stay in the folder.
        cache: downloads source tensors when `checkpoint` is on the Hub; made for the same `shards`.

    Raises OutputError before anything is written if `out` exists; SourceError for weights that are not finite;
    ExecutionError if writing fails. After an error or an interruption, the run can be resumed.
    """
    began = time.perf_counter()
    check_tied_heads(plan, checkpoint)
    total = sum(s.size for s in shards)
    key = hashlib.sha256(f"{plan.fingerprint}\n{__version__}\n{[(s.file, s.size) for s in shards]}".encode()).hexdigest()
    sink = sink or ShardSink()
    workers = workers or WORKERS
    with PartialFolder(out, key, resume=resume, overwrite=overwrite) as folder, translate_os_errors(folder):
        if folder.complete:
            return _recorded_result(out, total, time.perf_counter() - began, len(plan.targets), sink)
        with cache.open(folder.path) if cache else nullcontext(checkpoint) as readable:
            job = WriteJob(plan, readable, folder, progress, memory_budget, allow_nonfinite, plan.copies(), sink, cache)
            hashes = write_shards(job, shards, workers)
        _check_unchanged(checkpoint)
        companions = companions or checkpoint.folder
        assert companions is not None
        files = write_metadata(plan, companions, folder, shards, hashes)
        folder.remove_except(files)  # drop other files of an interrupted run
        files |= also(folder.path)
        sink.finish(folder, files)
        return Result(out, hashes, total, time.perf_counter() - began, len(folder.done))


def _recorded_result(out: Path, total: int, seconds: float, tensors: int, sink: ShardSink) -> Result:
    """The result of an earlier run whose last step was interrupted."""
    if sink.window is not None:
        raise OutputError(f"{out} is already complete, so it cannot be uploaded shard by shard.", hint="Publish it with `hf-grow push`.")
    files = recorded_files(read_json(out / GROWTH))
    return Result(out, {name: str(facts.get("sha256")) for name, facts in files.items()}, total, seconds, tensors)


@contextmanager
def translate_os_errors(folder: PartialFolder) -> Iterator[None]:
    """Raises ExecutionError, with a hint how to continue, for any OSError."""
    try:
        yield
    except OSError as error:
        at = f" ({error.filename})" if error.filename else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ExecutionError(f"The disk of {folder.final} is full{at}.", hint=f"Free some space. {folder.resume_hint}") from None
        raise ExecutionError(f"Writing {folder.final} failed: {error_text(error)}{at}.", hint=folder.resume_hint) from None


def _check_unchanged(checkpoint: Checkpoint) -> None:
    """Raises ExecutionError if a file of a local source changed since it was opened."""
    for donor in checkpoint.donors.values():
        _check_unchanged(donor)
    for file, facts in checkpoint.files.items() if checkpoint.folder else ():
        stat = checkpoint.path(file).stat()
        if stat.st_size != facts["size"] or stat.st_mtime_ns != facts.get("mtime_ns", stat.st_mtime_ns):
            raise ExecutionError(f"{file} of the source changed while it was read.", hint="Start over with --overwrite.")
