"""What decides which folder bears a name: one writer at a time, and one step in which a new folder takes the place of an old one."""

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

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of linux/fcntl.h and linux/fs.h
# A kernel, file system or sandbox without it. What really forbids a rename forbids the plain one too.
_UNKNOWN = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)


def lock(path: Path, what: Path) -> int:
    """The open lock file, held for `what`. The lock dies with its process, so that kill -9 leaves none behind. Raises OutputError, OSError."""
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
                raise locked_error(what) from None
            error.filename = str(path)
            raise
        os.close(handle)  # its last holder has just removed it: there is another by now, or will be


def locked_error(what: Path) -> OutputError:
    return OutputError(f"Another hf-grow is writing {what} right now.", hint="Wait for it, or choose another -o.")


def is_locked(path: Path) -> bool:
    """Whether somebody holds a lock file now; makes none."""
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
    """Removes the file while it is still held: whoever opened it meanwhile sees that it lost its name, and makes another."""
    with suppress(OSError):
        path.unlink()
    with suppress(OSError):
        os.close(handle)


def exchange(one: Path, other: Path) -> bool:
    """Two folders take each other's names in one step; False, and nothing done, where the system cannot do that. Raises OSError."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNKNOWN:
        return False
    raise OSError(code, os.strerror(code), str(one))


def sync(path: Path) -> None:
    """A folder's names are on the disk."""
    with error_filename(path):
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sync_files(folder: int, path: Path) -> None:
    """The content of every file below an open folder, which is at `path`, is on the disk; what is there already costs nothing."""
    for where, _, names, inside in os.fwalk(".", dir_fd=folder, onerror=_raise):
        for name in names:
            with error_filename(path / where / name):
                handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=inside)
                try:
                    os.fsync(handle)
                finally:
                    os.close(handle)


def walk_folder(folder: int) -> Iterator[tuple[str, bool, bool]]:
    """(relative path, whether it is a folder, whether it is odd) of all below an open folder; odd is what is neither a folder nor a regular
    file of one name: written through a link or a second name, a file elsewhere would change."""
    for where, folders, names, inside in os.fwalk(".", dir_fd=folder, onerror=_raise):
        for name in (*folders, *names):
            found = os.stat(name, dir_fd=inside, follow_symlinks=False)
            is_folder = stat.S_ISDIR(found.st_mode)
            yield os.path.normpath(os.path.join(where, name)), is_folder, not (is_folder or is_plain_file(found))


def is_plain_file(found: os.stat_result) -> bool:
    """Whether it is a regular file without a second name."""
    return stat.S_ISREG(found.st_mode) and found.st_nlink <= 1


@contextmanager
def error_filename(path: Path) -> Iterator[None]:
    """Errors of the system in calls on an open file get the file's name."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def _raise(error: OSError) -> None:
    raise error
