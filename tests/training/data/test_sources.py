"""Local files of every format, Hub datasets, and what is refused."""

from __future__ import annotations

import bz2
import gzip
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hub_datasets import HubServer, client_environment
from packed_texts import DOCS, LENGTH, data_options, json_lines, packed_reference, rows, stream_of

from hf_grow.errors import InputError
from hf_grow.training.data import build


def as_parquet(path: Path, docs: tuple[str, ...]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"id": list(range(len(docs))), "body": list(docs)}), path, row_group_size=3)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "a.jsonl": lambda p: p.write_text(json_lines(DOCS)),
    "blank-lines.jsonl": lambda p: p.write_text(json_lines(DOCS).replace("\n", "\n\n")),
    "a.jsonl.gz": lambda p: p.write_bytes(gzip.compress(json_lines(DOCS).encode())),
    "a.ndjson.bz2": lambda p: p.write_bytes(bz2.compress(json_lines(DOCS).encode())),
    "a.json": lambda p: p.write_text(json.dumps([{"text": d, "url": "x"} for d in DOCS])),
    "strings.json": lambda p: p.write_text(json.dumps(list(DOCS))),
    "a.parquet": lambda p: as_parquet(p, DOCS),
    "with-nulls.jsonl": lambda p: p.write_text('{"content": null}\n' + json_lines(DOCS) + '{"content": "  "}\n'),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_file_format_gives_same_sequences(tokenizer, tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    data = build(data_options(train=str(tmp_path / name)), tokenizer, cache=tmp_path / "cache")
    assert rows(data.train) == packed_reference(tokenizer)[:-1]


def test_paths_folders_and_globs(tokenizer, folder: Path, tmp_path: Path) -> None:
    """Folders, globs at any depth, lists; a README beside data is no document, among documents it is."""
    deep = tmp_path / "deep"
    (deep / "inner").mkdir(parents=True)
    (deep / "README.md").write_text("# About\n")
    (deep / ".hidden.jsonl").write_text("broken")
    (deep / "dataset_info.json").write_text("{}")
    (deep / "a.jsonl").write_text(json_lines(DOCS[:3]))
    (deep / "inner" / "b.jsonl").write_text(json_lines(DOCS[3:]))
    wanted = packed_reference(tokenizer)[:-1]
    for path in (str(deep), f"{deep}/**/*.jsonl", [str(deep / "a.jsonl"), str(deep / "inner")], f"{folder}/*.txt"):
        assert rows(build(data_options(train={"path": path}), tokenizer, cache=tmp_path / "cache").train) == wanted, path
    (folder / "README.md").write_text("# About\n")
    with_readme = packed_reference(tokenizer, (*DOCS, "# About\n"))
    assert rows(build(data_options(train=str(folder), remainder="drop"), tokenizer, cache=tmp_path / "c").train) == [
        r for r in with_readme if len(r) == LENGTH
    ]


def test_limit_counts_documents_of_all_files(tokenizer, folder: Path, tmp_path: Path) -> None:
    data = build(data_options(train={"path": str(folder), "limit": 4}), tokenizer, cache=tmp_path / "cache")
    assert rows(data.train) == packed_reference(tokenizer, DOCS[:4])[:-1]
    assert data.describe()[0]["documents"] == 4


# ---- errors -------------------------------------------------------------------------------------------------------------------------------


def write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


BAD: dict[str, tuple[dict[str, str | bytes], dict[str, Any], str]] = {
    "missing file": ({}, {"path": "none.jsonl"}, "no file or folder"),
    "missing folder": ({}, {"path": "./none"}, "no file or folder"),
    "no match": ({}, {"path": "*.txt"}, "No file matches"),
    "empty file": ({"a.txt": ""}, {"path": "a.txt"}, "is empty"),
    "blank file": ({"a.txt": " \n\n"}, {"path": "a.txt"}, "is empty: it contains no text"),
    "empty jsonl": ({"a.jsonl": "\n"}, {"path": "a.jsonl"}, "is empty: it contains no text"),
    "empty folder": ({"d/.keep": "x"}, {"path": "d"}, "contains no text files"),
    "unknown format": ({"a.docx": "x"}, {"path": "a.docx"}, "unsupported format.*Supported: .txt"),
    "unknown format in a glob": ({"a.txt": "x", "b.bin": "x"}, {"path": "*"}, "b.bin, which has an unsupported format"),
    "two kinds": ({"d/a.txt": "x", "d/b.jsonl": "{}"}, {"path": "d"}, r"several formats \(1 text, 1 jsonl\)"),
    "unknown field": (
        {"a.jsonl": json_lines(DOCS[:1])},
        {"path": "a.jsonl", "text_field": "body"},
        "no field 'body'.*Its fields: content, n",
    ),
    "field of numbers": ({"a.jsonl": json_lines(DOCS[:1])}, {"path": "a.jsonl", "text_field": "n"}, "'n' does not hold text"),
    "unclear field": ({"a.jsonl": '{"q": "x", "a": "y"}'}, {"path": "a.jsonl"}, "not clear which field.*q, a.*text_field"),
    "chat": ({"a.jsonl": '{"messages": [{"role": "user"}]}'}, {"path": "a.jsonl"}, "no field that holds text.*messages"),
    "field later gone": ({"a.jsonl": '{"text": "x"}\n{"other": 1}\n'}, {"path": "a.jsonl"}, "line 2 has no field that holds text"),
    "field of plain text": ({"a.txt": "x"}, {"path": "a.txt", "text_field": "text"}, "plain text and has no field"),
    "not JSON": ({"a.jsonl": '{"text": "x"}\n{"text": \n'}, {"path": "a.jsonl"}, "line 2 is not valid JSON"),
    "deep JSON": ({"a.jsonl": "[" * 100_000}, {"path": "a.jsonl"}, "line 1 is not valid JSON"),
    "lines in .json": ({"a.json": json_lines(DOCS[:2])}, {"path": "a.json"}, "is not valid JSON.*named .jsonl"),
    "a number": ({"a.json": "[1]"}, {"path": "a.json"}, "entry 1 holds int"),
    "not UTF-8": ({"a.txt": b"caf\xe9"}, {"path": "a.txt"}, "not UTF-8"),
    "not gzip": ({"a.txt.gz": b"plain"}, {"path": "a.txt.gz"}, "Cannot read .*a.txt.gz"),
    "cut gzip": ({"a.txt.gz": gzip.compress(b"word " * 9999)[:40]}, {"path": "a.txt.gz"}, "Cannot read .*a.txt.gz"),
    "not Parquet": ({"a.parquet": b"PAR1 nothing"}, {"path": "a.parquet"}, "Cannot read the Parquet file"),
    "a split of files": ({"a.txt": "x"}, {"path": "a.txt", "split": "test"}, "local files have no split"),
    "a revision of files": ({"a.txt": "x"}, {"path": "a.txt", "revision": "v1"}, "`revision` applies to Hub datasets only"),
    "an address": ({}, {"path": "https://example.com/x"}, "no file or folder|is a URL"),
    "no id": ({}, {"path": "wikitext"}, "no file or folder.*OWNER/NAME"),
    "bad id": ({}, {"path": "a b/c d"}, "neither a folder nor a Hub id"),
    "Hub beside files": ({"a.txt": "x"}, {"path": ["a.txt", "owner/name"]}, "a source of its own"),
    "too little": ({"a.txt": "few words"}, {"path": "a.txt"}, f"fewer than one sequence of {LENGTH}"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_fails(tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    files, source, message = BAD[name]
    for path, content in files.items():
        write(tmp_path / path, content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        build(data_options(train=source), tokenizer, cache=tmp_path / ".cache")
    assert re.search(message, str(error.value), re.DOTALL), str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("name", "message"), [("blank file", "contains no text"), ("not JSON", "line 2 is not valid JSON"), ("not UTF-8", "not UTF-8")]
)
def test_bad_input_fails_when_streaming(tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    for path, content in BAD[name][0].items():
        write(tmp_path / path, content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        list(islice(stream_of(tokenizer, tmp_path, train=BAD[name][1]), 3))


# ---- the Hub ------------------------------------------------------------------------------------------------------------------------------


ASK = """
import json, sys
from hf_grow.errors import GrowError
from hf_grow.training.config.data_options import TextOptions
from hf_grow.training.data.sources import find_text
for line in sys.argv[1:]:
    asked = json.loads(line)
    streaming = asked.pop("streaming", False)
    messages = []
    try:
        source = find_text(TextOptions(**asked), notify=messages.append)
        print(json.dumps({"commit": source.identity["commit"], "texts": [d["text"] for d in source.documents(streaming=streaming)], "messages": messages}))
    except GrowError as error:
        print(json.dumps({"error": str(error), "status": error.exit_code}))
"""


def ask(hub: HubServer, home: Path, *asked: dict[str, Any], **more: str) -> list[dict[str, Any]]:
    """In a process of its own: the library reads its environment when it is imported."""
    environment = {**os.environ, **client_environment(hub, home), "HF_DATASETS_CACHE": str(home / "datasets"), **more}
    environment = {k: v for k, v in environment.items() if k not in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")}
    done = subprocess.run([sys.executable, "-c", ASK, *map(json.dumps, asked)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_hub_datasets(tmp_path: Path) -> None:
    docs = [f"document {n} of the set" for n in range(10)]
    write(tmp_path / "set" / "train.jsonl", "".join(json.dumps({"text": d, "n": 1}) + "\n" for d in [*docs, "", "  "]))
    write(tmp_path / "set" / "README.md", "# A set\n")
    write(tmp_path / "script" / "script.py", "x = 1\n")
    with HubServer() as hub:
        commit = hub.add("datasets/owner/set", tmp_path / "set")
        hub.add("datasets/owner/script", tmp_path / "script")
        hub.add("datasets/owner/gated", tmp_path / "set", gated=True)
        whole, streamed, first, *bad = ask(
            hub,
            tmp_path / "home",
            {"path": ["owner/set"]},
            {"path": ["owner/set"], "streaming": True},
            {"path": ["owner/set"], "limit": 3},
            {"path": ["owner/set"], "split": "test"},
            {"path": ["owner/set"], "text_field": "body"},
            {"path": ["owner/set"], "name": "other"},
            {"path": ["owner/set"], "revision": "v9"},
            {"path": ["owner/set"], "files": "*.parquet", "streaming": True},
            {"path": ["owner/script"]},
            {"path": ["owner/gated"]},
            {"path": ["owner/none"]},
        )
        assert whole == streamed == {"commit": commit, "texts": docs, "messages": []}
        assert first["texts"] == docs[:3]
        messages = ["no such split.*train", "no field 'body'.*text, n", "another `name`", "no revision 'v9'", "contains no such files",
                    "scripts are not run.*refs/convert/parquet", "gated or private.*hf auth login", "no repository datasets/owner/none"]  # fmt: skip
        for found, message in zip(bad, messages, strict=True):
            assert found["status"] == 2
            assert re.search(message, found["error"], re.DOTALL), found
        # Offline: what was downloaded is used, anything else is an error.
        offline = ask(hub, tmp_path / "home", {"path": ["owner/set"]}, {"path": ["owner/none"]}, HF_HUB_OFFLINE="1")
        assert (offline[0]["commit"], offline[0]["texts"]) == (commit, docs)
        assert "from the cache" in offline[0]["messages"][0]
        assert "not in the cache" in offline[1]["error"]
