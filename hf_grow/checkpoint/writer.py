"""Writing a checkpoint whose every byte has its place before the first is written.

`layout` turns shapes into shards with finished headers and offsets, so tensors can be written in any order and in parallel.
`PartialFolder` holds the output until it is whole: everything goes to NAME.partial/, finished tensors are noted in a journal with their
digest, and one rename gives the folder its name. Whatever happens before that rename, nothing looks like a finished model.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from hf_grow.checkpoint.reader import SINGLE
from hf_grow.errors import InputError, OutputError
from hf_grow.planning import DTYPE_BYTES, TensorInfo

DEFAULT_SHARD_SIZE = 50 * 10**9  # as save_pretrained of transformers 5
DEFAULT_MEMORY = 256 << 20  # for evaluating what is no copy
DEFAULT_SOURCE_CACHE = 2 * 10**9  # for tensors of a source on the Hub that wait for another use
WORKERS = min(4, os.cpu_count() or 1)
Progress = Callable[[int], None]
"""Told the number of bytes that were written and checked since the last call."""
JOURNAL = ".hf-grow-journal.jsonl"
FROM_TORCH = {"format": "pt"}  # what save_pretrained writes into the header, and from_pretrained asks for


@dataclass(frozen=True)
class Slot:
    """The place of one tensor: bytes [start, stop) of its shard."""

    name: str
    info: TensorInfo
    start: int
    stop: int


@dataclass(frozen=True)
class Shard:
    file: str
    header: bytes
    slots: tuple[Slot, ...]

    @property
    def size(self) -> int:
        return self.slots[-1].stop if self.slots else len(self.header)


def layout(targets: Mapping[str, TensorInfo], max_shard_size: int) -> list[Shard]:
    """Shards filled in order, each up to `max_shard_size` bytes of data (a larger single tensor gets a shard of its own)."""
    groups: list[list[str]] = [[]]
    room = max_shard_size
    for name, info in targets.items():
        if groups[-1] and info.nbytes > room:
            groups.append([])
            room = max_shard_size
        groups[-1].append(name)
        room -= info.nbytes
    total = len(groups)
    names = [SINGLE] if total == 1 else [f"model-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total)]
    return [shard_of(file, {n: targets[n] for n in group}) for file, group in zip(names, groups, strict=True)]


def shard_of(file: str, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str] = FROM_TORCH) -> Shard:
    """Wider dtypes first, as safetensors does: then every tensor is aligned to its own values."""
    order = sorted(tensors, key=lambda n: -DTYPE_BYTES[tensors[n].dtype])
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offsets: dict[str, tuple[int, int]] = {}
    at = 0
    for name in order:
        info = tensors[name]
        offsets[name] = at, at + info.nbytes
        header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": list(offsets[name])}
        at += info.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    raw = len(text).to_bytes(8, "little") + text
    base = len(raw)
    return Shard(file, raw, tuple(Slot(n, tensors[n], base + offsets[n][0], base + offsets[n][1]) for n in order))


def index_of(shards: list[Shard]) -> dict[str, Any] | None:
    """The index file of a sharded checkpoint; None for a single file."""
    if len(shards) == 1:
        return None
    slots = [(slot, shard.file) for shard in shards for slot in shard.slots]
    return {
        "metadata": {
            "total_parameters": sum(s.info.nbytes // DTYPE_BYTES[s.info.dtype] for s, _ in slots),
            "total_size": sum(s.info.nbytes for s, _ in slots),
        },
        "weight_map": {s.name: file for s, file in sorted(slots, key=lambda item: item[0].name)},
    }


class PartialFolder:
    """NAME.partial/ with its journal, locked against a second writer; becomes NAME by `finish`.

    Raises OutputError if NAME exists (unless `overwrite`), or if a partial output is there and neither `resume` nor `overwrite` was said,
    or belongs to another plan.
    """

    def __init__(self, final: Path, fingerprint: str, *, resume: bool, overwrite: bool) -> None:
        if resume and overwrite:
            raise InputError("--resume and --overwrite exclude each other: one keeps what is there, the other discards it.")
        self.final = final
        self.path = final.with_name(final.name + ".partial")
        self.fingerprint = fingerprint
        self.overwrite = overwrite
        self.done: dict[str, str] = {}
        """Tensors written by an earlier, interrupted run -> digest of their bytes."""
        self.sent: dict[str, tuple[int, str]] = {}
        """Shards that an earlier run sent away -> size and SHA-256."""
        self.committed: dict[str, Any] = {}
        """What an earlier run noted of the commit that published them."""
        self._journal_lock = threading.Lock()
        self.check(final, resume=resume, overwrite=overwrite)
        try:
            if self.path.exists() and not resume:
                self._lock(exclusive_only=True)
                shutil.rmtree(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock()
        except OSError as error:
            raise OutputError(f"Cannot write {self.path}: {error.strerror}.", hint="Choose another place with -o.") from None
        self._load_journal()

    @staticmethod
    def check(final: Path, *, resume: bool, overwrite: bool) -> None:
        """Raises OutputError if `final` must not be written; writes nothing, so that a dry run can ask too."""
        partial = final.with_name(final.name + ".partial")
        if final.is_symlink() or (final.exists() and not final.is_dir()):
            raise OutputError(f"{final} exists and is no folder.", hint="Choose another place with -o.")
        if final.is_dir() and any(final.iterdir()) and not overwrite:
            raise OutputError(f"{final} exists and is not empty.", hint="Choose another place with -o, or replace it with --overwrite.")
        if partial.exists() and not (resume or overwrite):
            raise OutputError(
                f"{partial} is left over from an interrupted run.",
                hint="Go on where it stopped with --resume, or start anew with --overwrite.",
            )

    def _lock(self, *, exclusive_only: bool = False) -> None:
        """One writer at a time. The lock dies with the process, so kill -9 leaves none behind."""
        journal = (self.path / JOURNAL).open("a+b")
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            journal.close()
            raise OutputError(f"Another hf-grow is writing {self.path} right now.", hint="Wait for it, or choose another -o.") from None
        if exclusive_only:
            journal.close()
        else:
            self._journal = journal

    def _load_journal(self) -> None:
        self._journal.seek(0)
        lines = self._journal.read().split(b"\n")
        entries = []
        for line in lines:
            try:
                entries.append(json.loads(line))
            except ValueError:
                continue  # a line torn by kill -9: its tensor is simply written again
        if not entries:
            self._append({"fingerprint": self.fingerprint})
            return
        if not isinstance(entries[0], dict) or entries[0].get("fingerprint") != self.fingerprint:
            self._journal.close()
            raise OutputError(
                f"{self.path} belongs to another plan (other source, options, shard size or version).",
                hint="Repeat the command that began it, or start anew with --overwrite.",
            )
        if lines[-1]:
            self._journal.write(b"\n")  # end the torn line, so that the next entry stands alone
        notes = [e for e in entries[1:] if isinstance(e, dict)]
        self.done = {e["tensor"]: e["digest"] for e in notes if "tensor" in e}
        self.sent = {e["sent"]: (e["size"], e["sha256"]) for e in notes if "sent" in e}
        self.committed = next((e["committed"] for e in notes if "committed" in e), {})

    def note(self, tensor: str, digest: str) -> None:
        self._append({"tensor": tensor, "digest": digest})

    def note_sent(self, shard: Shard, sha256: str) -> None:
        self._append({"sent": shard.file, "size": shard.size, "sha256": sha256})

    def note_committed(self, facts: dict[str, Any]) -> None:
        self._append({"committed": facts})

    def _append(self, entry: dict[str, Any]) -> None:
        with self._journal_lock:
            self._journal.write(json.dumps(entry).encode() + b"\n")
            self._journal.flush()

    def write_file(self, name: str, data: bytes) -> None:
        with (self.path / name).open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())

    def write_json(self, name: str, data: Any) -> None:
        self.write_file(name, (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode())

    def copy_in(self, folder: Path, relative: Path) -> None:
        """Copies a small file from another folder; its mode follows the umask."""
        (self.path / relative).parent.mkdir(parents=True, exist_ok=True)
        self.write_file(str(relative), (folder / relative).read_bytes())

    def finish(self, files: set[str]) -> None:
        """Everything is written and synced: drop the journal and what is none of `files`, and give the folder its name."""
        for path in self.path.iterdir():
            if path.is_file() and path.name not in files:
                path.unlink()
        _sync_folder(self.path)
        aside = None
        if self.overwrite and self.final.exists():
            aside = self.final.with_name(f"{self.final.name}.replaced-{os.getpid()}")
            self.final.rename(aside)
        self.path.rename(self.final)
        _sync_folder(self.final.parent)
        if aside is not None:
            shutil.rmtree(aside)

    def discard(self) -> None:
        """Everything is elsewhere: nothing stays here."""
        shutil.rmtree(self.path)

    def __enter__(self) -> PartialFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._journal.close()


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_room(final: Path, nbytes: int, already: int = 0) -> None:
    """Raises OutputError if the disk of `final` plainly has no room for `nbytes`, of which `already` are written."""
    folder = final.absolute().parent
    while not folder.exists():
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    free = usage.free
    if usage.total and nbytes - already > free:
        raise OutputError(
            f"{final} needs {(nbytes - already) / 1e9:.2f} GB, but {folder} has {free / 1e9:.2f} GB free.",
            hint="Free some space, or choose another disk with -o.",
        )
