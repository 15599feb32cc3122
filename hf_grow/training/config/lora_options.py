"""Options of LoRA (`lora`)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from hf_grow.options import Options
from hf_grow.training.config.schedules import Positive


class LoraOptions(Options):
    """LoRA on old layers; wholly new layers train fully."""

    r: Positive = 16
    """Rank."""
    alpha: Positive = 32
    """The update is scaled by alpha / r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before the low-rank update."""
    target_modules: list[str] | None = None
    """Linear layers with an update, by the last part of their names. Default: all of the blocks."""
    new_in_full: bool = True
    """Train wholly new blocks fully, without LoRA."""
