"""Options of distillation (`distill`)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from hf_grow.options import Excludes, Options, Requires
from hf_grow.training.config.schedules import Positive

SOURCE = "source"


class Teacher(Options):
    """One teacher."""

    model: str = SOURCE
    """Checkpoint folder or Hub id; `source` is the checkpoint that the model was grown from (growth.json)."""
    revision: str | None = None
    """Branch, tag or commit of a Hub repository."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Weight relative to the other teachers."""


class DistillOptions(Options):
    """Knowledge distillation."""

    teachers: list[Teacher] = Field(default=[Teacher()], min_length=1)
    """The teachers. Default: the source of the growth."""
    alpha: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Weight of the teachers in the loss; that of the text is 1 - alpha."""
    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Temperature of both distributions; the loss is multiplied by its square."""
    top_k: Positive | None = None
    """Read this many largest logits per position from a cache on disk, computed beforehand; biased: the rest of the distribution is left out.
    Default: teachers in memory, with all their logits."""
    samples: Annotated[Annotated[int, Field(ge=1, le=65_535)] | None, Excludes("top_k")] = None
    """Read this many random draws per position from such a cache instead: the mean of the gradient is that of all logits."""
    cache: Annotated[str | None, Requires("top_k", or_else="samples")] = None
    """Folder of that cache. Default: teacher-logits in the output folder."""
    cache_dtype: Annotated[Literal["float16", "float32"], Requires("top_k")] = "float16"
    """Dtype in the cache (relative to the largest logit of their position, so that half precision is enough)."""
    shard: bool | None = None
    """Shard teachers in memory over all processes, which compute their logits together. Default: as the model is (FSDP2)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype that teachers compute in. Default: auto, that of their checkpoint."""

    @property
    def cached(self) -> Literal["top_k", "samples"] | None:
        """The option by which teachers are read from a cache; None: they are in memory."""
        return "samples" if self.samples is not None else "top_k" if self.top_k is not None else None
