"""Options of the Fisher estimate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from hf_grow.options import Excludes, Options, ParameterCount

if TYPE_CHECKING:
    pass


class FisherOptions(Options):
    """How the Fisher is estimated."""

    kind: Annotated[Literal["true", "empirical"], Excludes("from_growth")] = "true"
    """Labels: drawn from the model (true), or the text's own (empirical; a sequence at a time, as with --exact)."""
    exact: Annotated[bool, Excludes("from_growth")] = False
    """Square the gradient of every single sequence, not of a batch: less noise for the same tokens, more time."""
    tokens: Annotated[ParameterCount, Field(ge=1), Excludes("from_growth")] = 131_072
    """Tokens of text to use. 64 batches of 2048 are plenty; 16 will do; 4 are noisy."""
    batch: Annotated[int, Field(ge=1), Excludes("from_growth")] = 4
    """Sequences in a batch."""
    seq_length: Annotated[int, Field(ge=2), Excludes("from_growth")] = 512
    """Tokens in a sequence; at most what the model was made for."""
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float64"], Excludes("from_growth")] = "auto"
    """Dtype to compute in. Default: bfloat16 on a GPU, float32 on a CPU. Not float16: its gradients underflow and their squares overflow."""
    storage: Literal["fp32", "bf16"] = "fp32"
    """Dtype in the file."""
    seed: Annotated[int, Field(ge=0, lt=2**63), Excludes("from_growth")] = 0
    """Seed of the labels and of the choice of text."""
