"""Options of the width methods."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from hf_grow.methods.width.width_maps import Symmetry
from hf_grow.options import Options, ParameterCount

Positive = Annotated[int, Field(ge=1, le=2**20)]
"""A size: many times that of any model, and few enough to be counted through."""


class WidthOptions(Options):
    """What every width method takes."""

    to: ParameterCount | None = None
    """Number of parameters to grow to, such as 13B: all widths by one factor, as near as they get."""
    factor: Annotated[float, Field(ge=1, le=64)] | None = None
    """Grow hidden, FFN and heads by this factor."""
    hidden: Positive | None = None
    """New hidden_size."""
    intermediate: Positive | None = None
    """New intermediate_size (Mixtral: that of each expert)."""
    expert_intermediate: Positive | None = None
    """New moe_intermediate_size, for families that have both."""
    shared_intermediate: Positive | None = None
    """New shared_expert_intermediate_size, for families with a shared expert."""
    heads: Positive | None = None
    """New number of query heads."""
    kv_heads: Positive | None = None
    """New number of key/value heads."""
    head_dim: Positive | None = None
    """New size of a head. Default: kept."""
    ffn: Literal["auto", "null", "copies"] = "auto"
    """New FFN units: null (random in, zero out) or copies. Default: null below 2x, copies from there on."""
    new_heads: Literal["split", "null"] = "split"
    """Spare query heads: copies that share o_proj (split), or null heads with zero o_proj columns."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of everything random."""


class ExactOptions(WidthOptions):
    rms_mode: Literal["scale", "eps"] = "scale"
    """Where sizes are no whole factor: scale what writes the residual stream, or rms_norm_eps."""
    symmetry: Symmetry = "split"
    """How copies are told apart, without changing the function: an elementwise-random split, noise that adds up to zero, or none (locked for good)."""
    strength: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Size of that split (as a share of each weight) or noise (in standard deviations); 0.1 where optimizer state is carried along."""


class LemonOptions(ExactOptions):
    rms_mode: Literal["scale", "eps"] = "eps"
    """Where sizes are no whole factor: scale what writes the residual stream, or rms_norm_eps."""


class HyperCloningOptions(WidthOptions):
    noise_db: Annotated[float, Field(ge=0, le=120)] | None = None
    """Signal to noise ratio of noise with opposite signs in the copies, such as 10. Default: no noise, as the paper's symmetric cloning."""


class CopyOptions(WidthOptions):
    ffn: Literal["auto", "null", "copies"] = "copies"
    """New FFN units: copies, as the paper, or null."""


class AkiOptions(CopyOptions):
    fixed_kv: bool = False
    """AKI-Pro (AquilaMoE, arXiv 2408.06567): keep the number of kv heads and grow query heads inside their groups."""
    lossless: bool = False
    """Not as published: only what new heads and FFN units read comes from the next layer, and nothing reads them yet; the hidden state as in tile."""
