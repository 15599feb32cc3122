"""Folders that are made once and then found again, by whichever process comes first.

A folder appears by one rename, so an interrupted maker leaves nothing that looks whole; a lock that dies with its process lets the other
processes of a distributed training wait for the one that makes it.
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


def default_root() -> Path:
    """Where caches belong: beside the Hub's if HF_HOME moves that, else where XDG says."""
    if home := os.environ.get("HF_HOME"):
        return Path(home).expanduser() / "hf-grow"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hf-grow"


def key(parts: Any) -> str:
    """A name for what follows from `parts` (JSON data)."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def fetch(folder: Path, make: Callable[[Path], None]) -> bool:
    """Sees to it that `folder` is there; `make` fills a new one where it is not. Returns whether it was there. Raises OutputError."""
    if folder.is_dir():
        return True
    with locked(folder):
        if folder.is_dir():
            return True
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        try:
            partial.mkdir()
            make(partial)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return False


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time works on `folder`, whose parent is made. Raises OutputError where the disk refuses."""
    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(folder.name + ".lock")):
            yield
    except OSError as error:
        raise OutputError(
            f"The cache {folder.parent} cannot be written: {error.strerror or error}.",
            hint="Make room there, or choose another folder (cache).",
        ) from None
