"""Locks a folder against other writers, exchanges two folders atomically, and syncs folders to disk."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hf_grow.errors import OutputError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # from linux/fcntl.h and linux/fs.h
# Errors of kernels, file systems and sandboxes without renameat2; a real permission error also occurs in the plain rename.
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)


def lock(path: Path, output: Path) -> int:
    """Opens and locks the lock file of `output`; the lock ends with its process, even after kill -9. Raises OutputError, OSError."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.lexists(path) and os.path.samestat(os.fstat(handle), os.lstat(path)):
                return handle
        except FileNotFoundError:
            pass
        except OSError as error:
            os.close(handle)
            if isinstance(error, BlockingIOError):
                raise locked_error(output) from None
            error.filename = str(path)
            raise
        os.close(handle)  # its last holder has just removed it: try again with a new one


def locked_error(output: Path) -> OutputError:
    return OutputError(f"Another hf-grow process is writing {output}.", hint="Wait for it, or choose another output with -o.")


def is_locked(path: Path) -> bool:
    """Whether another process holds the lock file; does not create one."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except OSError as error:
        return isinstance(error, BlockingIOError)
    finally:
        os.close(handle)


def unlock(path: Path, handle: int) -> None:
    """Removes the lock file while it is held, so that a process that opened it meanwhile notices and creates a new one."""
    with suppress(OSError):
        path.unlink()
    with suppress(OSError):
        os.close(handle)


def exchange(one: Path, other: Path) -> bool:
    """Swaps the names of two folders atomically. Returns False, without a change, if the system does not support it. Raises OSError."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(one))


def sync(path: Path) -> None:
    """Syncs a folder's entries to disk."""
    with error_filename(path):
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sync_files(folder: int, path: Path) -> None:
    """Syncs the content of every file below an open folder (located at `path`) to disk."""
    for where, _, names, parent in os.fwalk(".", dir_fd=folder, onerror=_raise):
        for name in names:
            with error_filename(path / where / name):
                handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=parent)
                try:
                    os.fsync(handle)
                finally:
                    os.close(handle)


def walk_folder(folder: int) -> Iterator[tuple[str, bool, bool]]:
    """Yields (relative path, is a folder, is special) of everything below an open folder.

    Special are links, devices and files with several names: writing to them would change a file elsewhere.
    """
    for where, folders, names, parent in os.fwalk(".", dir_fd=folder, onerror=_raise):
        for name in (*folders, *names):
            info = os.stat(name, dir_fd=parent, follow_symlinks=False)
            is_folder = stat.S_ISDIR(info.st_mode)
            yield os.path.normpath(os.path.join(where, name)), is_folder, not (is_folder or is_plain_file(info))


def is_plain_file(info: os.stat_result) -> bool:
    """Whether it is a regular file with a single name."""
    return stat.S_ISREG(info.st_mode) and info.st_nlink <= 1


@contextmanager
def error_filename(path: Path) -> Iterator[None]:
    """Adds the file name to an OSError, which calls on an open file do not report."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def _raise(error: OSError) -> None:
    raise error
