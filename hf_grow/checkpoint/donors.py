"""Further checkpoints beside the source: opened, and checked to speak the source's language."""

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
    """(label, folder or Hub id, revision) of checkpoints as a user names them; a Hub id may carry a revision: OWNER/NAME@REVISION."""
    out = []
    for label, ref in enumerate(refs, 1):
        name, _, revision = (ref, "", "") if Path(ref).expanduser().exists() else ref.partition("@")
        out.append((str(label), name, revision or None))
    return out


def with_donors(
    main: Checkpoint, others: Iterable[tuple[str, str, str | None]], *, weights: bool, notify: Notify = lambda message: None
) -> Checkpoint:
    """The main checkpoint with further ones, each (label, ref, revision). Raises SourceError as `open_source` does, and where tokenizers differ."""
    opened = {}
    for label, ref, revision in others:
        opened[label] = open_source(ref, revision=revision, weights=weights, notify=notify)
        check_same_tokenizer(main, opened[label], notify)
    return replace(main, donors=opened) if opened else main


def check_same_tokenizer(main: Checkpoint, other: Checkpoint, notify: Notify) -> None:
    """Raises SourceError if a token of one is another token of the other; tells if that cannot be seen."""
    mine, theirs = _vocabulary(main), _vocabulary(other)
    if mine is None or theirs is None:
        if main.folder is not None and other.folder is not None:
            lacking = main.ref if mine is None else other.ref
            notify(f"{lacking} has no tokenizer that can be compared; {other.ref} is taken to have the source's.")
        return
    if isinstance(mine, bytes) or isinstance(theirs, bytes):
        different = ["tokenizer.model"] if mine != theirs else []
    else:
        different = sorted(t for t in mine.keys() & theirs.keys() if mine[t] != theirs[t])
        taken = {i: t for t, i in mine.items()}
        different += sorted(t for t, i in theirs.items() if t not in mine and i in taken)
    if different:
        raise SourceError(
            f"{other.ref} has another tokenizer than {main.ref}: they differ in {different[0]!r}"
            + (f" and {len(different) - 1} more tokens." if len(different) > 1 else "."),
            hint="Experts must be trained from one base model, with its tokenizer.",
        )


def _vocabulary(checkpoint: Checkpoint) -> dict[str, int] | bytes | None:
    """Token -> id of a folder's tokenizer.json; or the bytes of its sentencepiece model; None where it has neither."""
    if checkpoint.folder is None:
        return None
    path = checkpoint.folder / "tokenizer.json"
    if not path.is_file():
        model = checkpoint.folder / "tokenizer.model"
        return read_bytes(model) if model.is_file() else None
    data = read_json(path, "")
    model_part: Any = data.get("model")
    vocab: Any = model_part.get("vocab") if isinstance(model_part, dict) else None
    try:
        # Unigram models list [token, score] in the order of the ids.
        found = dict(vocab) if isinstance(vocab, dict) else {token: i for i, (token, _) in enumerate(vocab)}
        return found | {t["content"]: t["id"] for t in data.get("added_tokens") or ()}
    except (TypeError, ValueError, KeyError):
        raise SourceError(f"{path} holds no vocabulary that can be read.") from None
