"""What the readers of local files guarantee: texts as they are stored, files as they are named, nothing asked of the network."""

from __future__ import annotations

import gzip
import json
import lzma
import socket
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from hf_grow.errors import InputError
from hf_grow.training.config.data_options import TextOptions
from hf_grow.training.data.readers import read_documents
from hf_grow.training.data.sources import find_text

TEXTS = [
    "2024-01-02", "2024-01-02T03:04:05", "12", "1.50", "1e5", "true", "null", '{"a": 1}', '["a"]', '"quoted"', "  two  spaces  ", "tab\tand\nlines\n",
    "line\u2028separator", "form\x0cfeed", "\U0001f600", "ﬁ combining e\u0301",
]  # fmt: skip
"""Strings that a reader which guesses types, or splits lines otherwise, would change."""


def read(path: Path | str, **more: Any) -> list[str]:
    return [row["text"] for row in find_text(TextOptions(path=[str(path)], **more)).documents()]


def write_jsonl(path: Path, texts: list[str], **more: Any) -> Path:
    path.write_text("".join(json.dumps({"text": t, **more}, ensure_ascii=False) + "\n" for t in texts), encoding="utf-8")
    return path


def write_parquet(path: Path, texts: list[str]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": texts}), path)
    return path


def test_texts_are_read_unchanged(tmp_path: Path) -> None:
    whole = tmp_path / "a.json"
    whole.write_text(json.dumps([{"text": t} for t in TEXTS]))
    strings = tmp_path / "b.json"
    strings.write_text(json.dumps(TEXTS))
    marked = tmp_path / "c.jsonl"
    marked.write_bytes(b"\xef\xbb\xbf" + write_jsonl(tmp_path / "d.jsonl", TEXTS, date="2024-01-02").read_bytes())
    packed = tmp_path / "e.jsonl.xz"
    packed.write_bytes(lzma.compress(marked.read_bytes()))
    for path in (whole, strings, marked, packed, tmp_path / "d.jsonl", write_parquet(tmp_path / "f.parquet", TEXTS)):
        assert read(path) == TEXTS, path.name


def test_types_of_other_columns_may_vary(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "meta": 1}\n{"text": "b", "meta": {"x": []}}\n{"text": "c"}\n{"meta": "y", "text": "d"}\n')
    assert read(path) == list("abcd")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"other": 1}', "line 3 has no field"),
        ('{"text": 5}', "line 3.*does not hold text"),
        ('{"text": {"a": 1}}', "line 3.*does not hold text"),
        ("3", "line 3 holds int"),
        ('{"text": "a"', "line 3 is not valid JSON"),
    ],
)
def test_bad_line_error_names_the_line(tmp_path: Path, line: str, message: str) -> None:
    for name in ("a.jsonl", "b.jsonl.gz"):
        content = f'{{"text": "one"}}\n\n{line}\n{{"text": "two"}}\n'.encode()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        with pytest.raises(InputError, match=f"{name}, {message}"):
            read(tmp_path / name, text_field="text")


@pytest.mark.parametrize(
    "name", ["x[1].jsonl", "x*.jsonl", "x?.jsonl", "a::b.jsonl", "a#%20 b.jsonl", "https:b.jsonl", "é-00000-of-00002.jsonl"]
)
def test_existing_file_with_glob_characters_is_read(tmp_path: Path, name: str) -> None:
    """Brackets and stars are part of its name, not a glob; `::` does not chain file systems."""
    write_jsonl(tmp_path / "x1.jsonl", ["another file"])
    assert read(write_jsonl(tmp_path / name, ["this one"])) == ["this one"]


def test_empty_files_and_limit(tmp_path: Path) -> None:
    for name, content in (("a.txt", ""), ("b.txt", "one"), ("c.txt", " \n"), ("d.txt", "two"), ("e.txt", "three")):
        (tmp_path / name).write_text(content)
    assert read(tmp_path) == ["one", "two", "three"]
    assert read(tmp_path, limit=2) == ["one", "two"]


def test_text_file_is_one_document_with_normalised_newlines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\n\r\ntwo\rthree\u2028four\n".encode())
    assert read(tmp_path / "a.txt") == ["one\n\ntwo\nthree\u2028four\n"]


@pytest.mark.parametrize("name", ["a.pkl", "a.arrow", "a.csv", "a.jsonl.zst", "a.tar.gz", "a.parquet.gz"])
def test_unsupported_formats_fail(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InputError, match=r"(?s)unsupported format.*Supported: .txt"):
        read(tmp_path / name)


def test_local_files_need_no_network_or_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config

    def refuse(*arguments: Any, **named: Any) -> None:
        pytest.fail(f"asked the network: {arguments}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub-cache")
    for path in (write_jsonl(tmp_path / "a.jsonl", ["text"]), write_parquet(tmp_path / "b.parquet", ["text"])):
        assert read(path) == ["text"]
    left = [p for p in (tmp_path / "hub-cache").rglob("*") if p.is_file() and p.stat().st_size]
    assert not left, "a second copy of the text"


def test_reading_keeps_one_document_in_memory(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["word " * 2000] * 400)
    assert path.stat().st_size > 4_000_000
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_documents([str(path)], None, None)) == 400
        assert tracemalloc.get_traced_memory()[1] < 500_000
    finally:
        tracemalloc.stop()
