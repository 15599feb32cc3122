"""The journal of a partial output folder: JSON lines that record what was written, so that an interrupted run can be resumed."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from hf_grow.checkpoint.folder_exchange import error_filename
from hf_grow.common.safe_files import read_bytes, to_json
from hf_grow.errors import OutputError, SourceError

JOURNAL = ".hf-grow-journal.jsonl"


class Journal:
    """An open journal. Threads may share it."""

    def __init__(self, path: Path, handle: int) -> None:
        self.path = path
        self.done: dict[str, str] = {}
        """Tensors written by an interrupted run -> digest of their bytes."""
        self.sent: dict[str, tuple[int, str]] = {}
        """Shards that an interrupted run uploaded -> size in bytes and SHA-256."""
        self.committed: dict[str, Any] = {}
        """What an interrupted run recorded about the commit that published them."""
        self._handle = handle
        self._lock = threading.Lock()

    def load(self, fingerprint: str) -> None:
        """Reads the entries of an interrupted run, or begins the journal. Raises OutputError if it belongs to another plan."""
        text = read_bytes(self.path, error=OutputError)
        if text and not text.endswith(b"\n"):
            self._write(b"\n")  # terminate a torn line, so that the next entry can be parsed
        entries = _parse(text)
        if not entries:
            self.append({"fingerprint": fingerprint})
            return
        if entries[0].get("fingerprint") != fingerprint:
            raise OutputError(
                f"{self.path.parent} belongs to a different plan (source, options, shard size or version).",
                hint="Repeat the command that started it, or start over with --overwrite.",
            )
        for e in entries[1:]:
            if isinstance(e.get("tensor"), str) and isinstance(e.get("digest"), str):
                self.done[e["tensor"]] = e["digest"]
            elif isinstance(e.get("sent"), str) and isinstance(e.get("size"), int) and re.fullmatch(r"[0-9a-f]{64}", str(e.get("sha256"))):
                self.sent[e["sent"]] = e["size"], e["sha256"]
            elif isinstance(e.get("committed"), dict):
                self.committed = e["committed"]
        if "finished" in entries[-1]:
            self.append({"resumed": True})  # files written from here on may be incomplete

    def append(self, entry: Mapping[str, Any]) -> None:
        self._write(to_json(entry, indent=None).encode())

    def _write(self, data: bytes) -> None:
        with self._lock, error_filename(self.path):
            while data:
                data = data[os.write(self._handle, data) :]

    def sync(self) -> None:
        with error_filename(self.path):
            os.fsync(self._handle)

    def close(self) -> None:
        with suppress(OSError):
            os.close(self._handle)


def read_journal(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """The entries of a folder's journal, and the entry that marks it as finished, if that is the last one."""
    try:
        entries = _parse(read_bytes(folder / JOURNAL))
    except SourceError:
        return [], None
    last = entries[-1] if entries else {}
    return entries, last if last.get("finished") is True and isinstance(last.get("replaced"), dict | None) else None


def replaced_folder(final: Path, entry: Mapping[str, Any] | None) -> Path | None:
    """Where the replaced folder was moved, if two renames were needed; other paths in a journal are ignored."""
    name = str(((entry or {}).get("replaced") or {}).get("aside"))
    return final.with_name(name) if re.fullmatch(re.escape(final.name) + r"\.replaced-\d+", name) else None


def _parse(text: bytes) -> list[dict[str, Any]]:
    """Invalid lines are skipped: kill -9 may tear one, and its tensor is simply written again."""
    entries = []
    for line in text.split(b"\n"):
        with suppress(ValueError, RecursionError):
            entries.append(json.loads(line))
    return [e for e in entries if isinstance(e, dict)]
