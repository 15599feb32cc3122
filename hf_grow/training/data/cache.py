"""Cached folders that are created once, by whichever process comes first.

A folder appears by an atomic rename, so an interrupted process leaves nothing that looks complete. A file lock, which the operating system
releases when its process dies, makes the other processes of a distributed training wait.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_grow.errors import OutputError

CACHE_HINT = "Free some disk space, or choose another folder (data.cache)."


def default_root() -> Path:
    """The cache folder of hf-grow: in HF_HOME if that is set, else in XDG_CACHE_HOME (~/.cache)."""
    if home := os.environ.get("HF_HOME"):
        return Path(home).expanduser() / "hf-grow"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hf-grow"


def key(parts: Any) -> str:
    """A folder name: the first 32 hex digits of the SHA-256 of `parts` (JSON data)."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def get_or_create(folder: Path, create: Callable[[Path], None]) -> bool:
    """Returns whether `folder` existed; if not, `create` fills an empty folder that becomes it. Raises OutputError if it cannot be written."""
    if folder.is_dir():
        return True
    with locked(folder):
        if folder.is_dir():
            return True
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
        try:
            partial.mkdir()
            create(partial)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return False


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds an inter-process lock on `folder`, whose parent is created. Raises OutputError if it cannot be written."""
    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(folder.name + ".lock")):
            yield
    except OSError as error:
        raise OutputError(
            f"The cache {folder.parent} cannot be written: {error.strerror or error}.",
            hint=CACHE_HINT,
        ) from None
