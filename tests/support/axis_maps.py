"""Simple axis maps for tests."""

from __future__ import annotations

from hf_grow.growth.axes import AxisMap, AxisRun


def identity(size: int) -> AxisMap:
    return AxisMap(size, (AxisRun(0, size),))


def tile(size: int, copies: int, pad: int = 0) -> AxisMap:
    """`copies` of the whole axis, each with gain 1/copies for readers, then `pad` zero rows."""
    runs = [AxisRun(0, size, 1.0, 1.0 / copies)] * copies
    return AxisMap(size, (*runs, AxisRun(None, pad, 0.0, 0.0)) if pad else tuple(runs))
