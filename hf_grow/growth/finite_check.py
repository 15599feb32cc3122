"""Detects NaN and infinity in raw bytes, without torch."""

from __future__ import annotations

import numpy as np

# Nonfinite values have all exponent bits set: as integers they are the largest of either sign.
_LIMITS = {"BF16": (np.int16, np.uint16, 0x7F80), "F16": (np.int16, np.uint16, 0x7C00),
           "F32": (np.int32, np.uint32, 0x7F800000), "F64": (np.int64, np.uint64, 0x7FF0000000000000)}  # fmt: skip


NOT_FINITE_HINT = "Use an undamaged checkpoint (or --allow-nonfinite --resume, if you know why they are there)."


class FiniteCheck:
    """Fed with bytes of one dtype like a hash; `finite` is False once a value was NaN or infinite. ``dtype``: a safetensors name."""

    def __init__(self, dtype: str) -> None:
        self.signed, self.unsigned, self.limit = _LIMITS[dtype]
        self.negative = self.limit | 1 << (8 * np.dtype(self.signed).itemsize - 1)
        self.finite = True

    def update(self, piece: memoryview) -> None:
        if self.finite and len(piece):
            positive = np.frombuffer(piece, self.signed).max() >= self.limit
            self.finite = not (positive or np.frombuffer(piece, self.unsigned).max() >= self.negative)
