"""Masks of parameter entries by parameter name: which entries are new, and which train.

A mask is True (the whole tensor), False (none of it), or a RowMask. A tensor is seen as a matrix of its last dimension (a vector as one column), and
growth makes few different rows: with twice the width, a row of a new matrix is new as a whole or from some column on. So a RowMask holds the different
rows once, and the number of its row for each: one byte a row, where a bool tensor has one an entry. Every mask has this form, and `both`, `either`
and `inverse` of such masks are exact; only where nearly all rows differ does it take more than a bool tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from hf_grow.errors import InputError
from hf_grow.training.param_updates.shards import local_window

if TYPE_CHECKING:
    from torch import Tensor

Mask: TypeAlias = "bool | RowMask"
EVERYTHING = "everything"


@dataclass(frozen=True)
class RowMask:
    """Row i of a tensor, as a matrix of its last dimension, is ``lines[kinds[i]]``."""

    shape: tuple[int, ...]
    """Of the masked tensor."""
    kinds: Tensor
    """uint8, or a larger int where there are more lines: [rows]."""
    lines: Tensor
    """bool [lines, columns]."""

    def dense(self) -> Tensor:
        """As a bool tensor."""
        return self.lines[self.kinds.long()].view(self.shape)

    def count(self) -> int:
        """The number of masked entries."""
        return int(self.lines.sum(1)[self.kinds.long()].sum())

    def nbytes(self) -> int:
        return self.kinds.nbytes + self.lines.nbytes

    def local(self, like: Tensor) -> RowMask:
        """The part of a tensor of this shape that this process holds of `like`."""
        window = local_window(like)
        if tuple(map(len, window)) == self.shape:
            return self
        *leading, last = (
            (slice(r.start, r.stop) for r in window) if len(self.shape) > 1 else (slice(window[0].start, window[0].stop), slice(None))
        )
        kinds = self.kinds.view(self.shape[:-1] or self.shape) if len(self.shape) > 1 else self.kinds
        return RowMask(tuple(map(len, window)), kinds[tuple(leading)].reshape(-1), self.lines[:, last])


def product_mask(vectors: Sequence[Tensor]) -> Mask:
    """The entries whose every coordinate is True in the vector of its dimension."""
    import torch

    *leading, last = vectors if len(vectors) > 1 else (*vectors, torch.ones(1, dtype=torch.bool))
    rows = leading[0]
    for vector in leading[1:]:
        rows = rows.unsqueeze(-1) & vector
    return _reduced(tuple(map(len, vectors)), rows.reshape(-1), torch.stack([torch.zeros_like(last), last]))


def stacked_mask(parts: Sequence[tuple[Mask, int]], shape: Sequence[int]) -> Mask:
    """The mask of a tensor of ``shape`` that consists of runs of rows: their masks, and the number of their rows, in order."""
    import torch

    columns = shape[-1] if len(shape) > 1 else 1
    kinds, lines, used = [], [], 0
    for mask, rows in parts:
        if isinstance(mask, bool):
            mask = RowMask((rows, columns), torch.zeros(rows, dtype=torch.uint8), torch.full((1, columns), mask))
        kinds.append(mask.kinds.long() + used)
        lines.append(mask.lines)
        used += len(mask.lines)
    return _reduced(tuple(shape), torch.cat(kinds), torch.cat(lines))


def inverse(mask: Mask) -> Mask:
    return not mask if isinstance(mask, bool) else RowMask(mask.shape, mask.kinds, ~mask.lines)


def either(a: Mask, b: Mask) -> Mask:
    if isinstance(a, bool):
        return True if a else b
    return either(b, a) if isinstance(b, bool) else _combined(a, b, lambda x, y: x | y)


def both(a: Mask, b: Mask) -> Mask:
    if isinstance(a, bool):
        return b if a else False
    return both(b, a) if isinstance(b, bool) else _combined(a, b, lambda x, y: x & y)


def _combined(a: RowMask, b: RowMask, operation: Callable[[Tensor, Tensor], Tensor]) -> Mask:
    """Row by row; each pair of lines that occurs is combined once."""
    pairs, kinds = _unique(a.kinds.long() * len(b.lines) + b.kinds.long())
    return _reduced(a.shape, kinds, operation(a.lines[pairs // len(b.lines)], b.lines[pairs % len(b.lines)]))


def _reduced(shape: tuple[int, ...], kinds: Tensor, lines: Tensor) -> Mask:
    """Each line that occurs once; a bool where all entries are equal."""
    import torch

    occurring, kinds = _unique(kinds.long())
    lines, same = _unique(lines[occurring], dim=0)
    if not bool(lines.any()):
        return False
    if bool(lines.all()):
        return True
    sizes = ((256, torch.uint8), (2**15, torch.int16), (2**31, torch.int32))
    return RowMask(shape, same[kinds].to(next(dtype for most, dtype in sizes if len(lines) <= most)), lines)


def _unique(tensor: Tensor, dim: int | None = None) -> tuple[Tensor, Tensor]:
    """The different values, and for each value its place among them."""
    values, places = tensor.unique(return_inverse=True, dim=dim)  # type: ignore[no-untyped-call]
    return values, places


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
