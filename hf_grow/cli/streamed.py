"""What `--stream-source` means for one plan: said before anything is fetched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hf_grow.checkpoint.donors import check_same_tokenizer
from hf_grow.checkpoint.reader import Checkpoint
from hf_grow.checkpoint.source import fetch_companions, prefer_cached
from hf_grow.checkpoint.tied_heads import resolve_tied_heads
from hf_grow.checkpoint.writer import WORKERS, Shard
from hf_grow.cli import render
from hf_grow.common.units import format_bytes
from hf_grow.errors import InputError
from hf_grow.growth.plan import GrowthPlan

if TYPE_CHECKING:
    from hf_grow.checkpoint.tensor_cache import TensorCache


def streamed(
    plan: GrowthPlan, checkpoint: Checkpoint, shards: Sequence[Shard], keep: int, *, quiet: bool
) -> tuple[Checkpoint, TensorCache | None]:
    """The sources, from the cache where they are whole there, and what fetches the rest; None where there is no rest."""
    if all(_given(c) for c in (checkpoint, *checkpoint.donors.values())):
        raise InputError("The source is a folder on this machine; --stream-source has nothing to fetch.", hint="Leave it out.")
    checkpoint = _from_cache(checkpoint)
    if not _remote(checkpoint):
        render.note("The source is on this machine; --stream-source has nothing to fetch.")
        return checkpoint, None
    if plan.growth.measurements:
        what = " and ".join(wanted.kind for wanted in plan.growth.measurements)
        raise InputError(
            f"--stream-source does not work with {what} that are measured on the source's weights.",
            hint="Leave --stream-source out, or use --router normal.",
        )
    from hf_grow.checkpoint.tensor_cache import TensorCache

    cache = TensorCache(plan, checkpoint, shards, keep=keep)
    if not quiet:
        said = cache.schedule
        again = f" ({format_bytes(said.fetched - said.once)} of them a second time)" if said.fetched > said.once else ""
        console = render.console
        console.print(
            f"fetching   {format_bytes(said.fetched)} by byte ranges{again}; at most {format_bytes(cache.peak_bytes(WORKERS))} of it here"
        )
    return checkpoint, cache


def heads_compared(checkpoint: Checkpoint) -> Checkpoint:
    """The sources with a stored tied head compared with the embedding, which takes both tensors of those on the Hub. Raises SourceError."""
    return resolve_tied_heads(_from_cache(checkpoint))


def _from_cache(checkpoint: Checkpoint) -> Checkpoint:
    return prefer_cached(replace(checkpoint, donors={label: prefer_cached(other) for label, other in checkpoint.donors.items()}))


def fetch_small(checkpoint: Checkpoint) -> Path:
    """Tokenizers, licences and code of the sources; returns the main one's folder. Raises SourceError, also where tokenizers differ."""
    main = checkpoint if checkpoint.folder else replace(checkpoint, folder=fetch_companions(checkpoint))
    for other in checkpoint.donors.values():
        check_same_tokenizer(main, other if other.folder else replace(other, folder=fetch_companions(other)), render.note)
    assert main.folder is not None
    return main.folder


def _given(checkpoint: Checkpoint) -> bool:
    """Whether it was named as a folder; one from the Hub has a revision, wherever it lies."""
    return checkpoint.folder is not None and not checkpoint.revision


def _remote(checkpoint: Checkpoint) -> bool:
    return any(c.folder is None for c in (checkpoint, *checkpoint.donors.values()))
