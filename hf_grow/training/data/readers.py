"""Documents out of files: text, JSON and Parquet, one at a time, with an error that names the file and the line."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from hf_grow.errors import InputError
from hf_grow.training.data.replay_files import RECORD, TEXTS

FORMATS = {
    **dict.fromkeys((".txt", ".md", ".rst", ".py"), "text"),
    **dict.fromkeys((".jsonl", ".ndjson"), "jsonl"),
    ".json": "json",
    ".parquet": "parquet",
}
_OPENERS: Mapping[str, Callable[..., IO[Any]]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}

USUAL_FIELDS = ("text", "content")
FRAMES = ("document", "cut", "verbatim")


def format_of(path: Path) -> str | None:
    """'text', 'jsonl', 'json', 'parquet', or None for a file of another kind. Compression (.gz, .bz2, .xz) is looked through."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in _OPENERS:
        suffixes.pop()
        if suffixes and suffixes[-1] == ".parquet":  # has its own compression inside
            return None
    return FORMATS.get(suffixes[-1]) if suffixes else None


def read_documents(files: Sequence[str], text_field: str | None, limit: int | None) -> Iterator[dict[str, str]]:
    """{"text": document, "frame": one of FRAMES} for each document that is not blank, file after file; after `limit` of them no more.

    A text file is one document. Only sampled texts have another frame than document. Raises InputError that names the file, and the line where there is one.
    """
    left = limit
    for file in files:
        path = Path(file)
        sampled = path.name == TEXTS and path.with_name(RECORD).is_file()
        found = _sampled(path) if sampled else ((text, FRAMES[0]) for text in _READERS[format_of(path) or "text"](path, text_field))
        for text, frame in found:
            if left is not None and left <= 0:
                return
            if text and not text.isspace():
                yield {"text": text, "frame": frame}
                left = None if left is None else left - 1


def choose_field(where: str, columns: Mapping[str, bool], wanted: str | None) -> str:
    """The column that holds the text; `columns` says for each whether it holds strings. Raises InputError that lists them."""
    known = ", ".join(columns) or "none"
    if wanted is not None:
        if wanted not in columns:
            raise InputError(f"{where} has no field {wanted!r}.", hint=f"Its fields: {known}.")
        if not columns[wanted]:
            raise InputError(f"{where}: the field {wanted!r} does not hold text.", hint=f"Its fields: {known}. Name one with text_field.")
        return wanted
    strings = [name for name, is_text in columns.items() if is_text]
    for usual in USUAL_FIELDS:
        if usual in strings:
            return usual
    if len(strings) == 1:
        return strings[0]
    raise InputError(
        f"{where}: it is not clear which field holds the text." if strings else f"{where} has no field that holds text.",
        hint=f"Its fields: {known}." + (" Name one with text_field." if strings else ""),
    )


def _open(path: Path) -> IO[Any]:
    handle: IO[Any] = _OPENERS.get(path.suffix.lower(), open)(path, "rt", encoding="utf-8-sig", newline=None)
    return handle


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        with _open(path) as handle:
            for number, line in enumerate(handle, 1):
                yield number, line
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text (near line {number + 1}).", hint="Convert it first: iconv -t UTF-8.") from None
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise InputError(f"Cannot read {path}: {getattr(error, 'strerror', None) or error}.") from None


def _text(path: Path, text_field: str | None) -> Iterator[str]:
    if text_field is not None:
        raise InputError(f"{path} is plain text and has no field {text_field!r}.", hint="Leave text_field out.")
    yield "".join(line for _, line in _lines(path))


def _record_text(where: str, record: Any, text_field: str | None) -> str:
    if isinstance(record, str):
        return record
    if not isinstance(record, dict):
        raise InputError(f"{where} holds {type(record).__name__}, not an object with a text field.")
    field = choose_field(where, {k: isinstance(v, str) or v is None for k, v in record.items()}, text_field)
    return record[field] or ""


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in _lines(path):
        if not line.isspace():
            where = f"{path}, line {number}"
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError):
                raise InputError(f"{where} is not JSON.", hint="A .jsonl file holds one JSON object a line.") from None


def _jsonl(path: Path, text_field: str | None) -> Iterator[str]:
    for where, record in _records(path):
        yield _record_text(where, record, text_field)


def _sampled(path: Path) -> Iterator[tuple[str, str]]:
    for where, record in _records(path):
        text, frame = (record.get("text"), record.get("frame")) if isinstance(record, dict) else (None, None)
        if not isinstance(text, str) or frame not in FRAMES:
            raise InputError(f"{where} is no sampled text.", hint="Sample again: hf-grow replay MODEL -o DIR --overwrite.")
        yield text, frame


def _json(path: Path, text_field: str | None) -> Iterator[str]:
    try:
        data = json.loads("".join(line for _, line in _lines(path)) or "[]")
    except (ValueError, RecursionError):
        raise InputError(f"{path} is not JSON.", hint="One object a line belongs into a file named .jsonl.") from None
    for number, record in enumerate(data if isinstance(data, list) else [data], 1):
        yield _record_text(f"{path}, entry {number}", record, text_field)


def _parquet(path: Path, text_field: str | None) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:  # memory_map would keep a replaced file alive
            columns = {f.name: pa.types.is_string(f.type) or pa.types.is_large_string(f.type) for f in file.schema_arrow}
            field = choose_field(str(path), columns, text_field)
            for batch in file.iter_batches(batch_size=256, columns=[field]):
                yield from (text or "" for text in batch.column(0).to_pylist())
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} is no readable Parquet file: {str(error).splitlines()[0]}") from None


_READERS: Mapping[str, Callable[[Path, str | None], Iterator[str]]] = {
    "text": _text, "jsonl": _jsonl, "json": _json, "parquet": _parquet,
}  # fmt: skip
