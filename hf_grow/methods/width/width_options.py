"""Options of the width methods."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from hf_grow.methods.width.width_maps import Symmetry
from hf_grow.options import Count, Options

Positive = Annotated[int, Field(ge=1, le=2**20)]
"""A size, bounded so that searches over it stay fast."""


class WidthOptions(Options):
    """Options of every width method."""

    to: Count | None = None
    """Number of parameters to grow to, such as 13B; all widths grow by about one factor."""
    factor: Annotated[float, Field(ge=1, le=64)] | None = None
    """Grow hidden, FFN and heads by this factor."""
    hidden: Positive | None = None
    """New hidden_size."""
    intermediate: Positive | None = None
    """New intermediate_size (Mixtral: of each expert)."""
    expert_intermediate: Positive | None = None
    """New moe_intermediate_size, for families that have one."""
    shared_intermediate: Positive | None = None
    """New shared_expert_intermediate_size, for families with a shared expert."""
    heads: Positive | None = None
    """New number of query heads."""
    kv_heads: Positive | None = None
    """New number of key/value heads."""
    head_dim: Positive | None = None
    """New head_dim. Default: unchanged."""
    ffn: Literal["auto", "null", "copies"] = "auto"
    """New FFN units: null (random input weights, zero output weights) or copies. Default: null below 2x, else copies."""
    new_heads: Literal["split", "null"] = "split"
    """Additional query heads: copies that share o_proj (split), or null heads with zero o_proj columns."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of everything random."""


class ExactOptions(WidthOptions):
    rms_mode: Literal["scale", "eps"] = "scale"
    """For non-integer factors: scale the writers of the residual stream, or rms_norm_eps."""
    symmetry: Symmetry = "split"
    """Symmetry breaking between copies, function-preserving: elementwise random split, noise that sums to zero, or none (copies stay equal)."""
    strength: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Size of the split (relative to each weight) or noise (in standard deviations); use 0.1 when optimizer state is grown too."""


class LemonOptions(ExactOptions):
    rms_mode: Literal["scale", "eps"] = "eps"
    """For non-integer factors: scale the writers of the residual stream, or rms_norm_eps."""


class HyperCloningOptions(WidthOptions):
    noise_db: Annotated[float, Field(ge=0, le=120)] | None = None
    """Signal-to-noise ratio in dB of noise with opposite signs in the copies, such as 10. Default: no noise (symmetric cloning)."""


class CopyOptions(WidthOptions):
    ffn: Literal["auto", "null", "copies"] = "copies"
    """New FFN units: copies, as in the paper, or null."""


class AkiOptions(CopyOptions):
    fixed_kv: bool = False
    """AKI-Pro (AquilaMoE, arXiv 2408.06567): keep the number of kv heads and add query heads to their groups."""
    lossless: bool = False
    """Lossless variant (not in the paper): input weights of new heads and FFN units come from the next layer, output weights are zero."""
