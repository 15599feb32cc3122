"""Sampled texts, and the filters that drop some of them."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_grow.training.config.replay_options import ReplayOptions

_NGRAM = 4
_MAX_REPLACEMENT_CHARS = 0.05
"""Fraction of the characters that may be U+FFFD, which stands for bytes that are not UTF-8."""


@dataclass(frozen=True)
class Sample:
    text: str
    """A conversation includes all that its template adds."""
    ids: tuple[int, ...]
    """All token ids, the prefix that sampling started from included."""
    tokens: int
    """Number of sampled tokens, without special ones (BOS, EOS)."""
    frame: str = "document"
    """One of replay_files.FRAMES."""
    cut: bool = False
    """Whether it reached the maximum length before its end."""
    surprise: float | None = None
    """Mean negative log-likelihood under the model at temperature 1, in nats per token."""
    generated: str | None = None
    """Of a conversation: what the model generated, without the template."""


def drop_reason(sample: Sample, options: ReplayOptions, special: Collection[int], surprise_stats: tuple[float, float] | None) -> str | None:
    """Which filter drops a sample ('short', 'broken', 'repetition', 'compression' or 'surprise'), or None.

    ``special``: ids that the n-grams leave out. ``surprise_stats``: median and spread of nats per token, see `Sampler.surprise`.
    """
    text = sample.text if sample.generated is None else sample.generated
    if sample.tokens < max(1, options.min_tokens):
        return "short"
    if text.count("\ufffd") > _MAX_REPLACEMENT_CHARS * len(text):
        return "broken"
    if repetition([i for i in sample.ids if i not in special]) > options.max_repetition:
        return "repetition"
    if compression(text) > options.max_compression:
        return "compression"
    if options.max_surprise is not None and sample.surprise is not None and surprise_stats is not None:
        median, spread = surprise_stats
        if abs(sample.surprise - median) > options.max_surprise * spread:
            return "surprise"
    return None


def repetition(ids: Sequence[int]) -> float:
    """Fraction of the 4-grams that occurred earlier in the same text: 0 if all are distinct, towards 1 for a loop."""
    grams = [tuple(ids[n : n + _NGRAM]) for n in range(len(ids) - _NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def compression(text: str) -> float:
    """zlib compression ratio: about 2 for a page of prose, 3 to 4 for code."""
    data = text.encode(errors="replace")
    return len(data) / len(zlib.compress(data)) if data else 0.0


def dedup_key(text: str) -> bytes:
    """A hash, equal for texts that differ only in white space."""
    return hashlib.sha256(" ".join(text.split()).encode()).digest()
