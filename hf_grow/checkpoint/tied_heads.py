"""Handles a language-model head that is stored although config.json ties it to the embedding.

Headers do not tell whether it is a copy of the embedding or a separate head; the bytes do. transformers 5 ties only equal weights and uses a
different head as it is (`PreTrainedModel.tie_weights`), so such a checkpoint counts as untied here, whatever its config.json says. (transformers 4
always ties, and so uses the embedding.) Opening a folder compares the two; for a checkpoint on the Hub this is postponed.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

from hf_grow.checkpoint.byte_ranges import fetch_range
from hf_grow.checkpoint.reader import Checkpoint
from hf_grow.errors import SourceError
from hf_grow.growth.plan import EMBEDDING, HEAD, GrowthPlan


def resolve_tied_heads(checkpoint: Checkpoint) -> Checkpoint:
    """Compares head and embedding of checkpoints on the Hub, donors included, by downloading (not storing) both tensors. Raises SourceError."""

    tags: dict[tuple[str, str], str] = {}

    def digest(name: str) -> bytes:
        stored, sha = checkpoint.tensors[name], hashlib.sha256()
        facts = checkpoint.files[stored.file]
        for piece in fetch_range(
            checkpoint.ref, checkpoint.revision, stored.file, stored.start, stored.stop, facts["size"], facts.get("sha256"), tags
        ):
            sha.update(piece)
        return sha.digest()

    if checkpoint.donors:
        checkpoint = replace(checkpoint, donors={label: resolve_tied_heads(donor) for label, donor in checkpoint.donors.items()})
    if not checkpoint.head_unresolved or checkpoint.folder is not None:
        return checkpoint
    same = checkpoint.tensors[HEAD].info == checkpoint.tensors[EMBEDDING].info
    return checkpoint.with_resolved_head(same and digest(HEAD) == digest(EMBEDDING))


def check_tied_heads(plan: GrowthPlan, checkpoint: Checkpoint) -> None:
    """Raises SourceError if the plan, made from headers only, treats a head as tied that differs from the embedding."""
    for info, opened in [(plan.source, checkpoint), *((plan.source.donors[label], donor) for label, donor in checkpoint.donors.items())]:
        if opened.head == "own" and info.architecture.tied:
            raise SourceError(
                f"{opened.ref} stores a {HEAD} that differs from the embedding, but the plan, made from headers only, drops it as tied.",
                hint="Plan again with the weights: use hf_grow.grow, or hf_grow.plan on a local folder.",
            )
