"""The two domains of `forgetting.py`, from what comes with every Python: documentation prose (old) and source code (new).

Prose is the documentation topics of pydoc and the docstrings of the standard library, without their examples; code is the sources of the
standard library without docstrings. So no text is in both. A document is one topic, or one module; which are held out follows from a digest
of their names.
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
from dataclasses import dataclass
from pathlib import Path

SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__"}
HELD_OUT = 12  # one document in twelve
LONGEST = 40_000  # characters of one document
FILES = ("old", "old-heldout", "new", "new-heldout")


@dataclass(frozen=True)
class Domains:
    """Documents by file name; `digest` tells whether they are the same on another machine."""

    documents: dict[str, list[str]]
    digest: str


def domains() -> Domains:
    found: dict[str, list[str]] = {name: [] for name in FILES}
    seen: set[str] = set()
    for name, prose, code in _all():
        key = hashlib.sha256(name.encode()).digest()
        apart = "-heldout" if key[-1] % HELD_OUT == 0 else ""
        kept = [p for p in prose if not (p in seen or seen.add(p))]  # type: ignore[func-returns-value]  # no paragraph twice, in neither part
        for domain, text in (("old", "\n\n".join(kept)), ("new", code)):
            if len(text) > 200:
                found[domain + apart].append(text[:LONGEST])
    for texts in found.values():
        texts.sort(key=lambda text: hashlib.sha256(text.encode()).digest())
    return Domains(found, hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest())


def write(folder: Path, found: Domains) -> None:
    """FILE.jsonl for each of FILES, as `hf-grow train` reads them."""
    for name, texts in found.documents.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")


def _all() -> Iterator[tuple[str, list[str], str]]:
    """(name, paragraphs of prose, code) of every topic and module."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"topic {name}", prose_of(topics[name]), ""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if SKIPPED.isdisjoint(inside.parts):
            try:
                text = path.read_text(encoding="utf-8")
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    tree = ast.parse(text)
            except (OSError, UnicodeDecodeError, SyntaxError):
                continue
            strings, code = split(text, tree)
            yield inside.as_posix(), [p for s in strings for p in prose_of(s)], code


def split(text: str, tree: ast.Module) -> tuple[list[str], str]:
    """The docstrings of a module, and its lines without them."""
    lines, strings = text.splitlines(), []
    dropped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found = ast.get_docstring(node)
            if found is not None:
                place = node.body[0]
                dropped.update(range(place.lineno - 1, place.end_lineno or place.lineno))
                strings.append(found)
    kept = [line.rstrip() for i, line in enumerate(lines) if i not in dropped]
    return strings, re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()


def prose_of(text: str) -> list[str]:
    """The paragraphs that are sentences: no examples, grammar, tables or signatures. Lines are joined: where they break means nothing."""
    found = []
    for part in re.split(r"\n\s*\n", textwrap.dedent(text)):
        if ">>>" in part or "::=" in part or "\n    " in "\n" + part:
            continue
        line = " ".join(part.split())
        letters = sum(c.isalpha() or c == " " for c in line)
        if len(line.split()) >= 8 and letters >= 0.88 * len(line) and re.search(r"[.:?!)]$", line):
            found.append(line)
    return found
