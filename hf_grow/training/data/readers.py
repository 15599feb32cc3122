"""Reads documents from local text, JSON, JSON Lines and Parquet files.

Texts must arrive exactly as they are stored, and an error must name file and line. The builders of `datasets` do neither: see docs/LOG.md.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any

from hf_grow.errors import InputError
from hf_grow.training.data.replay_files import is_texts_file, parse_sampled_text

FORMATS = {
    **dict.fromkeys((".txt", ".md", ".rst", ".py"), "text"),
    **dict.fromkeys((".jsonl", ".ndjson"), "jsonl"),
    ".json": "json",
    ".parquet": "parquet",
}
DEFAULT_TEXT_FIELDS = ("text", "content")
_OPENERS: Mapping[str, Callable[..., IO[Any]]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


def format_of(path: Path) -> str | None:
    """'text', 'jsonl', 'json' or 'parquet' by the file's suffix (before .gz, .bz2 or .xz); None for other files."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in _OPENERS:
        suffixes.pop()
        if suffixes and suffixes[-1] == ".parquet":  # Parquet compresses its own columns
            return None
    return FORMATS.get(suffixes[-1]) if suffixes else None


def read_documents(files: Sequence[str], text_field: str | None, limit: int | None) -> Iterator[dict[str, str]]:
    """Yields {"text": str, "frame": str} for every non-blank document, file by file, at most `limit` of them.

    ``frame``: one of replay_files.FRAMES; "document" for everything but sampled texts. A text file is one document.
    ``text_field``: see `choose_field`. Raises InputError that names the file, and the line if there is one.
    """
    documents = (document for file in files for document in _read(Path(file), text_field))
    yield from islice((d for d in documents if d["text"] and not d["text"].isspace()), limit)


def choose_field(where: str, columns: Mapping[str, bool], text_field: str | None) -> str:
    """The column to read: `text_field`, else `text`, else `content`, else the only column of strings.

    ``columns``: column name -> whether it holds strings. Raises InputError that lists the columns; ``where`` starts its message.
    """
    names = ", ".join(columns) or "none"
    if text_field is not None:
        if text_field not in columns:
            raise InputError(f"{where} has no field {text_field!r}.", hint=f"Its fields: {names}.")
        if not columns[text_field]:
            raise InputError(f"{where}: the field {text_field!r} does not hold text.", hint=f"Its fields: {names}. Set text_field.")
        return text_field
    strings = [name for name, is_text in columns.items() if is_text]
    for default in DEFAULT_TEXT_FIELDS:
        if default in strings:
            return default
    if len(strings) == 1:
        return strings[0]
    if strings:
        raise InputError(f"{where}: it is not clear which field holds the text.", hint=f"Its fields: {names}. Set text_field.")
    raise InputError(f"{where} has no field that holds text.", hint=f"Its fields: {names}.")


def _read(path: Path, text_field: str | None) -> Iterator[dict[str, str]]:
    if is_texts_file(path):
        yield from (parse_sampled_text(where, record) for where, record in _json_lines(path))
    else:
        yield from ({"text": text, "frame": "document"} for text in _READERS[format_of(path) or "text"](path, text_field))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        with _OPENERS.get(path.suffix.lower(), open)(path, "rt", encoding="utf-8-sig", newline=None) as file:
            for number, line in enumerate(file, 1):
                yield number, line
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text (near line {number + 1}).", hint="Convert it: iconv -t UTF-8.") from None
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise InputError(f"Cannot read {path}: {getattr(error, 'strerror', None) or error}.") from None


def _text(path: Path, text_field: str | None) -> Iterator[str]:
    if text_field is not None:
        raise InputError(f"{path} is plain text and has no field {text_field!r}.", hint="Omit text_field.")
    yield "".join(line for _, line in _lines(path))


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in _lines(path):
        if not line.isspace():
            where = f"{path}, line {number}"
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError):
                raise InputError(f"{where} is not valid JSON.", hint="A .jsonl file holds one JSON object per line.") from None


def _jsonl(path: Path, text_field: str | None) -> Iterator[str]:
    yield from (_text_of(where, record, text_field) for where, record in _json_lines(path))


def _json(path: Path, text_field: str | None) -> Iterator[str]:
    try:
        data = json.loads("".join(line for _, line in _lines(path)) or "[]")
    except (ValueError, RecursionError):
        raise InputError(f"{path} is not valid JSON.", hint="A file with one JSON object per line must be named .jsonl.") from None
    for number, record in enumerate(data if isinstance(data, list) else [data], 1):
        yield _text_of(f"{path}, entry {number}", record, text_field)


def _text_of(where: str, record: Any, text_field: str | None) -> str:
    if isinstance(record, str):
        return record
    if not isinstance(record, dict):
        raise InputError(f"{where} holds {type(record).__name__}, not an object with a text field.")
    return record[choose_field(where, {k: isinstance(v, str) or v is None for k, v in record.items()}, text_field)] or ""


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
        raise InputError(f"Cannot read the Parquet file {path}: {str(error).splitlines()[0]}") from None


_READERS: Mapping[str, Callable[[Path, str | None], Iterator[str]]] = {
    "text": _text, "jsonl": _jsonl, "json": _json, "parquet": _parquet,
}  # fmt: skip
