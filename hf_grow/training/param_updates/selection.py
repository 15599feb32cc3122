"""The masked entries of a tensor: copying them, and scaling or undoing what was done to them since."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from hf_grow.training.param_updates.masks import RowMask

if TYPE_CHECKING:
    from torch import Tensor

Index: TypeAlias = "slice | Tensor"
MOST_BLOCKS = 16
"""With more blocks the whole tensor is copied: gathering few entries at a time takes many times as long."""


class Selection:
    """The entries of a RowMask as blocks, one for each of its lines.

    ``device``: of the tensors that it is used on, which are contiguous and have the mask's shape.
    """

    def __init__(self, mask: RowMask, device: Any = "cpu") -> None:
        # A part of a tensor may lack some of its lines.
        chosen = [
            kind for kind in mask.kinds.long().bincount(minlength=len(mask.lines)).nonzero().flatten().tolist() if mask.lines[kind].any()
        ]
        self.whole = mask.dense().to(device) if len(chosen) > MOST_BLOCKS else None
        self.size = mask.count() if self.whole is None else self.whole.numel()
        """Values that `take` copies."""
        self.blocks: list[_Block] = []
        if self.whole is None and self.size:
            self.blocks = [_Block(_index(mask.kinds == kind, device), _index(mask.lines[kind], device)) for kind in chosen]

    def take(self, tensor: Tensor) -> list[Tensor]:
        """Copies of the blocks, or of the whole tensor."""
        return [tensor.clone()] if self.whole is not None else [b.take(_matrix(tensor)) for b in self.blocks]

    def restore(self, tensor: Tensor, taken: list[Tensor], factor: float = 0.0) -> None:
        """Multiplies by ``factor`` what was added to the entries since they were taken; 0 puts them back bit for bit. Overwrites ``taken``."""
        if self.whole is not None:
            (old,) = taken
            tensor.copy_((old.lerp_(tensor, factor) if factor else old).where(self.whole, tensor))
            return
        for block, old in zip(self.blocks, taken, strict=True):
            matrix = _matrix(tensor)
            block.put(matrix, old.lerp_(block.read(matrix), factor) if factor else old)

    def fill(self, tensor: Tensor, value: float) -> None:
        if self.whole is not None:
            tensor.masked_fill_(self.whole, value)
        for block in self.blocks:
            matrix = _matrix(tensor)
            block.put(matrix, matrix.new_full((), value).expand_as(block.read(matrix)))


@dataclass(frozen=True)
class _Block:
    """Some rows times some columns of a matrix, each a run or indices."""

    rows: Index
    columns: Index

    def read(self, matrix: Tensor) -> Tensor:
        """A view where both are runs, else a copy."""
        if isinstance(self.columns, slice):
            part = matrix[:, self.columns]
            return part[self.rows] if isinstance(self.rows, slice) else part.index_select(0, self.rows)
        part = matrix[self.rows] if isinstance(self.rows, slice) else matrix.index_select(0, self.rows)
        return part.index_select(1, self.columns)

    def take(self, matrix: Tensor) -> Tensor:
        part = self.read(matrix)
        return part.clone() if isinstance(self.rows, slice) and isinstance(self.columns, slice) else part

    def put(self, matrix: Tensor, values: Tensor) -> None:
        if isinstance(self.rows, slice) and isinstance(self.columns, slice):
            matrix[self.rows, self.columns] = values
        elif isinstance(self.columns, slice):
            matrix[:, self.columns].index_copy_(0, self.rows, values)  # type: ignore[arg-type]
        elif isinstance(self.rows, slice):
            matrix[self.rows].index_copy_(1, self.columns, values)
        else:
            matrix[self.rows.unsqueeze(1), self.columns] = values


def _matrix(tensor: Tensor) -> Tensor:
    """A view of a tensor as a matrix of its last dimension, of a vector as one column."""
    return tensor.view(-1, tensor.shape[-1] if tensor.dim() > 1 else 1)


def _index(chosen: Tensor, device: Any) -> Index:
    at = chosen.nonzero().flatten()
    first, last = int(at[0]), int(at[-1])
    return slice(first, last + 1) if last - first + 1 == len(at) else at.to(device)
