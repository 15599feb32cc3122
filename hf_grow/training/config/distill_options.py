"""Options of distillation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from hf_grow.options import Options, Requires
from hf_grow.training.config.schedules import Positive

if TYPE_CHECKING:
    pass

SOURCE = "source"


class Teacher(Options):
    """One teacher."""

    model: str = SOURCE
    """Checkpoint folder or Hub id; `source` is what the model was grown from, as its growth.json says."""
    revision: str | None = None
    """Branch, tag or commit of a Hub repository."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Its part, in relation to the other teachers' weights."""


class DistillOptions(Options):
    """Learning from the previous stage besides the text."""

    teachers: list[Teacher] = Field(default=[Teacher()], min_length=1)
    """Who teaches; by default the source of the growth."""
    alpha: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the teachers in the loss."""
    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Softens both distributions; the loss is multiplied by its square."""
    top_k: Positive | None = None
    """Take this many logits a position from a cache on disk, written beforehand. Default: teachers are in memory, with all their logits."""
    cache: Annotated[str | None, Requires("top_k")] = None
    """Folder for such logits. Default: teacher-logits in the output folder."""
    cache_dtype: Annotated[Literal["float16", "float32"], Requires("top_k")] = "float16"
    """How they are stored (below the largest logit of their position, so that half precision is fine)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What teachers compute in. Default: auto, the dtype they are stored in."""
