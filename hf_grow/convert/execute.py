"""Carrying out a plan: every tensor streamed to its place.

Writer threads take tensors in the order of the files: a plain copy is moved by the kernel, anything else is evaluated by row blocks. One checker
a shard follows: it reads back what stands on disk, compares its digest with the digest of what was meant, feeds the shard's SHA-256, and notes
the tensor in the journal. So a tensor counts as done only when its bytes were seen on disk, and the hash costs no second pass.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from hf_grow._version import __version__
from hf_grow.checkpoint.folder_exchange import error_filename
from hf_grow.checkpoint.partial_folder import PartialFolder
from hf_grow.checkpoint.provenance import recorded_files
from hf_grow.checkpoint.reader import GROWTH, Checkpoint
from hf_grow.checkpoint.shard_sink import ShardSink
from hf_grow.checkpoint.tensor_cache import TensorCache
from hf_grow.checkpoint.tied_heads import check_tied_heads
from hf_grow.checkpoint.transfer import copy_range, hash_range, write_all
from hf_grow.checkpoint.writer import DEFAULT_MEMORY, WORKERS, Progress, Result, Shard, Slot
from hf_grow.common.safe_files import error_text, open_regular, read_json
from hf_grow.convert.metadata import write_metadata
from hf_grow.errors import ExecutionError, GrowError, OutputError, SourceError
from hf_grow.growth.finite_check import NOT_FINITE_HINT, FiniteCheck
from hf_grow.growth.plan import GrowthPlan
from hf_grow.growth.tensormap import Fill, Noise

if TYPE_CHECKING:
    from hf_grow.growth.evaluate import Evaluator


@dataclass
class _Job:
    plan: GrowthPlan
    checkpoint: Checkpoint
    folder: PartialFolder
    progress: Progress
    memory_budget: int
    allow_nonfinite: bool
    copies: Mapping[str, str]
    sink: ShardSink
    cache: TensorCache | None
    halt: threading.Event = field(default_factory=threading.Event)
    digests: dict[str, str] = field(default_factory=dict)
    """Source tensor -> digest of its bytes, taken once."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def stop(self) -> None:
        if self.halt.is_set():
            raise _Halted

    @cached_property
    def _evaluator(self) -> Evaluator:
        from hf_grow.checkpoint.stored_tensors import StoredTensors
        from hf_grow.growth.evaluate import Evaluator

        return Evaluator(self.plan, StoredTensors(self.checkpoint))

    def evaluator(self) -> Evaluator:
        with self.lock:
            return self._evaluator


class _Halted(Exception):
    """Another thread failed, or the user interrupted: stop quietly."""


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
    """Writes the plan's target to the folder `out`, in the ``shards`` that `layout` made of it.

    ``companions``: folder of the tokenizer, code and licence files; default: the checkpoint's own. ``also`` may write further files into the output
    before it gets its name; it returns their names. ``sink`` may take shards away as they are finished. ``cache`` fetches the source's tensors where
    `checkpoint` is on the Hub; it is made for the same shards.

    Raises OutputError before a byte is written if `out` exists; SourceError if a weight is not finite (unless
    `allow_nonfinite`); ExecutionError if writing fails. After an error or an interruption `out`.partial can be gone on with by `resume`;
    with `overwrite` too, an `out` that exists is replaced when all is done.
    """
    began = time.perf_counter()
    check_tied_heads(plan, checkpoint)
    total = sum(s.size for s in shards)
    key = hashlib.sha256(f"{plan.fingerprint}\n{__version__}\n{[(s.file, s.size) for s in shards]}".encode()).hexdigest()
    sink = sink or ShardSink()
    workers = workers or WORKERS
    with PartialFolder(out, key, resume=resume, overwrite=overwrite) as folder, translate_os_errors(folder):
        if folder.complete:
            return _as_recorded(out, total, time.perf_counter() - began, len(plan.targets), sink)
        with cache.open(folder.path) if cache else nullcontext(checkpoint) as readable:
            job = _Job(plan, readable, folder, progress, memory_budget, allow_nonfinite, plan.copies(), sink, cache)
            hashes = _write_shards(job, shards, workers)
        _check_unchanged(checkpoint)
        beside = companions or checkpoint.folder
        assert beside is not None
        files = write_metadata(plan, beside, folder, shards, hashes)
        folder.remove_except(files)  # what an interrupted run wrote beside the model is no part of what is written now
        files |= also(folder.path)
        sink.finish(folder, files)
        return Result(out, hashes, total, time.perf_counter() - began, len(folder.done))


def _as_recorded(out: Path, total: int, seconds: float, tensors: int, sink: ShardSink) -> Result:
    """What an earlier run wrote, whose last step was interrupted."""
    if sink.window is not None:
        raise OutputError(f"{out} is whole, and so is not sent shard by shard.", hint="Publish it with `hf-grow push`.")
    files = recorded_files(read_json(out / GROWTH))
    return Result(out, {name: str(facts.get("sha256")) for name, facts in files.items()}, total, seconds, tensors)


@contextmanager
def translate_os_errors(folder: PartialFolder) -> Iterator[None]:
    """Turns what the operating system says into what the user can do."""
    try:
        yield
    except OSError as error:
        at = f" ({error.filename})" if error.filename else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ExecutionError(f"The disk of {folder.final} is full{at}.", hint=f"Free some space. {folder.resume_hint}") from None
        raise ExecutionError(f"Writing {folder.final} failed: {error_text(error)}{at}.", hint=folder.resume_hint) from None


def _write_shards(job: _Job, shards: Sequence[Shard], workers: int) -> dict[str, str]:
    """All shards; returns the SHA-256 of each. Any failure stops all threads before it is raised.

    Writers take tensor after tensor in the order of the files; one checker a shard follows them, and one syncer starts the disk meanwhile.
    """
    hashes = dict(job.sink.already_sent(job.folder))
    for shard in shards:
        for slot in shard.slots if shard.file in hashes else ():
            job.progress(slot.stop - slot.start)
            if job.cache:
                job.cache.skip(slot.name)
    todo = [shard for shard in shards if shard.file not in hashes]
    window = len(todo) if job.sink.window is None else job.sink.window
    with ThreadPoolExecutor(workers, "write") as writers, ThreadPoolExecutor(2 * workers, "check") as checkers:
        futures: list[Future[Any]] = []
        begun: deque[tuple[Shard, Future[Any], Future[Any]]] = deque()  # with its check and its sync

        def deliver() -> None:
            shard, *finished = begun.popleft()
            wait(finished, return_when=FIRST_EXCEPTION)
            for future in futures:  # a failure anywhere stops all
                if future.done():
                    future.result()
            hashes[shard.file] = finished[0].result()
            job.sink.accept(job.folder, shard, hashes[shard.file])

        try:
            for shard in todo:
                if len(begun) == window:
                    deliver()
                with _target(job, shard) as target:
                    os.ftruncate(target, shard.size)
                    write_all(target, shard.header, 0)
                written = [writers.submit(_write_tensor, job, shard, slot) for slot in shard.slots]
                begun.append((shard, checkers.submit(_check_shard, job, shard, written), checkers.submit(_sync_shard, job, shard, written)))
                futures += [*written, *begun[-1][1:]]
            if job.sink.window is None:
                wait(futures, return_when=FIRST_EXCEPTION)
            while begun:
                deliver()
        finally:
            # Reached by KeyboardInterrupt too: `with` then waits for threads that stop at their next piece.
            if not all(f.done() and f.exception() is None for f in futures):
                job.halt.set()
                for f in futures:
                    f.cancel()
    return hashes


@contextmanager
def _target(job: _Job, shard: Shard) -> Iterator[int]:
    handle = job.folder.open(shard.file)
    with error_filename(job.folder.path / shard.file):
        try:
            yield handle
        finally:
            os.close(handle)


def _check_shard(job: _Job, shard: Shard, written: Sequence[Future[str]]) -> str:
    """Follows the writers: reads each tensor back, compares, notes it; returns the shard's SHA-256."""
    with _target(job, shard) as target:
        sha = hashlib.sha256(shard.header)
        for slot, future in zip(shard.slots, written, strict=True):
            meant = future.result()
            if hash_range(target, slot.start, slot.stop, job.stop, sha) != meant:
                raise ExecutionError(
                    f"{slot.name} on disk differs from what was written to {shard.file}.", hint="The disk may be failing; run again."
                )
            if job.folder.done.get(slot.name) != meant:
                job.folder.note(slot.name, meant)
            job.progress(slot.stop - slot.start)
        return sha.hexdigest()


def _sync_shard(job: _Job, shard: Shard, written: Sequence[Future[str]]) -> None:
    for future in written:
        future.result()
    with _target(job, shard) as target:
        os.fsync(target)


def _write_tensor(job: _Job, shard: Shard, slot: Slot) -> str:
    """Puts one tensor into its slot and returns the digest its bytes must have."""
    job.stop()
    with _target(job, shard) as target:
        earlier = job.folder.done.get(slot.name)
        if earlier and hash_range(target, slot.start, slot.stop, job.stop) == earlier:
            if job.cache:
                job.cache.skip(slot.name)
            return earlier
        with job.cache.fetched_for(slot.name, job.stop) if job.cache else nullcontext():
            source = job.copies.get(slot.name)
            return _evaluate_tensor(job, slot, target) if source is None else _copy_tensor(job, source, slot, target)


def _copy_tensor(job: _Job, name: str, slot: Slot, target: int) -> str:
    path, stored = job.checkpoint.find(name)
    with open_regular(path) as source:
        handle = source.fileno()
        if name not in job.digests:  # read once; the copy then comes from the page cache
            values = FiniteCheck(stored.dtype)
            with error_filename(path):
                found = hash_range(handle, stored.start, stored.stop, job.stop, values)
            if not (values.finite or job.allow_nonfinite):
                raise SourceError(
                    f"{name} in {stored.file} holds NaN or infinite values; a model grown from it would be broken.",
                    hint=NOT_FINITE_HINT,
                )
            job.digests[name] = found
        copy_range(handle, target, stored.start, slot.start, stored.stop - stored.start, job.stop)
    return job.digests[name]


def _evaluate_tensor(job: _Job, slot: Slot, target: int) -> str:
    hasher = xxhash.xxh3_128()
    at = slot.start
    try:
        for data in _blocks(job, slot):
            job.stop()
            write_all(target, data, at)
            hasher.update(data)
            at += len(data)
    except GrowError as error:
        raise type(error)(f"{slot.name}: {error.message}", hint=error.hint) from None
    return hasher.hexdigest()


def _blocks(job: _Job, slot: Slot) -> Iterator[memoryview | bytes]:
    """The bytes of a computed tensor, one block after another. Zeros and plain noise (a new router) come without torch, and so without its memory."""
    expr = job.plan.growth.tensors[slot.name]
    if isinstance(expr, Fill) and expr.value == 0:
        zeros = bytes(min(1 << 20, slot.stop - slot.start))
        for at in range(slot.start, slot.stop, len(zeros)):
            yield memoryview(zeros)[: slot.stop - at]
    elif isinstance(expr, Noise) and expr.like is None:
        from hf_grow.growth.noise import NOISE_CHUNK, gaussian, to_dtype_bytes

        count = math.prod(expr.size)
        for first in range(0, count, NOISE_CHUNK):
            values = gaussian(job.plan.growth.seed, expr.key, first, min(first + NOISE_CHUNK, count), expr.std)
            yield to_dtype_bytes(values, slot.info.dtype)
    else:
        from hf_grow.growth.evaluate import single_threaded_ops
        from hf_grow.growth.tensors import raw_bytes

        with single_threaded_ops():
            for block in job.evaluator().blocks(expr, slot.info, job.memory_budget, allow_nonfinite=job.allow_nonfinite):
                yield raw_bytes(block)


def _check_unchanged(checkpoint: Checkpoint) -> None:
    for other in checkpoint.donors.values():
        _check_unchanged(other)
    for file, facts in checkpoint.files.items() if checkpoint.folder else ():
        stat = checkpoint.path(file).stat()
        if stat.st_size != facts["size"] or stat.st_mtime_ns != facts.get("mtime_ns", stat.st_mtime_ns):
            raise ExecutionError(f"{file} of the source changed while it was read.", hint="Start again with --overwrite.")
