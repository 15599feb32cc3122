"""Documents, and the plain way to pack them, for the tests of training data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydoc_texts import pydoc_texts

from hf_grow.options import parse
from hf_grow.training.data import DataOptions, build

DOCS = tuple(
    text[start : start + 2500] for text in pydoc_texts(120_000) for start in range(0, len(text), 2500) if text[start : start + 2500].strip()
)
LENGTH = 48


def write_texts(folder: Path, docs: tuple[str, ...]) -> Path:
    folder.mkdir(parents=True)
    for number, doc in enumerate(docs):
        (folder / f"{number:03}.txt").write_text(doc, encoding="utf-8")
    return folder


def data_options(**data: Any) -> DataOptions:
    return parse(DataOptions, {"seq_length": LENGTH, "shuffle": False, **data}, where="test")


def rows(data: Any) -> list[list[int]]:
    return [row["input_ids"] for row in data]


def packed_reference(tokenizer: Any, docs: tuple[str, ...] = DOCS, *, length: int = LENGTH, head: tuple[int, ...] = ()) -> list[list[int]]:
    """The ids of all documents in one list, cut every `length` ids."""
    stream: list[int] = []
    for doc in docs:
        stream.extend(head)
        stream.extend(tokenizer.encode(doc, add_special_tokens=False))
        stream.append(tokenizer.eos_token_id)
    return [stream[start : start + length] for start in range(0, len(stream), length)]


def json_lines(docs: tuple[str, ...], **more: Any) -> str:
    return "".join(json.dumps({"content": doc, "n": 1, **more}) + "\n" for doc in docs)


def stream_of(tokenizer: Any, tmp_path: Path, **more: Any) -> Any:
    return build(data_options(streaming=True, **more), tokenizer, cache=tmp_path / "cache").train
