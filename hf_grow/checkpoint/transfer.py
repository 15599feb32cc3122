"""Copies, reads and hashes byte ranges of files.

Everything works in chunks, so memory stays small; the interpreter lock is released during I/O and hashing.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import xxhash

from hf_grow.common.safe_files import open_regular
from hf_grow.errors import ExecutionError

READ_SIZE = 1 << 18  # fits into the L2 cache; larger chunks were slower
COPY_SIZE = 1 << 25
_UNSUPPORTED = (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM)

Stop = Callable[[], None]
"""Called between chunks; raises to stop the work."""


def copy_range(source: int, target: int, start: int, at: int, length: int, stop: Stop) -> None:
    """Copies `length` bytes from offset `start` of one open file to offset `at` of another, in the kernel if possible."""
    for copy in (_by_copy_file_range, _by_sendfile, _by_read_write):
        done = 0
        try:
            while done < length:
                stop()
                moved = copy(source, target, start + done, at + done, min(COPY_SIZE, length - done))
                if moved == 0:
                    raise ExecutionError("The source ended early.", hint="It changed while being read; run again.")
                done += moved
            return
        except OSError as error:
            if error.errno not in _UNSUPPORTED or copy is _by_read_write:
                raise
        start, at, length = start + done, at + done, length - done


def _by_copy_file_range(source: int, target: int, start: int, at: int, length: int) -> int:
    if not hasattr(os, "copy_file_range"):
        raise OSError(errno.ENOSYS, "no copy_file_range")
    return os.copy_file_range(source, target, length, start, at)


def _by_sendfile(source: int, target: int, start: int, at: int, length: int) -> int:
    if os.uname().sysname != "Linux":
        raise OSError(errno.ENOSYS, "sendfile to files is Linux only")
    os.lseek(target, at, os.SEEK_SET)
    return os.sendfile(target, source, start, length)


def _by_read_write(source: int, target: int, start: int, at: int, length: int) -> int:
    data = os.pread(source, min(length, READ_SIZE), start)
    write_all(target, data, at)
    return len(data)


def write_all(target: int, data: Any, at: int) -> None:
    """Writes a buffer at offset `at` of an open file."""
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(target, view[: 1 << 26], at)
        view, at = view[written:], at + written


def read_chunks(handle: int, start: int, stop_at: int, stop: Stop) -> Iterator[memoryview]:
    """Yields bytes [start, stop_at) of an open file in chunks; all of them share one buffer."""
    buffer = memoryview(bytearray(READ_SIZE))
    while start < stop_at:
        stop()
        count = os.preadv(handle, [buffer[: min(READ_SIZE, stop_at - start)]], start)
        if count == 0:
            raise ExecutionError("A file ended early.", hint="It changed while being read; run again.")
        yield buffer[:count]
        start += count


def hash_range(handle: int, start: int, stop_at: int, stop: Stop, *others: Any) -> str:
    """XXH3-128 (not cryptographic) of bytes [start, stop_at), in hex; `others` are updated with the same bytes."""
    hasher = xxhash.xxh3_128()
    for chunk in read_chunks(handle, start, stop_at, stop):
        hasher.update(chunk)
        for other in others:
            other.update(chunk)
    return hasher.hexdigest()


def file_sha256(path: Path, progress: Callable[[int], None] = lambda nbytes: None) -> str:
    """SHA-256 of a file, in hex; `progress` is called with the number of bytes read. Raises SourceError."""
    sha = hashlib.sha256()
    with open_regular(path) as handle:
        for chunk in read_chunks(handle.fileno(), 0, os.fstat(handle.fileno()).st_size, lambda: None):
            sha.update(chunk)
            progress(len(chunk))
    return sha.hexdigest()
