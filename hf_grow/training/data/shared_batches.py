"""Batches of self-replay that several processes sample, each into a file, while the first process filters them in order.

What a batch holds depends on its number, size and kind alone, so the texts do not depend on the processes. The first process decides which batch comes
next, from what it kept so far; the others sample those that will probably come next. No process waits in a collective, which would time out.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hf_grow.errors import ExecutionError, OutputError
from hf_grow.training.data.cache import CACHE_HINT
from hf_grow.training.data.replay_files import BATCHES_FOLDER
from hf_grow.training.data.sample_filters import Sample
from hf_grow.training.distributed.processes import Processes

if TYPE_CHECKING:
    from hf_grow.training.data.sampling import Sampler

_POLL_SECONDS = 0.1


class Batch(NamedTuple):
    """What determines the texts of a batch, with the model and the settings."""

    number: int
    size: int
    chat: bool


@dataclass(frozen=True)
class SamplingGroup:
    """Processes that sample into one folder."""

    index: int
    """The first one, 0, filters and writes the texts."""
    count: int
    session: str
    """Of this launch: what an earlier one left unfinished does not count as being worked on."""


def sampling_group(processes: Processes, local: Processes, root: Path) -> SamplingGroup:
    """All processes if they share the folder `root`, else those of each machine. A collective. Raises OutputError, in all."""
    session = str(processes.gather(uuid.uuid4().hex)[0])
    marker = root / f".{session}"
    problem = None
    if processes.index == 0:
        try:
            root.mkdir(parents=True, exist_ok=True)
            marker.touch()
        except OSError as error:
            problem = error.strerror or str(error)
    problem = processes.gather(problem)[0]  # the marker is there before any process looks for it
    if problem is not None:
        raise OutputError(f"The cache {root} cannot be written: {problem}.", hint=CACHE_HINT)
    shared = all(processes.gather(os.path.exists(marker)))  # False, unlike Path.exists, where it may not look
    if processes.index == 0:
        marker.unlink(missing_ok=True)
    group = processes if shared else local
    return SamplingGroup(group.index, group.count, session)


class SharedBatches:
    """The files of batches beside the texts of the replay folder `out`."""

    def __init__(self, out: Path, group: SamplingGroup) -> None:
        self.out, self.group = out, group
        self._folder = out / BATCHES_FOLDER

    def _path(self, batch: Batch) -> Path:
        return self._folder / f"{batch.number:06}-{batch.size}-{'chat' if batch.chat else 'plain'}.json"

    @property
    def _failure(self) -> Path:
        return self._folder / f"failed-{self.group.session}"

    def load(self, batch: Batch) -> list[Sample] | None:
        """The samples of a batch; None if no process has finished it."""
        try:
            found = json.loads(self._path(batch).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return [Sample(**{**s, "ids": tuple(s["ids"])}) for s in found]

    def sample_one(self, sampler: Sampler, batches: Iterable[Batch]) -> bool:
        """Samples the first of `batches` that no process has begun. Returns whether there was one."""
        for batch in batches:
            path = self._path(batch)
            if path.exists() or not self._claim(path):
                continue
            samples = sampler.draw(batch.number, batch.size, chat=batch.chat)
            new = path.with_suffix(f".{self.group.session}.{self.group.index}")
            with suppress(FileNotFoundError):  # of the folder: the first process has finished
                new.write_text(json.dumps([asdict(s) for s in samples]), encoding="utf-8")
                os.replace(new, path)
            return True
        return False

    def _claim(self, path: Path) -> bool:
        """Whether this process is the first of the session that wants the batch."""
        try:
            path.with_suffix(f".{self.group.session}").touch(exist_ok=False)
        except (FileExistsError, FileNotFoundError):
            return False
        return True

    def draw(self, sampler: Sampler, batch: Batch, ahead: Iterable[Batch]) -> list[Sample]:
        """The samples of a batch, whoever samples it; meanwhile this process samples others of those that come next."""
        self._folder.mkdir(exist_ok=True)
        while (samples := self.load(batch)) is None:
            if not self.sample_one(sampler, [batch, *ahead]):
                self.wait()
        self._path(batch).unlink(missing_ok=True)
        return samples

    def wait(self) -> None:
        """Raises ExecutionError if another process failed."""
        if self._failure.exists():
            message = self._failure.read_text(encoding="utf-8")
            raise ExecutionError(f"Another process failed while sampling: {message}", hint="What was sampled so far is kept.")
        time.sleep(_POLL_SECONDS)

    def fail(self, message: str) -> None:
        """Tells the others that this process does not go on, and why, unless another one failed before."""
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            if self._failure.exists():
                return
            new = self._folder / f"failing-{self.group.session}.{self.group.index}"
            try:
                new.write_text(message, encoding="utf-8")
                os.replace(new, self._failure)
            except OSError:
                self._failure.touch()  # a full disk may still take an empty file

    def clear(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
