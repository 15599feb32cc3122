"""Options of self-replay: how text is sampled from a model, and which of it is kept."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from hf_grow.options import Count, Excludes, Options, Requires


class ReplayOptions(Options):
    """How text is sampled from a model, and which of it is kept."""

    tokens: Count = Field(default=1_000_000, gt=0)
    """Tokens of text to keep; more can be added later."""
    temperature: float = Field(default=1.0, gt=0, le=10)
    """Softmax temperature; below 1 the text is more predictable, above 1 more varied."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling: sample from the most likely tokens whose probabilities add up to this."""
    top_k: int = Field(default=0, ge=0)
    """Sample from this many most likely tokens; 0 for all."""
    max_length: int | None = Field(default=None, ge=2)
    """Maximum tokens per text, limited by the model's context length. Default: seq_length of the training (of the command: 1024)."""
    batch_size: int | None = Field(default=None, gt=0)
    """Texts sampled at once; larger is faster, within memory. Other texts result from another batch size. Default: 32,768 tokens' worth, at most 64."""
    chat_share: float | None = Field(default=None, ge=0, le=1)
    """Fraction of the tokens that are conversations, sampled through the chat template. Default: 0.5 if the model ends its texts as the template ends an answer, else 0."""
    start: Annotated[Literal["document", "random"], Excludes("prompts")] = "document"
    """Start plain texts with the token that precedes documents (BOS, else EOS, but no token of a chat template), or with a random token, for models that otherwise repeat themselves."""
    prompts: str | None = None
    """Folder, file or glob of texts; samples continue their first tokens."""
    prompt_tokens: Annotated[int, Field(gt=0), Requires("prompts")] = 8
    """Tokens taken from the start of each prompt."""
    seed: int = Field(default=0, ge=0)
    """Random seed of the sampling."""
    min_tokens: int = Field(default=16, ge=0)
    """Drop shorter texts."""
    max_repetition: float = Field(default=0.5, ge=0, le=1)
    """Drop texts in which more than this fraction of the 4-grams (of tokens) occurred earlier in the same text."""
    max_compression: float = Field(default=8.0, gt=1)
    """Drop texts with a higher zlib compression ratio."""
    max_surprise: float | None = Field(default=None, gt=0)
    """Drop texts whose nats per token differ from the median of the first batch by more than this many standard deviations. Default: off."""
    engine: Literal["auto", "transformers", "vllm"] = "transformers"
    """What generates; texts differ between engines. vllm: vLLM, much faster on a GPU, in one process; auto: vLLM where it is installed, else transformers."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the computation. Default: the model's own (auto)."""

    def identity(self) -> dict[str, Any]:
        """All options as JSON data, for records and names of caches; the engine only if it is not transformers, the only one that earlier versions had."""
        return self.model_dump(mode="json", exclude={"engine"} if self.engine == "transformers" else None)
