"""Which source gives which sequence: shares that hold in every stretch of the training, not only in expectation.

Two sources with shares r and 1 - r take turns as a Sturmian word does: place k belongs to the first exactly if floor(r (k + 1) + phase) is
floor(r k + phase) + 1. Any n places in a row then hold floor(r n) or ceil(r n) of it, and no other rule comes closer. Several sources are
taken off one after another in this way, so the m-th one is at most m sequences off. All in integers: place k is found directly, which
is why a resumed training needs no state of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_FINEST = 1 << 30
"""Largest denominator of a share, so that its product with a place fits into 64 bits. Ratios of whole numbers below it are exact."""


@dataclass(frozen=True)
class Pattern:
    """An endless order of turns."""

    shares: tuple[Fraction, ...]
    """Relative; the first one is the one that holds most exactly."""
    seed: int = 0

    @cached_property
    def _steps(self) -> list[tuple[int, int, int]]:
        """For each source but the last: its share of what those before it left, as a fraction, and the phase over the same denominator."""
        import numpy as np

        rng = np.random.default_rng([self.seed, len(self.shares)])
        left = sum(self.shares, Fraction(0))
        steps = []
        for share in self.shares[:-1]:
            part = (share / left).limit_denominator(_FINEST)
            steps.append((part.numerator, part.denominator, int(rng.integers(part.denominator))))
            left -= share
        return steps

    def turns(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For places start..stop-1 (below 2**32): the source, and how many turns that source had before."""
        import numpy as np

        place = np.arange(start, stop, dtype=np.int64)
        source = np.full(stop - start, len(self.shares) - 1, np.int64)
        ordinal = np.zeros(stop - start, np.int64)
        undecided = np.arange(stop - start)
        for index, (part, whole, phase) in enumerate(self._steps):
            before = (part * place + phase) // whole
            mine = (part * (place + 1) + phase) // whole > before
            source[undecided[mine]] = index
            ordinal[undecided[mine]] = before[mine]
            place, undecided = (place - before)[~mine], undecided[~mine]
        ordinal[undecided] = place
        return source, ordinal


def rows_of(ordinals: NDArray[np.int64], size: int, key: Sequence[int], *, shuffle: bool) -> NDArray[np.int64]:
    """The row of a source of `size` rows for each of its turns: all rows once, then all again, each pass in an order of its own."""
    import numpy as np

    passes, rows = np.divmod(ordinals, size)
    if shuffle:
        for number in np.unique(passes):
            order = np.random.default_rng([*key, int(number)]).permutation(size)
            rows[passes == number] = order[rows[passes == number]]
    return rows
