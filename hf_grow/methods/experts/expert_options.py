"""The options of expert growth, and what they read from files: prompts for routers, and the utility of experts.

Files are read when the options are parsed and their content is what growth.json records, so that a growth can be run again without them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from hf_grow.common.safe_files import parse_json, read_bytes
from hf_grow.errors import InputError, SourceError
from hf_grow.methods.experts.prompts import PromptsFile, load_prompts
from hf_grow.options import LayerList, Options, ParameterCount

MAX_EXPERTS = 1024

Positive = Annotated[int, Field(ge=1, le=MAX_EXPERTS)]
Share = Annotated[float, Field(ge=0)]


def _prompts(value: Any) -> Any:
    try:
        return load_prompts(Path(value)) if isinstance(value, str) else value
    except InputError as error:
        raise ValueError(error.message) from None


def _utility(value: Any) -> Any:
    """A JSON file, or its content: a number an expert, or a list of them for each layer; bare, or under the key `utility`."""
    if isinstance(value, str):
        try:
            value = parse_json(read_bytes(Path(value)), value)
        except SourceError as error:
            raise ValueError(error.message) from None
    if isinstance(value, Mapping):
        value = value.get("utility")
    rows = value if isinstance(value, list | tuple) and value and isinstance(value[0], list | tuple) else [value]
    if not all(isinstance(row, list | tuple) and row for row in rows):
        raise ValueError('the file must hold {"utility": [...]}: a number an expert, or such a list for each layer')
    return tuple(tuple(row) for row in rows)


def _list(value: Any) -> Any:
    return (
        tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value
    )


class ExpertsOptions(Options):
    """From dense to experts, or to more experts."""

    experts: Annotated[int, Field(ge=2, le=MAX_EXPERTS)] | None = None
    """Number of experts of the target."""
    add: Annotated[int, Field(ge=1, le=MAX_EXPERTS)] | None = None
    """From a mixture: the number of experts to add."""
    to: ParameterCount | None = None
    """Total parameters to grow to, instead of a number of experts."""
    top_k: Positive | None = None
    """Experts a token passes through. Default: 2 from dense (times the shards, fine-grained); the source's from a mixture."""
    init: Literal["copy", "noise", "drop", "fine-grained"] = "copy"
    """What the experts begin as: copies of the FFN, noisy copies, copies with redrawn units (Drop-Upcycling), or shards of it."""
    noise: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Noise of init noise, in standard deviations of each matrix."""
    drop: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of intermediate units redrawn by init drop (r of the paper)."""
    shards: Annotated[int, Field(ge=2, le=MAX_EXPERTS)] | None = None
    """Shards of the FFN for init fine-grained (G of the paper); the number of experts must be a multiple."""
    experts_from: Annotated[tuple[str, ...], BeforeValidator(_list)] | None = None
    """Dense checkpoints (folders or Hub ids, with commas between) of the source's shape. From dense: each gives its FFN as an expert and all else is
    averaged (Branch-Train-MiX). From a mixture: the new experts."""
    weights: Annotated[tuple[Share, ...], BeforeValidator(_list)] | None = None
    """With --experts-from a dense source: weights of the average, the source's first, such as 2,1,1. Default: equal."""
    shared_expert: Literal["half", "zero"] = "half"
    """For families with a shared expert (qwen2_moe): it computes half of the FFN's output, or nothing yet (zero down_proj)."""
    router: Literal["normal", "zeros", "orthogonal", "prompts", "cheap-embed"] = "normal"
    """New router rows: normal or orthogonal with router_std, zeros (then every token goes to the same experts, and the router learns nothing at
    first), or directions of what the experts are for, from --prompts: hidden states (prompts) or embeddings (cheap-embed)."""
    router_std: Annotated[float, Field(gt=0, le=1)] = 0.02
    """Standard deviation of a normal router; the rows of every other one have the same length, but for zeros."""
    prompts: Annotated[PromptsFile, BeforeValidator(_prompts)] | None = None
    """YAML file of positive and negative texts for each new expert, for the routers prompts and cheap-embed."""
    prompt_pooling: Literal["mean", "last"] = "mean"
    """What stands for a prompt: the mean over its tokens, or its last token."""
    copy_from: LayerList | None = None
    """From a mixture: the experts that are copied for the new ones, such as 0,3,5, in turn. Default: all in turn."""
    utility: Annotated[tuple[tuple[Share, ...], ...], BeforeValidator(_utility)] | None = None
    """From a mixture: JSON file with a number an expert (or a list of them for each layer); the most useful are copied, and the more useful the oftener."""
    router_noise: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Noise on the router rows of copied experts, in standard deviations of the router, so that they part; 0.001 in Expert Upcycling."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of everything random."""

    def extra_sources(self) -> tuple[str, ...]:
        return self.experts_from or ()
