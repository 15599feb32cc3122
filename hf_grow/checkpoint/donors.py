"""Opens donor checkpoints, which a growth reads in addition to its source, and checks that their tokenizers are the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_grow.checkpoint.reader import Checkpoint
from hf_grow.checkpoint.source import open_source
from hf_grow.common.safe_files import read_bytes, read_json
from hf_grow.errors import SourceError

Notify = Callable[[str], None]


def parse_donor_refs(refs: Iterable[str]) -> list[tuple[str, str, str | None]]:
    """(label, folder or Hub id, revision) of each reference; a Hub id may include a revision: OWNER/NAME@REVISION."""
    out = []
    for label, ref in enumerate(refs, 1):
        name, _, revision = (ref, "", "") if Path(ref).expanduser().exists() else ref.partition("@")
        out.append((str(label), name, revision or None))
    return out


def with_donors(
    main: Checkpoint, donors: Iterable[tuple[str, str, str | None]], *, weights: bool, notify: Notify = lambda message: None
) -> Checkpoint:
    """Opens donors, each (label, ref, revision), and adds them to `main`. Raises SourceError as `open_source` does, and if tokenizers differ."""
    opened = {}
    for label, ref, revision in donors:
        opened[label] = open_source(ref, revision=revision, weights=weights, notify=notify)
        check_same_tokenizer(main, opened[label], notify)
    return replace(main, donors=opened) if opened else main


def check_same_tokenizer(main: Checkpoint, other: Checkpoint, notify: Notify) -> None:
    """Raises SourceError if the tokenizers assign different ids or tokens; calls `notify` if they cannot be compared."""
    mine, theirs = _vocabulary(main), _vocabulary(other)
    if mine is None or theirs is None:
        if main.folder is not None and other.folder is not None:
            missing = main.ref if mine is None else other.ref
            notify(f"{missing} has no tokenizer to compare; assuming that {other.ref} has the tokenizer of the source.")
        return
    if isinstance(mine, bytes) or isinstance(theirs, bytes):
        different = ["tokenizer.model"] if mine != theirs else []
    else:
        ids = set(mine.values())
        different = sorted(t for t in mine.keys() & theirs.keys() if mine[t] != theirs[t])
        different += sorted(t for t, i in theirs.items() if t not in mine and i in ids)
    if different:
        raise SourceError(
            f"{other.ref} and {main.ref} have different tokenizers: they differ in {different[0]!r}"
            + (f" and {len(different) - 1} more tokens." if len(different) > 1 else "."),
            hint="All experts must come from the same base model and use its tokenizer.",
        )


def _vocabulary(checkpoint: Checkpoint) -> dict[str, int] | bytes | None:
    """Token -> id from tokenizer.json, else the bytes of the sentencepiece model; None if there is neither."""
    if checkpoint.folder is None:
        return None
    path = checkpoint.folder / "tokenizer.json"
    if not path.is_file():
        sentencepiece = checkpoint.folder / "tokenizer.model"
        return read_bytes(sentencepiece) if sentencepiece.is_file() else None
    data = read_json(path, "")
    model: Any = data.get("model")
    vocab: Any = model.get("vocab") if isinstance(model, dict) else None
    try:
        # Unigram models list [token, score] in order of the ids
        ids = dict(vocab) if isinstance(vocab, dict) else {token: i for i, (token, _) in enumerate(vocab)}
        return ids | {t["content"]: t["id"] for t in data.get("added_tokens") or ()}
    except (TypeError, ValueError, KeyError):
        raise SourceError(f"{path} has no readable vocabulary.") from None
