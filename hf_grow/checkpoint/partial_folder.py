"""The folder of an output that is not complete yet.

Everything is written to NAME.partial/; finished tensors are recorded in a journal with their digests, and a single rename gives the folder its name.
Until then nothing looks like a finished model. The journal is removed last: if NAME still contains one, the next run completes the last step.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
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
from hf_grow.checkpoint.journal import JOURNAL, Journal, read_journal, replaced_folder
from hf_grow.checkpoint.reader import GROWTH, INDEX, TEMPLATES
from hf_grow.checkpoint.source import CONFIG, companion_bytes, is_companion
from hf_grow.checkpoint.writer import Shard
from hf_grow.common.safe_files import error_text, to_json
from hf_grow.errors import OutputError

SOURCE_CACHE = ".source"
"""Subfolder of source tensors that are downloaded temporarily."""
_SHARD = re.compile(r"model(-\d{5,}-of-\d{5,})?\.safetensors")
_TRAINER = ("optimizer.*", "scheduler.pt", "scaler.pt", "trainer_state.json", "rng_state*.pth")  # grown along with a model


class PartialFolder:
    """NAME.partial/ with its journal, locked against other writers; `finish` renames it to NAME.

    Args:
        final: the output folder NAME.
        fingerprint: identifies the plan; a partial folder with another fingerprint cannot be resumed.
        resume: continue with the partial folder of an interrupted run, if there is one.
        overwrite: replace NAME if it exists, and discard a partial folder (unless `resume`).
        resumable: whether the command can resume, which decides the hints of errors.

    Raises OutputError if NAME exists (unless `overwrite`), if there is a partial folder and neither `resume` nor `overwrite` is set, if it belongs
    to another plan, or if it contains files that hf-grow does not write.
    """

    def __init__(self, final: Path, fingerprint: str, *, resume: bool, overwrite: bool, resumable: bool = True) -> None:
        _check_name(final)
        self.final = final
        self.path = final.with_name(final.name + ".partial")
        self.fingerprint = fingerprint
        self.overwrite = overwrite
        self.resumable = resumable
        self.complete = False
        """The earlier run was interrupted in its last step: NAME is complete, and nothing is to be written."""
        self.done: dict[str, str] = {}
        """Tensors written by an interrupted run -> digest of their bytes."""
        self.sent: dict[str, tuple[int, str]] = {}
        """Shards that an interrupted run uploaded -> size in bytes and SHA-256."""
        self.committed: dict[str, Any] = {}
        """What an interrupted run recorded about the commit that published them."""
        self._folder = -1
        self._journal: Journal | None = None
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            self._lock_path = _lock_path(final)
            self._lock = lock(self._lock_path, self.path)
            try:
                self._begin(resume)
            except BaseException:
                self.close()
                raise
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            hint = "Free some space, or choose another output with -o." if full else "Choose another output with -o."
            raise OutputError(f"Cannot write {error.filename or self.path}: {error_text(error)}.", hint=hint) from None

    @staticmethod
    def check(final: Path, *, resume: bool, overwrite: bool, resumable: bool = True) -> None:
        """Raises OutputError if `final` must not be written; writes nothing, so it also serves dry runs."""
        if is_locked(_lock_path(final)):
            raise locked_error(final)
        try:
            _check(final, resume, overwrite, resumable)
        except OSError as error:
            raise OutputError(
                f"Cannot write {error.filename or final}: {error_text(error)}.", hint="Choose another output with -o."
            ) from None

    def _begin(self, resume: bool) -> None:
        _check(self.final, resume, self.overwrite, self.resumable)
        self._finish_interrupted(resume)
        if self.complete:
            return
        _check(self.final, resume, self.overwrite, self.resumable)  # again, since the interrupted last step was completed
        if self.path.exists() and not resume:
            shutil.rmtree(self.path)
        self.path.mkdir(exist_ok=True)
        self._folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        for name, is_folder, is_special in walk_folder(self._folder):
            if is_special or not _is_own_file(name, is_folder):
                raise OutputError(
                    f"{self.path / name} was not written by hf-grow.",
                    hint="Remove everything that is yours, or start over with --overwrite.",
                )
        self._journal = Journal(self.path / JOURNAL, self.open(JOURNAL, os.O_RDWR | os.O_CREAT | os.O_APPEND))
        self._journal.load(self.fingerprint)
        self.done, self.sent, self.committed = self._journal.done, self._journal.sent, self._journal.committed

    def note(self, tensor: str, digest: str) -> None:
        """Records a tensor as written."""
        self._append({"tensor": tensor, "digest": digest})

    def note_sent(self, shard: Shard, sha256: str) -> None:
        """Records a shard as uploaded."""
        self._append({"sent": shard.file, "size": shard.size, "sha256": sha256})

    def note_committed(self, facts: dict[str, Any]) -> None:
        """Records the commit that published the output."""
        self._append({"committed": facts})

    def _append(self, entry: dict[str, Any]) -> None:
        assert self._journal is not None
        self._journal.append(entry)

    def open(self, name: str, flags: int = os.O_RDWR | os.O_CREAT) -> int:
        """Opens a file of the folder for writing; links and files with several names are refused. Raises OutputError, OSError."""
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
        raise OutputError(f"{self.path / name} was not written by hf-grow.", hint="Remove it, or start over with --overwrite.")

    def write_file(self, name: str, data: bytes) -> None:
        handle = self.open(name)
        with error_filename(self.path / name):
            try:
                os.ftruncate(handle, 0)  # not with O_TRUNC: a file with several names must keep its content
                while data:
                    data = data[os.write(handle, data) :]
            finally:
                os.close(handle)

    def write_json(self, name: str, data: Any) -> None:
        self.write_file(name, to_json(data).encode())

    def copy_companion(self, folder: Path, relative: Path) -> None:
        """Copies a companion file from another folder; its mode follows the umask."""
        if relative.parent.name:
            (self.path / relative).parent.mkdir(exist_ok=True)
        self.write_file(relative.as_posix(), companion_bytes(folder / relative))

    def remove_except(self, keep: set[str]) -> None:
        """Removes everything at the top level of the folder except the journal and `keep`."""
        for name in set(os.listdir(self._folder)) - keep - {JOURNAL}:
            with error_filename(self.path / name):
                if stat.S_ISDIR(os.stat(name, dir_fd=self._folder, follow_symlinks=False).st_mode):
                    shutil.rmtree(self.path / name)
                else:
                    os.unlink(name, dir_fd=self._folder)

    def finish(self, files: set[str]) -> None:
        """Removes everything except `files`, syncs the folder to disk, and gives it its name."""
        self.remove_except(files)
        sync_files(self._folder, self.path)
        sync(self.path)
        replaced = None
        aside = self.final.with_name(f"{self.final.name}.replaced-{os.getpid()}")
        if self.overwrite and self.final.exists():
            replaced = {"inode": _inode(self.final), "aside": aside.name}
        self._append({"finished": True, "replaced": replaced})
        assert self._journal is not None
        self._journal.sync()
        if not (replaced and exchange(self.path, self.final)):
            if replaced:
                os.rename(self.final, aside)
            os.rename(self.path, self.final)
        self._clean_up(replaced)

    def _finish_interrupted(self, resume: bool) -> None:
        """Completes the last step of an earlier run, if it was interrupted there."""
        entries, last = read_journal(self.final)
        if last is None:
            entries, last = read_journal(self.path)
            aside = replaced_folder(self.final, last)
            if last is None or aside is None or os.path.lexists(self.final):
                return  # interrupted earlier
            os.rename(self.path, self.final)
        self._clean_up(last["replaced"])
        self.complete = resume and entries[0].get("fingerprint") == self.fingerprint

    def _clean_up(self, replaced: Mapping[str, Any] | None) -> None:
        """After the new folder got its name: removes the replaced folder, then the journal."""
        sync(self.final.parent)
        for path in (self.path, replaced_folder(self.final, {"replaced": replaced})):
            if replaced and path is not None and os.path.lexists(path) and _inode(path) == replaced.get("inode"):
                shutil.rmtree(path)
        (self.final / JOURNAL).unlink()
        sync(self.final)

    def discard(self) -> None:
        """Removes the folder after everything was sent elsewhere; the journal goes last."""
        self.remove_except(set())
        shutil.rmtree(self.path)

    @property
    def resume_hint(self) -> str:
        """What the user can do after an error or an interruption."""
        if not self.resumable:
            return "Repeat the command with --overwrite."
        kept = f"What was written is kept in {self.path}; repeat" if os.path.lexists(self.path) else "Repeat"
        return f"{kept} the command with {'--overwrite --resume' if self.overwrite else '--resume'}."

    def __enter__(self) -> PartialFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Closes all files and releases the lock; never fails."""
        if self._journal is not None:
            self._journal.close()
        with suppress(OSError):
            os.close(self._folder)
        unlock(self._lock_path, self._lock)


def _lock_path(final: Path) -> Path:
    _check_name(final)
    return final.with_name(f".{final.name}.lock")


def _check_name(final: Path) -> None:
    if final.name in ("", "..") or "\0" in str(final):
        raise OutputError(f"{str(final)!r} is not a valid folder name.", hint="Choose another output with -o.")


def _check(final: Path, resume: bool, overwrite: bool, resumable: bool) -> None:
    partial = final.with_name(final.name + ".partial")
    for path in (final, partial):
        if os.path.lexists(path) and not stat.S_ISDIR(os.lstat(path).st_mode):
            raise OutputError(f"{path} exists and is not a folder.", hint="Choose another output with -o.")
    begun = os.path.lexists(partial)
    if final.is_dir() and any(final.iterdir()) and not overwrite:
        if read_journal(final)[1] is not None:
            if resume:
                return  # complete: only the cleanup of the interrupted run remains
            hint = "Repeat the command with --resume to finish it." if resumable else "Repeat the command with --overwrite."
            raise OutputError(f"{final} is complete, but its run was interrupted in the last step.", hint=hint)
        if begun and resumable:
            raise OutputError(
                f"{final} exists, and {partial} is left over from an interrupted run.",
                hint="Continue with --overwrite --resume, which replaces it once the new one is complete; or choose another output with -o.",
            )
        raise OutputError(f"{final} exists and is not empty.", hint="Choose another output with -o, or replace it with --overwrite.")
    if begun and not (resume or overwrite):
        replaced = replaced_folder(final, read_journal(partial)[1])
        moved = f" The folder it replaces is now {replaced}." if replaced and replaced.exists() else ""
        raise OutputError(
            f"{partial} is left over from an interrupted run.{moved}",
            hint=f"{'Continue with --resume, or start' if resumable else 'Start'} over with --overwrite.",
        )
    if not begun and not os.path.lexists(final):
        for name in os.listdir(final.parent) if final.parent.is_dir() else ():
            if moved_folder := replaced_folder(final, {"replaced": {"aside": name}}):
                hint = f"Move it back (mv {moved_folder} {final}), or remove it."
                raise OutputError(f"{moved_folder} was {final} before an interrupted run that was to replace it.", hint=hint)


def _is_own_file(name: str, is_folder: bool) -> bool:
    """Whether hf-grow writes a file of this name into a partial folder."""
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


def _inode(path: Path) -> list[int]:
    info = os.lstat(path)
    return [info.st_dev, info.st_ino]
