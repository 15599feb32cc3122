"""A head that is stored beside the embedding although config.json ties the two.

Headers cannot tell whether it is the embedding once more or a head of its own; the bytes can. transformers 5 ties only weights that are equal and
uses a head that differs as it is (`PreTrainedModel.tie_weights`), so a checkpoint with such a head counts as untied here, whatever its
config.json says. (transformers 4 ties in any case, and so uses the embedding.) Opening a folder compares them; what is on the Hub waits.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

from hf_grow.checkpoint.byte_ranges import fetch_range
from hf_grow.checkpoint.reader import Checkpoint
from hf_grow.errors import SourceError
from hf_grow.growth.plan import EMBEDDING, HEAD, GrowthPlan


def resolve_tied_heads(checkpoint: Checkpoint) -> Checkpoint:
    """Compares the two of a checkpoint on the Hub, and of the further ones beside it: they are fetched, and kept nowhere. Raises SourceError."""

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
        checkpoint = replace(checkpoint, donors={label: resolve_tied_heads(other) for label, other in checkpoint.donors.items()})
    if not checkpoint.head_unresolved or checkpoint.folder is not None:
        return checkpoint
    same = checkpoint.tensors[HEAD].info == checkpoint.tensors[EMBEDDING].info
    return checkpoint.with_resolved_head(same and digest(HEAD) == digest(EMBEDDING))


def check_tied_heads(plan: GrowthPlan, checkpoint: Checkpoint) -> None:
    """Raises SourceError if the plan was made from headers alone and takes a head for tied that differs from the embedding."""
    for info, held in [(plan.source, checkpoint), *((plan.source.donors[label], other) for label, other in checkpoint.donors.items())]:
        if held.head == "own" and info.architecture.tied:
            raise SourceError(
                f"{held.ref} stores a {HEAD} that differs from the embedding, and the plan, made from headers alone, drops it as tied.",
                hint="Plan again from the weights: hf_grow.grow does, and so does hf_grow.plan for a folder.",
            )
