"""Options of self-replay: how text is sampled from a model, and which of it is kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from hf_grow.options import Excludes, Options, ParameterCount, Requires

if TYPE_CHECKING:
    pass


class ReplayOptions(Options):
    """How text is sampled from a model, and which of it is kept."""

    tokens: ParameterCount = Field(default=1_000_000, gt=0)
    """Tokens of text to keep; more can be added later."""
    temperature: float = Field(default=1.0, gt=0, le=10)
    """Below 1 the text is more usual, above 1 more varied."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the likeliest tokens that together have this probability."""
    top_k: int = Field(default=0, ge=0)
    """Sample from this many likeliest tokens; 0 for all."""
    max_length: int | None = Field(default=None, ge=2)
    """Tokens of one text at most, held to what the model can read. Default: seq_length of the training (of the command: 1024)."""
    batch_size: int | None = Field(default=None, gt=0)
    """Texts sampled at once: the more, the faster, as long as memory holds them. Part of what decides the texts. Default: 32,768 tokens' worth, at most 64."""
    chat_share: float | None = Field(default=None, ge=0, le=1)
    """Part of the tokens that are conversations, sampled through the chat template. Default: half for a model that ends its texts as the template ends an answer, else none."""
    start: Annotated[Literal["document", "random"], Excludes("prompts")] = "document"
    """Begin each plain text as a document begins (BOS, else EOS, but no token of a chat template), or with a random token: for models that then always say the same."""
    prompts: str | None = None
    """Folder, file or glob of texts whose first tokens are continued instead."""
    prompt_tokens: Annotated[int, Field(gt=0), Requires("prompts")] = 8
    """First tokens of each of these texts."""
    seed: int = Field(default=0, ge=0)
    """Decides what is drawn."""
    min_tokens: int = Field(default=16, ge=0)
    """Shorter texts are dropped."""
    max_repetition: float = Field(default=0.5, ge=0, le=1)
    """Texts in which more than this part of the 4-token sequences came before in the same text are dropped."""
    max_compression: float = Field(default=8.0, gt=1)
    """Texts that zlib makes smaller than this many times are dropped."""
    max_surprise: float | None = Field(default=None, gt=0)
    """Drop texts whose nats a token lie further than this many deviations from the median of the first batch. Default: none is dropped."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype to compute in. Default: the model's own (auto)."""
