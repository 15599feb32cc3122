"""Optimizer state in 8 or 4 bits, read as fp32 and written again, block by block.

A block of consecutive values of the flattened tensor has one scale, its largest absolute value, and every value a code: an index into `qmap`, the sorted
levels between -1 (or 0) and 1. bitsandbytes and torchao store the same three tensors (Dettmers et al. 2022, "8-bit Optimizers via Block-wise
Quantization"; Li et al. 2023, "Memory Efficient Optimizers with 4-bit States").

Reading is exact. Writing takes the nearest level, so a grown state equals the map of the dequantized one up to one rounding: half the distance of
two neighbouring levels, times the block's scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_grow.growth.tensors import RowTensor


@dataclass(frozen=True)
class Dequantized:
    """Values of a tensor of codes. ``packed``: two codes a byte, the first in the higher four bits."""

    codes: RowTensor
    scale: RowTensor
    qmap: Tensor
    shape: tuple[int, ...]
    block: int
    packed: bool = False
    dtype: torch.dtype = torch.float32

    def whole(self) -> Tensor:
        return self.rows(0, self.shape[0])

    def rows(self, start: int, stop: int) -> Tensor:
        width = math.prod(self.shape[1:])
        low, high = start * width, stop * width
        if self.packed:
            pairs = self.codes.rows(low // 2, -(-high // 2))
            codes = torch.stack([pairs >> 4, pairs & 15], 1).reshape(-1)[low % 2 :][: high - low]
        else:
            codes = self.codes.rows(start, stop).reshape(-1)
        first = low // self.block
        scale = self.scale.rows(first, -(-high // self.block))
        values = self.qmap[codes.int()] * scale[torch.arange(low, high) // self.block - first]
        return values.view(stop - start, *self.shape[1:])


@dataclass(frozen=True)
class Computed:
    """A RowTensor of which rows are computed."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    compute: Callable[[int, int], Tensor]

    def rows(self, start: int, stop: int) -> Tensor:
        return self.compute(start, stop)

    def whole(self) -> Tensor:
        return self.compute(0, self.shape[0])


def quantized(values: RowTensor, qmap: Tensor, block: int, *, packed: bool = False) -> tuple[Computed, Computed]:
    """The codes and scales of `values`: codes in its shape, or `packed` in one dimension."""
    count, width = math.prod(values.shape), math.prod(values.shape[1:])
    blocks = -(-count // block)
    middle = (qmap[1:] + qmap[:-1]) / 2

    def flat(low: int, high: int) -> Tensor:
        """Values of the flattened tensor."""
        first = low // width
        return values.rows(first, -(-high // width)).reshape(-1)[low - first * width : high - first * width].float()

    def scales(first: int, last: int) -> Tensor:
        if first == last:
            return torch.empty(0)
        part = flat(first * block, min(last * block, count)).abs()
        return torch.nn.functional.pad(part, (0, (last - first) * block - len(part))).view(-1, block).amax(1)

    def codes(low: int, high: int) -> Tensor:
        if low == high:
            return torch.empty(0, dtype=torch.uint8)
        first, last = low // block, -(-high // block)
        part = flat(first * block, min(last * block, count))
        scale = torch.nn.functional.pad(part, (0, (last - first) * block - len(part))).view(-1, block).abs().amax(1)
        scaled = part / scale.clamp(min=torch.finfo(torch.float32).tiny).repeat_interleave(block)[: len(part)]
        return torch.bucketize(scaled, middle).to(torch.uint8)[low - first * block : high - first * block]

    def in_rows(start: int, stop: int) -> Tensor:
        return codes(start * width, stop * width).view(stop - start, *values.shape[1:])

    def in_pairs(start: int, stop: int) -> Tensor:
        pairs = codes(start * 2, stop * 2).view(-1, 2)
        return pairs[:, 0] << 4 | pairs[:, 1]

    made = Computed((count // 2,), torch.uint8, in_pairs) if packed else Computed(values.shape, torch.uint8, in_rows)
    return made, Computed((blocks,), torch.float32, scales)
