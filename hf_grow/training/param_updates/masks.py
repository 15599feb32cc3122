"""Masks of parameter entries by parameter name, and selecting these entries of a tensor.

A mask is True (the whole tensor), False (none of it) or a bool tensor of its shape. Sharded parameters (DTensor) are handled by their local
piece: everything here works entry by entry, so a piece needs nothing of the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

from hf_grow.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

Mask: TypeAlias = "bool | Tensor"
EVERYTHING = "everything"


def inverse(mask: Mask) -> Mask:
    return not mask if isinstance(mask, bool) else ~mask


def either(a: Mask, b: Mask) -> Mask:
    if isinstance(a, bool):
        return True if a else b
    return either(b, a) if isinstance(b, bool) else _plain(a | b)


def both(a: Mask, b: Mask) -> Mask:
    if isinstance(a, bool):
        return b if a else False
    return both(b, a) if isinstance(b, bool) else _plain(a & b)


def _plain(mask: Tensor) -> Mask:
    """Turns a mask with equal entries into a bool."""
    if bool(mask.all()):
        return True
    return mask if bool(mask.any()) else False


def select(
    names: Iterable[str], parts: Mapping[str, Mapping[str, Mask]], included: Sequence[str], *, excluded: Sequence[str] = ()
) -> dict[str, Mask]:
    """For every parameter, the mask of entries in one of the parts `included` and in none of `excluded`.

    ``everything`` is a part too. Raises InputError for an unknown part, or if no entry is left.
    """
    all_names = list(names)
    known = {EVERYTHING: dict.fromkeys(all_names, True), **parts}
    unknown = [p for p in (*included, *excluded) if p not in known]
    if unknown:
        raise InputError(f"Unknown part {unknown[0]!r}.", hint=f"Parts: {', '.join(known)}.")
    masks: dict[str, Mask] = {}
    for name in all_names:
        mask: Mask = False
        for part in included:
            mask = either(mask, known[part].get(name, False))
        for part in excluded:
            mask = both(mask, inverse(known[part].get(name, False)))
        masks[name] = mask
    if not any(mask is not False for mask in masks.values()):
        remainder = f" outside {', '.join(excluded)}" if excluded else ""
        raise InputError(
            f"Nothing would train: this model has no {' or '.join(included)}{remainder}.", hint="Was it grown, and by which method?"
        )
    return masks


class Selection:
    """The masked entries of a tensor, stored as row or column indices where whole rows or columns are masked: smaller than a mask.

    Elsewhere the whole tensor is taken: gathering single entries takes many times as long as copying them all.
    """

    def __init__(self, mask: Tensor) -> None:
        self.mask, self.dim, self.index = mask, -1, mask.new_empty(0)
        for dim in {0, mask.dim() - 1}:
            lines = mask.movedim(dim, 0).reshape(mask.shape[dim], mask.numel() // max(1, mask.shape[dim]))
            if lines.numel() and bool((lines.any(1) == lines.all(1)).all()):
                self.dim, self.index = dim, lines.all(1).nonzero().flatten()
                self.mask = mask.new_empty(0)
                return

    def take(self, tensor: Tensor) -> Tensor:
        """A copy of the entries, or of the whole tensor."""
        return tensor.clone() if self.dim < 0 else tensor.index_select(self.dim, self.index)

    def put(self, tensor: Tensor, values: Tensor) -> None:
        """Writes back entries in the form that `take` returned."""
        if self.dim < 0:
            tensor.copy_(values.where(self.mask, tensor))
        else:
            tensor.index_copy_(self.dim, self.index, values)
