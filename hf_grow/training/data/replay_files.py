"""The files of a replay folder: texts.jsonl (sampled texts) and replay.json (what they were sampled from, and how far sampling got)."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from hf_grow.common.safe_files import read_json, to_json
from hf_grow.errors import InputError, OutputError, SourceError
from hf_grow.training.config.replay_options import ReplayOptions

TEXTS_FILE = "texts.jsonl"
RECORD_FILE = "replay.json"
FORMAT_VERSION = 2
BATCHES_FOLDER = ".batches"
"""What several processes have sampled and the first one has not filtered yet."""
FRAMES = ("document", "cut", "verbatim")
"""document: a complete text; cut: one that reached the maximum length before its end; verbatim: a conversation with the tokens of its template."""


class Document(NamedTuple):
    """A text, and which tokens are put around it when it is packed."""

    text: str
    frame: str = "document"
    """One of FRAMES. document: starts as the tokenizer (or `bos`) defines, ends with EOS; cut: no EOS; verbatim: nothing is added."""


def is_texts_file(path: Path) -> bool:
    return path.name == TEXTS_FILE and path.with_name(RECORD_FILE).is_file()


def parse_sampled_text(where: str, record: Any) -> dict[str, str]:
    """{"text": str, "frame": str} from a line of texts.jsonl. Raises InputError."""
    text, frame = (record.get("text"), record.get("frame")) if isinstance(record, dict) else (None, None)
    if not isinstance(text, str) or frame not in FRAMES:
        raise InputError(f"{where} is not a sampled text.", hint="Sample again: hf-grow replay MODEL -o DIR --overwrite.")
    return {"text": text, "frame": str(frame)}


def append_texts(file: IO[bytes], texts: Iterable[Document]) -> None:
    """Appends lines to the open texts.jsonl and syncs it."""
    file.write("".join(json.dumps(text._asdict(), ensure_ascii=False) + "\n" for text in texts).encode())
    file.flush()
    os.fsync(file.fileno())


def read_record(folder: Path) -> dict[str, Any] | None:
    """replay.json of a folder; None if there is none. Raises InputError if it is damaged."""
    path = folder / RECORD_FILE
    if not path.is_file():
        return None
    try:
        record = read_json(path)
        numbers = (record["tokens"], record["bytes"], record["counts"]["tokens"])
        if record["format"] != FORMAT_VERSION or not all(isinstance(n, int) for n in numbers) or not isinstance(record["complete"], bool):
            raise ValueError
        if not isinstance(record["model"], str) or not isinstance(record["settings"], dict):
            raise ValueError
    except (SourceError, ValueError, KeyError, TypeError):
        raise InputError(f"{path} is damaged, or from another version of hf-grow.", hint="Sample again with --overwrite.") from None
    return dict(record)


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Replaces replay.json atomically; call it after the texts it counts are synced."""
    new = folder / f"{RECORD_FILE}.new"
    new.write_text(to_json(record), encoding="utf-8")
    os.replace(new, folder / RECORD_FILE)


def check_output(out: Path, *, overwrite: bool) -> dict[str, Any] | None:
    """The record of the replay folder `out`; None if sampling starts from nothing. Raises OutputError if `out` holds other files."""
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file.", hint="Give a folder with -o.")
    if not out.is_dir():
        return None
    if overwrite:
        if any(p.name not in (TEXTS_FILE, RECORD_FILE, BATCHES_FOLDER) for p in out.iterdir()):
            raise OutputError(f"{out} contains files other than sampled texts.", hint="Give a new folder with -o.")
        return None
    record = read_record(out)
    # texts.jsonl alone: a run was killed before it recorded its first batch.
    if record is None and any(p.name not in (TEXTS_FILE, BATCHES_FOLDER) for p in out.iterdir()):
        raise OutputError(f"{out} is not empty, and contains no sampled texts.", hint="Give a new folder with -o.")
    return record


def open_record(out: Path, fresh: Mapping[str, Any], *, overwrite: bool) -> dict[str, Any]:
    """The record to continue from: the one in `out` if it has the digest and settings of `fresh`, else `fresh` in a new, empty folder.

    Raises OutputError if `out` holds other files, or samples of another model or with other settings.
    """
    record = check_output(out, overwrite=overwrite)
    if record is not None:
        hint = "Give another -o, or --overwrite."
        if record.get("digest") != fresh["digest"]:
            raise OutputError(f"{out} contains samples of another model ({record.get('model')}).", hint=hint)
        if record.get("settings") != fresh["settings"]:
            other = [k for k, v in fresh["settings"].items() if record["settings"].get(k) != v]
            raise OutputError(f"{out} contains samples with other settings ({', '.join(other)}).", hint=hint)
        if not (out / TEXTS_FILE).is_file() or (out / TEXTS_FILE).stat().st_size < record["bytes"]:
            raise OutputError(f"{out / TEXTS_FILE} was changed after it was sampled.", hint=hint)
        return record
    counts = {"texts": 0, "tokens": 0, "cut": 0, "chat_tokens": 0, "sampled_texts": 0, "sampled_tokens": 0, "dropped": {}}
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / RECORD_FILE).unlink(missing_ok=True)
        shutil.rmtree(out / BATCHES_FOLDER, ignore_errors=True)  # of other settings
        (out / TEXTS_FILE).write_bytes(b"")
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error.strerror}.") from None
    return {**fresh, "batches": 0, "bytes": 0, "surprise": {}, "counts": counts}


def check_complete(folder: Path) -> None:
    """Raises InputError if `folder` is a replay folder whose sampling is unfinished."""
    record = read_record(folder)
    if record is not None and not record["complete"]:
        raise InputError(
            f"The replay in {folder} is unfinished ({record['counts']['tokens']:,} of {record['tokens']:,} tokens).",
            hint=f"Finish it: {resume_command(record, folder)}",
        )


def resume_command(record: Mapping[str, Any], folder: Path) -> str:
    """The `hf-grow replay` command that continues a replay folder, with the model and settings of its record."""
    options = {name: record["settings"].get(name) for name in ReplayOptions.model_fields} | {"tokens": record["tokens"]}
    words = ["hf-grow", "replay", record["model"] or "MODEL", *(("--revision", record["revision"]) if record.get("revision") else ())]
    words += ["-o", folder]
    for name, value in options.items():
        if value is not None and value != ReplayOptions.model_fields[name].default:
            words += [f"--{name.replace('_', '-')}", value]
    return shlex.join(map(str, words))
