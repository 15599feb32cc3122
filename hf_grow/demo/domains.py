"""Two domains of text that come with every Python: documentation prose (old) and source code (new).

Prose is the topics of pydoc and the docstrings of the standard library without their examples; code is the standard library without its
docstrings. No text is in both, and no paragraph of prose occurs twice. A document is a topic or a module; whether it is held out follows from
a digest of its name, so the split is the same on every machine with this Python.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hf_grow.errors import InputError

SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__"}
HELD_OUT = 12  # one document in twelve
MAX_CHARACTERS = 40_000  # of one document
MIN_CHARACTERS = 200
FILES = ("old", "old-heldout", "new", "new-heldout")


@dataclass(frozen=True)
class Domains:
    """Documents by file name (FILES), and a digest of them all."""

    documents: dict[str, list[str]]
    digest: str

    def write(self, folder: Path) -> None:
        """One JSON Lines file for each of FILES, as `hf-grow train` reads them."""
        for name, texts in self.documents.items():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")

    def for_tokenizer(self) -> list[str]:
        """The old documents and about as many characters of new ones: the tokenizers of downloaded models were trained on both domains too."""
        old, new = self.documents["old"], self.documents["new"]
        return [*old, *new[: len(new) * sum(map(len, old)) // sum(map(len, new))]]


def domains(max_documents: int | None = None) -> Domains:
    """All documents, or the first ``max_documents`` of each file, in an order that does not depend on the machine.

    Raises InputError where Python came without them.
    """
    documents: dict[str, list[str]] = {name: [] for name in FILES}
    seen: set[str] = set()
    for name, prose, code in _sources():
        held_out = "-heldout" if hashlib.sha256(name.encode()).digest()[-1] % HELD_OUT == 0 else ""
        unique = [p for p in dict.fromkeys(prose) if p not in seen]
        seen.update(unique)
        for domain, text in (("old", "\n\n".join(unique)), ("new", code)):
            if len(text) > MIN_CHARACTERS:
                documents[domain + held_out].append(text[:MAX_CHARACTERS])
    if not all(documents.values()):
        raise InputError(
            "The standard library of this Python holds too little text.",
            hint="Use a Python whose standard library lies on disk as .py files.",
        )
    for name, texts in documents.items():
        documents[name] = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())[:max_documents]
    return Domains(documents, hashlib.sha256(json.dumps(documents, sort_keys=True).encode()).hexdigest())


def _sources() -> Iterator[tuple[str, list[str], str]]:
    """(name, paragraphs of prose, code) of every topic and module."""
    with suppress(ImportError):  # some distributions package it separately; the docstrings are enough
        from pydoc_data.topics import topics

        for name in sorted(topics):
            yield f"topic {name}", paragraphs(topics[name]), ""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not SKIPPED.isdisjoint(relative.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
            with warnings.catch_warnings(action="ignore"):
                tree = ast.parse(text)
        except (OSError, UnicodeDecodeError, SyntaxError):
            continue
        docstrings, code = split(text, tree)
        yield relative.as_posix(), [p for s in docstrings for p in paragraphs(s)], code


def split(text: str, tree: ast.Module) -> tuple[list[str], str]:
    """The docstrings of a module, and its lines without them."""
    docstrings: list[str] = []
    removed: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring is not None:
                expr = node.body[0]
                removed.update(range(expr.lineno - 1, expr.end_lineno or expr.lineno))
                docstrings.append(docstring)
    kept = [line.rstrip() for i, line in enumerate(text.splitlines()) if i not in removed]
    return docstrings, re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()


def paragraphs(text: str) -> list[str]:
    """The paragraphs of sentences, each on one line; examples, grammar, tables and signatures are left out."""
    kept = []
    for part in re.split(r"\n\s*\n", textwrap.dedent(text)):
        if ">>>" in part or "::=" in part or "\n    " in "\n" + part:
            continue
        line = " ".join(part.split())
        letters = sum(c.isalpha() or c == " " for c in line)
        if len(line.split()) >= 8 and letters >= 0.88 * len(line) and re.search(r"[.:?!)]$", line):
            kept.append(line)
    return kept
