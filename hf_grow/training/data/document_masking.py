"""Intra-document masking: packed sequences in which no token attends to another document.

Each row holds the lengths of its documents (`seq_lengths`). `position_ids` start at 0 in every document, and transformers takes the documents from
them: as a block-diagonal mask for sdpa, eager and flex_attention (masking_utils), as cu_seq_lens for flash attention. The logits of a document are
those of the document alone. What it rests on, and why `forward_arguments` is used for every forward pass:

    attention mask      transformers looks for documents in position_ids only where no attention mask is given
    key/value cache     ... and where there is no cache: use_cache must be false, also in models whose config says otherwise
    flash attention     finds documents by itself in batches of one row only; of more rows it is told cu_seq_lens

The first token of a document has no label: nothing in its document predicts it. A document that is cut at the end of a sequence goes on in the next one
as if it began there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hf_grow.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

LENGTHS = "seq_lengths"
"""Column of the lengths of a row's documents; padding counts as one of them."""
_MASKS = ("sdpa", "eager", "flex_attention")


def split_lengths(carry: Sequence[int], documents: Iterable[int], length: int) -> tuple[list[list[int]], list[int]]:
    """Lengths of the pieces of documents in each row of `length` tokens, and of those left over, as `packing.split_sequences` splits their tokens.

    ``carry``: lengths left over before; ``documents``: lengths of the documents.
    """
    rows: list[list[int]] = []
    row: list[int] = []
    room = length
    for tokens in (*carry, *documents):
        left = tokens
        while left >= room:
            rows.append([*row, room])
            left, row, room = left - room, [], length
        if left:
            row.append(left)
            room -= left
    return rows, row


def position_ids(rows: Sequence[Mapping[str, Any]]) -> Tensor | None:
    """Positions within documents, int64 [rows, longest row], 0 where a shorter row is padded; None for rows that do not tell their documents.

    Rows tell them by `seq_lengths`, or by `position_ids` themselves. Raises InputError for positions that do not start at 0.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    if LENGTHS in rows[0]:
        found = [torch.cat([torch.arange(int(n)) for n in row[LENGTHS]]) for row in rows]
    elif "position_ids" in rows[0]:
        found = [torch.as_tensor(row["position_ids"]).long() for row in rows]
        if any(int(positions[0]) for positions in found):
            raise InputError("position_ids of a row do not start at 0.", hint="Count them from 0 at every document and at every row.")
    else:
        return None
    return pad_sequence(found, batch_first=True)


def with_documents(batch: dict[str, Tensor], positions: Tensor | None) -> dict[str, Tensor]:
    """A batch of input_ids and labels with position_ids, and without labels at the first tokens of documents; as it was for None."""
    if positions is None:
        return batch
    return {**batch, "labels": batch["labels"].masked_fill(positions == 0, -100), "position_ids": positions}


def forward_arguments(config: Any, positions: Tensor | None) -> dict[str, Any]:
    """Arguments of a forward pass of the model with this config whose attention stays within documents; none for None.

    Raises InputError where the model's attention implementation would attend to other documents.
    """
    if positions is None:
        return {}
    check_attention(config._attn_implementation)
    from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids
    from transformers.utils.generic import is_flash_attention_requested

    arguments: dict[str, Any] = {"position_ids": positions, "use_cache": False}
    if is_flash_attention_requested(config=config):
        # Every row starts at position 0, so that the batch is one long packed sequence.
        starts, longest = prepare_fa_kwargs_from_position_ids(positions)
        arguments |= dict(zip(("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"), (*starts, *longest), strict=True))
    return arguments


def check_attention(implementation: str | None) -> None:
    """Raises InputError for an attention implementation that would attend to other documents; None is the default of transformers."""
    from transformers.utils.generic import is_flash_attention_requested

    if implementation is None or implementation in _MASKS:
        return
    if "|" not in implementation and is_flash_attention_requested(requested_attention_implementation=implementation):
        return
    raise InputError(
        f"{implementation} would attend to other documents: it gets no mask from position_ids.",
        hint=f"Use {', '.join(_MASKS)} or flash_attention_2, or set data.intra_document_masking: false.",
    )
