"""Options of expert growth, and the files they name: router prompts and expert utility.

The files are read when options are parsed, and growth.json records their content, so that a growth can be repeated without them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from hf_grow.common.safe_files import parse_json, read_bytes
from hf_grow.errors import InputError, SourceError
from hf_grow.methods.experts.prompts import PromptsFile, load_prompts
from hf_grow.options import Count, LayerList, Options

MAX_EXPERTS = 1024

Positive = Annotated[int, Field(ge=1, le=MAX_EXPERTS)]
Share = Annotated[float, Field(ge=0)]


def _prompts(value: Any) -> Any:
    try:
        return load_prompts(Path(value)) if isinstance(value, str) else value
    except InputError as error:
        raise ValueError(error.message) from None


def _utility(value: Any) -> Any:
    """A JSON file or its content: one number per expert, or one such list per layer; bare or under the key `utility`."""
    if isinstance(value, str):
        try:
            value = parse_json(read_bytes(Path(value)), value)
        except SourceError as error:
            raise ValueError(error.message) from None
    if isinstance(value, Mapping):
        value = value.get("utility")
    rows = value if isinstance(value, list | tuple) and value and isinstance(value[0], list | tuple) else [value]
    if not all(isinstance(row, list | tuple) and row for row in rows):
        raise ValueError('the file must hold {"utility": [...]}: one number per expert, or one such list per layer')
    return tuple(tuple(row) for row in rows)


def _list(value: Any) -> Any:
    return (
        tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value
    )


class ExpertsOptions(Options):
    """Dense to MoE, or more experts."""

    experts: Annotated[int, Field(ge=2, le=MAX_EXPERTS)] | None = None
    """Number of experts of the target."""
    add: Annotated[int, Field(ge=1, le=MAX_EXPERTS)] | None = None
    """MoE source: number of experts to add."""
    to: Count | None = None
    """Total number of parameters to grow to, instead of a number of experts."""
    top_k: Positive | None = None
    """Experts per token. Default: 2 for a dense source (times the shards if fine-grained), unchanged for an MoE source."""
    init: Literal["copy", "noise", "drop", "fine-grained"] = "copy"
    """Initialization of the experts: copies of the FFN, noisy copies, copies with re-initialized units (Drop-Upcycling), or shards of it."""
    noise: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Noise for init noise, in standard deviations of each matrix."""
    drop: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Fraction of intermediate units re-initialized by init drop (r in the paper)."""
    shards: Annotated[int, Field(ge=2, le=MAX_EXPERTS)] | None = None
    """Shards of the FFN for init fine-grained (G in the paper); must divide the number of experts."""
    experts_from: Annotated[tuple[str, ...], BeforeValidator(_list)] | None = None
    """Dense checkpoints (comma-separated folders or Hub ids) of the source's shape. Dense source: their FFNs become experts, all else is averaged
    (Branch-Train-MiX). MoE source: their FFNs become the new experts."""
    weights: Annotated[tuple[Share, ...], BeforeValidator(_list)] | None = None
    """Dense source with --experts-from: weights of the average, the source first, such as 2,1,1. Default: equal."""
    shared_expert: Literal["half", "zero"] = "half"
    """For families with a shared expert (qwen2_moe): it contributes half of the FFN's output, or zero (zero down_proj)."""
    router: Literal["normal", "zeros", "orthogonal", "prompts", "cheap-embed"] = "normal"
    """New router rows: normal or orthogonal with router_std, zeros (all tokens go to the same experts, and the router gets no gradient at first),
    or directions from --prompts, by hidden states (prompts) or embeddings (cheap-embed)."""
    router_std: Annotated[float, Field(gt=0, le=1)] = 0.02
    """Standard deviation of new router rows; orthogonal and prompt rows are scaled to the same length."""
    prompts: Annotated[PromptsFile, BeforeValidator(_prompts)] | None = None
    """YAML file with positive and negative texts for each new expert, for router prompts and cheap-embed."""
    prompt_pooling: Literal["mean", "last"] = "mean"
    """Representation of a prompt: mean over its tokens, or its last token."""
    copy_from: LayerList | None = None
    """MoE source: experts to copy for the new ones in turn, such as 0,3,5. Default: all."""
    utility: Annotated[tuple[tuple[Share, ...], ...], BeforeValidator(_utility)] | None = None
    """MoE source: JSON file with one number per expert (or one list per layer); experts are copied in proportion to it."""
    router_noise: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Noise on the router rows of copied experts, in standard deviations of the router; breaks ties. 0.001 in Expert Upcycling."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of everything random."""

    def extra_sources(self) -> tuple[str, ...]:
        return self.experts_from or ()
