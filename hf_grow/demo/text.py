"""Real text without the network: the documentation topics of `pydoc` and the sources of the standard library.

The order of documents and which of them are held out follow from a digest of their names, so they are the same on every machine with
this Python, and a document is never partly trained on and partly held out.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hf_grow.errors import InputError

_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__"}
"""Tests repeat themselves, encodings are tables, and pydoc_data is read as prose instead."""

_HELD_OUT = 16  # one document in sixteen
_LONGEST = 60_000  # characters of one document: no single file may fill the held-out text


@dataclass(frozen=True)
class Corpus:
    train: tuple[str, ...]
    heldout: tuple[str, ...]

    @property
    def digest(self) -> str:
        state = hashlib.sha256()
        for part in (self.train, self.heldout):
            for document in (str(len(part)), *part):
                state.update(len(document).to_bytes(8, "big"))  # so that moved borders change the digest
                state.update(document.encode())
        return state.hexdigest()

    @property
    def characters(self) -> int:
        return sum(map(len, self.train)) + sum(map(len, self.heldout))


def corpus(characters: int) -> Corpus:
    """At least this many characters, prose and sources mixed. Raises InputError where this Python came without either."""
    documents = sorted([*_topics(), *_sources()], key=lambda document: _key(document[0]))
    train: list[str] = []
    heldout: list[str] = []
    taken = 0
    for name, text in documents:
        if taken >= characters:
            break
        (heldout if _key(name)[-1] % _HELD_OUT == 0 else train).append(text)
        taken += len(text)
    if taken < characters or not heldout:
        raise InputError(
            f"This Python came with {taken:,} characters of documentation and sources; the demo trains on {characters:,}.",
            hint="Use a Python whose standard library lies on disk as .py files.",
        )
    return Corpus(tuple(train), tuple(heldout))


def _key(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def _topics() -> Iterator[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it apart; the sources are enough
        return
    for name in sorted(topics):
        yield f"topic {name}", topics[name].strip()[:_LONGEST]


def _sources() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if _SKIPPED.isdisjoint(inside.parts):
            try:
                text = path.read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError):
                continue
            if text:
                yield inside.as_posix(), text[:_LONGEST]
