"""What a sampled text is, and whether it is worth keeping."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_grow.training.config.replay_options import ReplayOptions

_NGRAM = 4
_BROKEN = 0.05
"""Part of the characters that may be U+FFFD, which stands for bytes that are no text."""


@dataclass(frozen=True)
class Sample:
    text: str
    """A conversation with all that its template writes."""
    ids: tuple[int, ...]
    """All tokens, the one it started with included."""
    tokens: int
    """That the model drew, without those that stand for no text (BOS, EOS)."""
    frame: str = "document"
    """document, cut (it had no end when it was as long as a text may be), or verbatim (a conversation; has an end if it was not cut)."""
    cut: bool = False
    surprise: float | None = None
    """Nats a token under the model at temperature 1."""
    said: str | None = None
    """Of a conversation: what the model drew, without the template."""

    @property
    def own(self) -> str:
        return self.text if self.said is None else self.said


def fault(sample: Sample, options: ReplayOptions, special: Collection[int], middle: tuple[float, float] | None) -> str | None:
    """Why a text is dropped, or None. `special`: tokens that stand for no text; `middle`: median and spread of nats a token."""
    if sample.tokens < max(1, options.min_tokens):
        return "short"
    if sample.own.count("\ufffd") > _BROKEN * len(sample.own):
        return "broken"
    if repetition([i for i in sample.ids if i not in special]) > options.max_repetition:
        return "repetition"
    if compression(sample.own) > options.max_compression:
        return "compression"
    if options.max_surprise is not None and sample.surprise is not None and middle is not None:
        median, spread = middle
        if abs(sample.surprise - median) > options.max_surprise * spread:
            return "surprise"
    return None


def repetition(ids: Sequence[int]) -> float:
    """Part of the 4-grams that stood earlier in the same text: 0 for a text of distinct ones, towards 1 for a loop."""
    grams = [tuple(ids[n : n + _NGRAM]) for n in range(len(ids) - _NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def compression(text: str) -> float:
    """How many times smaller zlib makes it: about 2 for a page of prose, 3 to 4 for code."""
    data = text.encode(errors="replace")
    return len(data) / len(zlib.compress(data)) if data else 0.0
