"""Options of LoRA."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from hf_grow.options import Options
from hf_grow.training.config.schedules import Positive

if TYPE_CHECKING:
    pass


class LoraOptions(Options):
    """Low-rank updates for what is old; what is wholly new trains in full."""

    r: Positive = 16
    """Rank."""
    alpha: Positive = 32
    """The update is scaled by alpha / r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before the update."""
    target_modules: list[str] | None = None
    """Linear layers that get one, by the last part of their names. Default: all of the blocks."""
    new_in_full: bool = True
    """Train wholly new blocks in full, without LoRA. Where nothing is wholly new, all is LoRA."""
