"""Tensor cache for a remote source: each tensor is downloaded by a byte-range request when it is needed, and deleted after its last use.

Which tensors are kept between two uses is decided from the plan, before the first download: those needed soonest, up to a size limit
(Belady's algorithm). The number of bytes to download is therefore known in advance; it is smaller when two threads need a tensor at once.

Integrity: ranges are requested from one commit. The length of the range, the size of the file and its SHA-256 as reported by the Hub must
equal the listed ones, and the ETag must be the same in all responses. The SHA-256 cannot be computed, since the complete file is never
downloaded: only `verify` against the downloaded source detects a server that sends other bytes under the same headers. A tensor that is
downloaded twice must be equal both times, and files that are downloaded whole (config, index, tokenizer, licenses) must have the listed hash.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import xxhash

from hf_grow.checkpoint.byte_ranges import fetch_range
from hf_grow.checkpoint.hub_errors import Unreachable
from hf_grow.checkpoint.partial_folder import SOURCE_CACHE
from hf_grow.checkpoint.reader import Checkpoint
from hf_grow.checkpoint.safetensors_header import TensorLocation
from hf_grow.checkpoint.transfer import Stop, write_all
from hf_grow.checkpoint.writer import DEFAULT_SOURCE_CACHE, Shard
from hf_grow.errors import ExecutionError
from hf_grow.growth.plan import GrowthPlan


@dataclass(frozen=True)
class Schedule:
    """Which source tensors are downloaded for each target tensor, and which are kept for a later one."""

    needs: Mapping[str, tuple[str, ...]]
    """Target tensor -> remote source tensors it needs, by `Source.key`."""
    stays: Mapping[tuple[str, str], str]
    """(target, source tensor) -> the later target for which the source tensor is kept."""
    fetched: int
    """Bytes to download in total."""
    once: int
    """Bytes to download if every source tensor were downloaded once."""
    waiting: int
    """Peak size of the tensors that are kept for later use, in bytes."""
    largest: int
    """Largest number of bytes that one target tensor needs."""


def schedule(plan: GrowthPlan, order: Sequence[str], remote: frozenset[str], keep: int) -> Schedule:
    """The schedule for targets made in `order`. ``remote``: source tensors to download; ``keep``: bytes for tensors that are used again."""
    sizes = {key: plan.source.by_key[key].nbytes for key in remote}
    needs = {t: tuple(dict.fromkeys(s.key for s in plan.growth.tensors[t].sources() if s.key in remote)) for t in order}
    uses: dict[str, list[int]] = {}
    for at, target in enumerate(order):
        for key in needs[target]:
            uses.setdefault(key, []).append(at)
    later = {key: iter(positions[1:]) for key, positions in uses.items()}
    waits: dict[str, tuple[int, str]] = {}  # source tensor -> its next use, and the target that left it
    stays: dict[tuple[str, str], str] = {}
    fetched = waiting = held = 0
    for target in order:
        for key in needs[target]:
            if key in waits:
                stays[waits.pop(key)[1], key] = target
                held -= sizes[key]
            else:
                fetched += sizes[key]
        for key in needs[target]:
            following = next(later[key], None)
            if following is not None:
                waits[key] = following, target
                held += sizes[key]
        while held > keep:
            furthest = max(waits, key=lambda key: waits[key])
            del waits[furthest]
            held -= sizes[furthest]
        waiting = max(waiting, held)
    largest = max((sum(sizes[key] for key in keys) for keys in needs.values()), default=0)
    return Schedule(needs, stays, fetched, sum(sizes[key] for key in uses), waiting, largest)


@dataclass
class _Tensor:
    """State of one source tensor in the cache."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    here: bool = False
    users: int = 0
    awaited: set[str] = field(default_factory=set)
    """Targets for which it is kept."""
    digest: str = ""


class TensorCache:
    """Holds the source tensors of a plan in one file each, for as long as they are needed. Thread-safe.

    ``shards``: the output layout, which determines the order of the targets. ``keep``: bytes for tensors that are needed again.
    """

    def __init__(self, plan: GrowthPlan, source: Checkpoint, shards: Sequence[Shard], *, keep: int = DEFAULT_SOURCE_CACHE) -> None:
        self._origin: dict[str, tuple[Checkpoint, TensorLocation]] = {}
        for label, part in [("", source), *source.donors.items()]:
            if part.folder is None:
                self._origin |= {f"{label}::{name}" if label else name: (part, stored) for name, stored in part.tensors.items()}
        self.schedule = schedule(plan, [slot.name for shard in shards for slot in shard.slots], frozenset(self._origin), keep)
        self.fetched = 0
        """Bytes downloaded so far."""
        self._source = source
        self._places = {
            key: TensorLocation(f"{stored.file}.{number}", stored.dtype, stored.shape, 0, stored.stop - stored.start)
            for number, (key, (_, stored)) in enumerate(self._origin.items())
        }
        self._tensors = {key: _Tensor() for key in self._origin}
        self._seen: set[str] = set()
        self._tags: dict[str, dict[tuple[str, str], str]] = {part.ref: {} for part, _ in self._origin.values()}
        self._lock = threading.Lock()

    def peak_bytes(self, workers: int) -> int:
        """Upper bound of the cache's size on disk when `workers` targets are made at the same time."""
        return min(self.schedule.waiting + workers * self.schedule.largest, self.schedule.once)

    @contextmanager
    def open(self, folder: Path) -> Iterator[Checkpoint]:
        """Yields the source as a checkpoint that reads from the cache in `folder`. The cache is emptied first and deleted at the end."""
        self._folder = folder / SOURCE_CACHE
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir()
        try:
            yield self._view(self._source, "")
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _view(self, part: Checkpoint, label: str) -> Checkpoint:
        others = {name: self._view(other, name) for name, other in part.donors.items()}
        if part.folder is not None:
            return replace(part, donors=others)
        tensors = {name: self._places[f"{label}::{name}" if label else name] for name in part.tensors}
        return replace(part, tensors=tensors, folder=self._folder, donors=others)

    @contextmanager
    def fetched_for(self, target: str, stop: Stop) -> Iterator[None]:
        """Context in which the source tensors of one target are in the cache. Raises ExecutionError, SourceError."""
        keys = self.schedule.needs.get(target, ())
        with self._lock:
            self._seen.add(target)
            for key in keys:
                self._tensors[key].users += 1
                self._tensors[key].awaited.discard(target)
        try:
            for key in keys:
                self._fetch(key, stop)
            yield
        finally:
            with self._lock:
                for key in keys:
                    following = self.schedule.stays.get((target, key))
                    if following is not None and following not in self._seen:
                        self._tensors[key].awaited.add(following)
                    self._tensors[key].users -= 1
                    self._drop_unused(key)

    def skip(self, target: str) -> None:
        """Marks a target that an earlier run wrote: no tensors are kept for it."""
        with self._lock:
            self._seen.add(target)
            for key in self.schedule.needs.get(target, ()):
                self._tensors[key].awaited.discard(target)
                self._drop_unused(key)

    def _drop_unused(self, key: str) -> None:
        tensor = self._tensors[key]
        if tensor.here and not tensor.users and not tensor.awaited:
            (self._folder / self._places[key].file).unlink(missing_ok=True)
            tensor.here = False

    def _fetch(self, key: str, stop: Stop) -> None:
        tensor, (part, stored) = self._tensors[key], self._origin[key]
        with tensor.lock:
            if tensor.here:
                return
            facts = part.files[stored.file]
            path = self._folder / self._places[key].file
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            at, hasher = 0, xxhash.xxh3_128()
            try:
                for piece in fetch_range(
                    part.ref,
                    part.revision,
                    stored.file,
                    stored.start,
                    stored.stop,
                    facts["size"],
                    facts.get("sha256"),
                    self._tags[part.ref],
                ):
                    stop()
                    write_all(handle, piece, at)
                    hasher.update(piece)
                    at += len(piece)
            except Unreachable as error:
                raise ExecutionError(
                    error.message, hint="Check the network and repeat the command with --resume; what was written is not downloaded again."
                ) from None
            finally:
                os.close(handle)
            if tensor.digest not in ("", hasher.hexdigest()):
                raise ExecutionError(
                    f"{key} was downloaded twice, and the two copies differ.",
                    hint="The connection or the Hub is at fault: repeat with --overwrite.",
                )
            tensor.digest = hasher.hexdigest()
            with self._lock:
                tensor.here = True
                self.fetched += at
