"""Writes the tensors of a plan into their shards, with one thread per tensor and a checker per shard.

Writer threads take tensors in file order: copies are moved by the kernel, anything else is evaluated in row blocks. The checker of a shard follows
them: it reads each tensor back from disk, compares the digest with that of the written data, updates the shard's SHA-256, and records the tensor in
the journal. A tensor thus counts as done only after its bytes were read back, and hashing needs no extra pass.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import xxhash

from hf_grow.checkpoint.folder_exchange import error_filename
from hf_grow.checkpoint.partial_folder import PartialFolder
from hf_grow.checkpoint.reader import Checkpoint
from hf_grow.checkpoint.shard_sink import ShardSink
from hf_grow.checkpoint.tensor_cache import TensorCache
from hf_grow.checkpoint.transfer import copy_range, hash_range, write_all
from hf_grow.checkpoint.writer import Progress, Shard, Slot
from hf_grow.common.safe_files import open_regular
from hf_grow.errors import ExecutionError, GrowError, SourceError
from hf_grow.growth.finite_check import NOT_FINITE_HINT, FiniteCheck
from hf_grow.growth.plan import GrowthPlan
from hf_grow.growth.tensormap import Fill, Noise

if TYPE_CHECKING:
    from hf_grow.growth.evaluate import Evaluator


@dataclass
class WriteJob:
    """What the threads share."""

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
    """Source tensor -> digest of its bytes, computed once."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def stop(self) -> None:
        """Called between chunks; raises if the work is to stop."""
        if self.halt.is_set():
            raise _Stopped

    @cached_property
    def _evaluator(self) -> Evaluator:
        from hf_grow.checkpoint.stored_tensors import StoredTensors
        from hf_grow.growth.evaluate import Evaluator

        return Evaluator(self.plan, StoredTensors(self.checkpoint))

    def evaluator(self) -> Evaluator:
        """Created by the first thread that needs it; plans of copies never import torch."""
        with self.lock:
            return self._evaluator


class _Stopped(Exception):
    """Another thread failed, or the user interrupted the run."""


def write_shards(job: WriteJob, shards: Sequence[Shard], workers: int) -> dict[str, str]:
    """Writes all shards; returns file -> SHA-256. Any failure stops all threads before it is raised.

    While the checker of a shard reads it back, another thread syncs the file to disk.
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
        begun: deque[tuple[Shard, Future[Any], Future[Any]]] = deque()  # with the futures of its check and sync

        def deliver() -> None:
            shard, *finished = begun.popleft()
            wait(finished, return_when=FIRST_EXCEPTION)
            for future in futures:  # a failure of any shard stops all
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
            # Also on KeyboardInterrupt: `with` then waits for the threads, which stop at their next chunk.
            if not all(f.done() and f.exception() is None for f in futures):
                job.halt.set()
                for f in futures:
                    f.cancel()
    return hashes


@contextmanager
def _target(job: WriteJob, shard: Shard) -> Iterator[int]:
    handle = job.folder.open(shard.file)
    with error_filename(job.folder.path / shard.file):
        try:
            yield handle
        finally:
            os.close(handle)


def _check_shard(job: WriteJob, shard: Shard, written: Sequence[Future[str]]) -> str:
    """Reads each tensor back once it is written, compares its digest and records it; returns the shard's SHA-256."""
    with _target(job, shard) as target:
        sha = hashlib.sha256(shard.header)
        for slot, future in zip(shard.slots, written, strict=True):
            expected = future.result()
            if hash_range(target, slot.start, slot.stop, job.stop, sha) != expected:
                raise ExecutionError(
                    f"{slot.name} on disk differs from what was written to {shard.file}.", hint="The disk may be failing; run again."
                )
            if job.folder.done.get(slot.name) != expected:
                job.folder.note(slot.name, expected)
            job.progress(slot.stop - slot.start)
        return sha.hexdigest()


def _sync_shard(job: WriteJob, shard: Shard, written: Sequence[Future[str]]) -> None:
    for future in written:
        future.result()
    with _target(job, shard) as target:
        os.fsync(target)


def _write_tensor(job: WriteJob, shard: Shard, slot: Slot) -> str:
    """Writes one tensor into its slot; returns the digest of its bytes."""
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


def _copy_tensor(job: WriteJob, name: str, slot: Slot, target: int) -> str:
    path, stored = job.checkpoint.find(name)
    with open_regular(path) as source:
        handle = source.fileno()
        if name not in job.digests:  # this read fills the page cache for the copy
            values = FiniteCheck(stored.dtype)
            with error_filename(path):
                value = hash_range(handle, stored.start, stored.stop, job.stop, values)
            if not (values.finite or job.allow_nonfinite):
                raise SourceError(
                    f"{name} in {stored.file} contains NaN or infinite values; a model grown from it would be broken.",
                    hint=NOT_FINITE_HINT,
                )
            job.digests[name] = value
        copy_range(handle, target, stored.start, slot.start, stored.stop - stored.start, job.stop)
    return job.digests[name]


def _evaluate_tensor(job: WriteJob, slot: Slot, target: int) -> str:
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


def _blocks(job: WriteJob, slot: Slot) -> Iterator[memoryview | bytes]:
    """Yields the bytes of a computed tensor in blocks. Zeros and plain noise (a new router) need no torch, which saves its memory."""
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
