"""The folder of an output that is not whole yet.

Everything goes to NAME.partial/, finished tensors are noted in a journal with their digest, and in one step the folder gets its name. Whatever
happens before, nothing looks like a finished model. The journal goes last: where it still lies in NAME, the next run finishes what was begun.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
import threading
from collections.abc import Mapping
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType
from typing import Any

from hf_grow.checkpoint.folder_exchange import (
    error_filename,
    exchange,
    is_locked,
    is_plain_file,
    lock,
    locked_error,
    sync,
    sync_files,
    unlock,
    walk_folder,
)
from hf_grow.checkpoint.reader import GROWTH, INDEX, TEMPLATES
from hf_grow.checkpoint.source import CONFIG, companion_bytes, is_companion
from hf_grow.checkpoint.writer import Shard
from hf_grow.common.safe_files import error_text, read_bytes, to_json
from hf_grow.errors import OutputError, SourceError

JOURNAL = ".hf-grow-journal.jsonl"
SOURCE_CACHE = ".source"
"""Folder of source tensors that are here for a while."""
_SHARD = re.compile(r"model(-\d{5,}-of-\d{5,})?\.safetensors")
_TRAINER = ("optimizer.*", "scheduler.pt", "scaler.pt", "trainer_state.json", "rng_state*.pth")  # grown along with a model


class PartialFolder:
    """NAME.partial/ with its journal, locked against a second writer; becomes NAME by `finish`.

    Raises OutputError if NAME exists (unless `overwrite`), or if a partial output is there and neither `resume` nor `overwrite` was said,
    or belongs to another plan, or holds what hf-grow did not write. With both, the partial output is gone on with, and replaces NAME.
    """

    def __init__(self, final: Path, fingerprint: str, *, resume: bool, overwrite: bool, resumable: bool = True) -> None:
        _check_name(final)
        self.final = final
        self.path = final.with_name(final.name + ".partial")
        self.fingerprint = fingerprint
        self.overwrite = overwrite
        self.resumable = resumable
        """Whether the command that writes here can go on with what an interrupted run left."""
        self.complete = False
        """An earlier run was interrupted in its very last step: NAME is whole, and nothing is to be written."""
        self.done: dict[str, str] = {}
        """Tensors written by an earlier, interrupted run -> digest of their bytes."""
        self.sent: dict[str, tuple[int, str]] = {}
        """Shards that an earlier run sent away -> size and SHA-256."""
        self.committed: dict[str, Any] = {}
        """What an earlier run noted of the commit that published them."""
        self._journal_lock = threading.Lock()
        self._folder = self._journal = -1
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            self._lock_file = _lock_of(final)
            self._lock = lock(self._lock_file, self.path)
            try:
                self._begin(resume)
            except BaseException:
                self.close()
                raise
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            hint = "Free some space, or choose another place with -o." if full else "Choose another place with -o."
            raise OutputError(f"Cannot write {error.filename or self.path}: {error_text(error)}.", hint=hint) from None

    @staticmethod
    def check(final: Path, *, resume: bool, overwrite: bool, resumable: bool = True) -> None:
        """Raises OutputError if `final` must not be written; writes nothing, so that a dry run can ask too."""
        if is_locked(_lock_of(final)):
            raise locked_error(final)
        try:
            _check(final, resume, overwrite, resumable)
        except OSError as error:
            raise OutputError(
                f"Cannot write {error.filename or final}: {error_text(error)}.", hint="Choose another place with -o."
            ) from None

    def _begin(self, resume: bool) -> None:
        _check(self.final, resume, self.overwrite, self.resumable)
        self._finish_interrupted(resume)
        if self.complete:
            return
        _check(self.final, resume, self.overwrite, self.resumable)  # again, now that what was interrupted is ended
        if self.path.exists() and not resume:
            shutil.rmtree(self.path)
        self.path.mkdir(exist_ok=True)
        self._folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        for name, is_folder, odd in walk_folder(self._folder):
            if odd or not _made_here(name, is_folder):
                raise OutputError(
                    f"{self.path / name} was not made by hf-grow.",
                    hint="Remove it, and whatever else is not yours; or start anew with --overwrite.",
                )
        self._journal = self.open(JOURNAL, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        self._load_journal()

    def _load_journal(self) -> None:
        text = read_bytes(self.path / JOURNAL, error=OutputError)
        if text and not text.endswith(b"\n"):
            self._write(b"\n")  # end a torn line, so that the next entry stands alone
        entries = _entries(text)
        if not entries:
            self._append({"fingerprint": self.fingerprint})
            return
        if entries[0].get("fingerprint") != self.fingerprint:
            raise OutputError(
                f"{self.path} belongs to another plan (other source, options, shard size or version).",
                hint="Repeat the command that began it, or start anew with --overwrite.",
            )
        for e in entries[1:]:
            if isinstance(e.get("tensor"), str) and isinstance(e.get("digest"), str):
                self.done[e["tensor"]] = e["digest"]
            elif isinstance(e.get("sent"), str) and isinstance(e.get("size"), int) and re.fullmatch(r"[0-9a-f]{64}", str(e.get("sha256"))):
                self.sent[e["sent"]] = e["size"], e["sha256"]
            elif isinstance(e.get("committed"), dict):
                self.committed = e["committed"]
        if "finished" in entries[-1]:
            self._append({"resumed": True})  # what is written from here on may be half there

    def note(self, tensor: str, digest: str) -> None:
        self._append({"tensor": tensor, "digest": digest})

    def note_sent(self, shard: Shard, sha256: str) -> None:
        self._append({"sent": shard.file, "size": shard.size, "sha256": sha256})

    def note_committed(self, facts: dict[str, Any]) -> None:
        self._append({"committed": facts})

    def _append(self, entry: dict[str, Any]) -> None:
        self._write(to_json(entry, indent=None).encode())

    def _write(self, data: bytes) -> None:
        with self._journal_lock, error_filename(self.path / JOURNAL):
            while data:
                data = data[os.write(self._journal, data) :]

    def open(self, name: str, flags: int = os.O_RDWR | os.O_CREAT) -> int:
        """A file of the folder, to be written: never through a link that leads elsewhere, nor under a second name. Raises OutputError, OSError."""
        parent, _, last = name.rpartition("/")
        with error_filename(self.path / name):
            folder = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=self._folder) if parent else self._folder
            try:
                handle = os.open(last, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666, dir_fd=folder)
            finally:
                if parent:
                    os.close(folder)
            if is_plain_file(os.fstat(handle)):
                return handle
            os.close(handle)
        raise OutputError(f"{self.path / name} was not made by hf-grow.", hint="Remove it, or start anew with --overwrite.")

    def write_file(self, name: str, data: bytes) -> None:
        handle = self.open(name)
        with error_filename(self.path / name):
            try:
                os.ftruncate(handle, 0)  # now, not while opening: a file of two names must keep its content
                while data:
                    data = data[os.write(handle, data) :]
            finally:
                os.close(handle)

    def write_json(self, name: str, data: Any) -> None:
        self.write_file(name, to_json(data).encode())

    def copy_companion(self, folder: Path, relative: Path) -> None:
        """Copies a file that comes along from another folder; its mode follows the umask."""
        if relative.parent.name:
            (self.path / relative).parent.mkdir(exist_ok=True)
        self.write_file(relative.as_posix(), companion_bytes(folder / relative))

    def remove_except(self, keep: set[str]) -> None:
        """Removes what is neither the journal nor in `keep`, by name in the folder itself."""
        for name in set(os.listdir(self._folder)) - keep - {JOURNAL}:
            with error_filename(self.path / name):
                if stat.S_ISDIR(os.stat(name, dir_fd=self._folder, follow_symlinks=False).st_mode):
                    shutil.rmtree(self.path / name)
                else:
                    os.unlink(name, dir_fd=self._folder)

    def finish(self, files: set[str]) -> None:
        """Everything is written: it goes to the disk, what is none of `files` goes, and the folder gets its name."""
        self.remove_except(files)
        sync_files(self._folder, self.path)
        sync(self.path)
        replaced = None
        aside = self.final.with_name(f"{self.final.name}.replaced-{os.getpid()}")
        if self.overwrite and self.final.exists():
            replaced = {"inode": _inode(self.final), "aside": aside.name}
        self._append({"finished": True, "replaced": replaced})
        with error_filename(self.path / JOURNAL):
            os.fsync(self._journal)
        if not (replaced and exchange(self.path, self.final)):
            if replaced:
                os.rename(self.final, aside)
            os.rename(self.path, self.final)
        self._finished(replaced)

    def _finish_interrupted(self, resume: bool) -> None:
        """Ends what a run began that was interrupted while the folder got its name."""
        entries, last = _journal_of(self.final)
        if last is None:
            entries, last = _journal_of(self.path)
            aside = _aside(self.final, last)
            if last is None or aside is None or os.path.lexists(self.final):
                return  # not so far yet
            os.rename(self.path, self.final)
        self._finished(last["replaced"])
        self.complete = resume and entries[0].get("fingerprint") == self.fingerprint

    def _finished(self, replaced: Mapping[str, Any] | None) -> None:
        """The new folder bears its name: the old one goes, then the journal."""
        sync(self.final.parent)
        for place in (self.path, _aside(self.final, {"replaced": replaced})):
            if replaced and place is not None and os.path.lexists(place) and _inode(place) == replaced.get("inode"):
                shutil.rmtree(place)
        (self.final / JOURNAL).unlink()
        sync(self.final)

    def discard(self) -> None:
        """Everything is elsewhere: nothing stays here. The journal, which knows that, goes last."""
        self.remove_except(set())
        shutil.rmtree(self.path)

    @property
    def resume_hint(self) -> str:
        """What a user can do after an error, or an interruption."""
        if not self.resumable:
            return "Repeat the command with --overwrite."
        where = f" in {self.path}" if os.path.lexists(self.path) else ""
        return f"What is written stays{where}; repeat the command with {'--overwrite --resume' if self.overwrite else '--resume'}."

    def __enter__(self) -> PartialFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Nothing that matters is left to be written, so nothing here fails."""
        for handle in (self._journal, self._folder):
            with suppress(OSError):
                os.close(handle)
        unlock(self._lock_file, self._lock)


def _lock_of(final: Path) -> Path:
    _check_name(final)
    return final.with_name(f".{final.name}.lock")


def _check_name(final: Path) -> None:
    if final.name in ("", "..") or "\0" in str(final):
        raise OutputError(f"{str(final)!r} is no name for a new folder.", hint="Choose another place with -o.")


def _check(final: Path, resume: bool, overwrite: bool, resumable: bool) -> None:
    partial = final.with_name(final.name + ".partial")
    for place in (final, partial):
        if os.path.lexists(place) and not stat.S_ISDIR(os.lstat(place).st_mode):
            raise OutputError(f"{place} exists and is no folder.", hint="Choose another place with -o.")
    begun = os.path.lexists(partial)
    if final.is_dir() and any(final.iterdir()) and not overwrite:
        if _journal_of(final)[1] is not None:
            if resume:
                return  # it is whole: what the interrupted run left is tidied up, and that is all
            hint = "Repeat the command with --resume, which ends it." if resumable else "Repeat the command with --overwrite."
            raise OutputError(f"{final} is whole, but its run was interrupted in its last step.", hint=hint)
        if begun and resumable:
            raise OutputError(
                f"{final} exists, and {partial} is left over from an interrupted run.",
                hint="Go on with --overwrite --resume, which replaces what exists when the new one is whole; or choose another place with -o.",
            )
        raise OutputError(f"{final} exists and is not empty.", hint="Choose another place with -o, or replace it with --overwrite.")
    if begun and not (resume or overwrite):
        aside = _aside(final, _journal_of(partial)[1])
        old = f" What it replaces lies in {aside} meanwhile." if aside and aside.exists() else ""
        raise OutputError(
            f"{partial} is left over from an interrupted run.{old}",
            hint=f"{'Go on where it stopped with --resume, or start' if resumable else 'Start'} anew with --overwrite.",
        )
    if not begun and not os.path.lexists(final):
        for name in os.listdir(final.parent) if final.parent.is_dir() else ():
            if aside := _aside(final, {"replaced": {"aside": name}}):
                hint = f"Move it back (mv {aside} {final}), or remove it."
                raise OutputError(f"{aside} was {final} before a run that was to replace it was interrupted.", hint=hint)


def _made_here(name: str, is_folder: bool) -> bool:
    """Whether hf-grow puts a file of this name into a partial folder."""
    top, _, rest = name.partition("/")
    if is_folder:
        return name in (SOURCE_CACHE, TEMPLATES)
    if top == SOURCE_CACHE or rest:
        return top == SOURCE_CACHE or is_companion(name)
    return (
        name in (JOURNAL, CONFIG, INDEX, GROWTH)
        or bool(_SHARD.fullmatch(name))
        or is_companion(name)
        or any(fnmatchcase(name, p) for p in _TRAINER)
    )


def _journal_of(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """The entries of a folder's journal, and the one that says that all was written, if any."""
    try:
        entries = _entries(read_bytes(folder / JOURNAL))
    except SourceError:
        return [], None
    ended = [e for e in entries if e.get("finished") is True and isinstance(e.get("replaced"), dict | None)]
    return entries, ended[-1] if ended and entries[-1] is ended[-1] else None


def _entries(text: bytes) -> list[dict[str, Any]]:
    """Lines that are none are left out: one may be torn by kill -9, and its tensor is simply written again."""
    entries = []
    for line in text.split(b"\n"):
        with suppress(ValueError, RecursionError):
            entries.append(json.loads(line))
    return [e for e in entries if isinstance(e, dict)]


def _aside(final: Path, entry: Mapping[str, Any] | None) -> Path | None:
    """Where the old folder went, where two renames were needed; a journal can name no other place."""
    name = str(((entry or {}).get("replaced") or {}).get("aside"))
    return final.with_name(name) if re.fullmatch(re.escape(final.name) + r"\.replaced-\d+", name) else None


def _inode(path: Path) -> list[int]:
    found = os.lstat(path)
    return [found.st_dev, found.st_ino]
