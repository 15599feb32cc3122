"""Deterministic interleaving of text sources in exact shares.

Two sources with shares r and 1 - r follow a Sturmian (Beatty) sequence: place k goes to the first if floor(r (k + 1) + phase) =
floor(r k + phase) + 1. Any n consecutive places then hold floor(r n) or ceil(r n) sequences of it. Of several sources, each in turn is split
off from what the earlier ones leave, so the m-th differs by at most m from its exact share. All arithmetic is on integers, and any place is
computed directly, so that a resumed training needs no state.
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

_MAX_DENOMINATOR = 1 << 30
"""Of a share, so that its product with a place fits into 64 bits. Ratios of integers below it are exact."""


@dataclass(frozen=True)
class Interleaving:
    """An infinite sequence of source indices."""

    shares: tuple[Fraction, ...]
    """Relative; the first is the most exact."""
    seed: int = 0
    """Decides the phases."""

    @cached_property
    def _steps(self) -> list[tuple[int, int, int]]:
        """For each source but the last: numerator and denominator of its share of what the earlier ones leave, and phase * denominator."""
        import numpy as np

        rng = np.random.default_rng([self.seed, len(self.shares)])
        remaining = sum(self.shares, Fraction(0))
        steps = []
        for share in self.shares[:-1]:
            part = (share / remaining).limit_denominator(_MAX_DENOMINATOR)
            steps.append((part.numerator, part.denominator, int(rng.integers(part.denominator))))
            remaining -= share
        return steps

    def assign(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For places start..stop-1 (below 2**32): the source index, and the number of earlier places of the same source; both [stop - start]."""
        import numpy as np

        place = np.arange(start, stop, dtype=np.int64)
        source = np.full(stop - start, len(self.shares) - 1, np.int64)
        ordinal = np.zeros(stop - start, np.int64)
        undecided = np.arange(stop - start)
        for index, (numerator, denominator, phase) in enumerate(self._steps):
            before = (numerator * place + phase) // denominator
            mine = (numerator * (place + 1) + phase) // denominator > before
            source[undecided[mine]] = index
            ordinal[undecided[mine]] = before[mine]
            place, undecided = (place - before)[~mine], undecided[~mine]
        ordinal[undecided] = place
        return source, ordinal


def row_indices(ordinals: NDArray[np.int64], size: int, key: Sequence[int], *, shuffle: bool) -> NDArray[np.int64]:
    """The row of a source of `size` rows at each of its places: pass after pass over all rows, each pass in an order of its own."""
    import numpy as np

    passes, rows = np.divmod(ordinals, size)
    if shuffle:
        for number in np.unique(passes):
            order = np.random.default_rng([*key, int(number)]).permutation(size)
            rows[passes == number] = order[rows[passes == number]]
    return rows
