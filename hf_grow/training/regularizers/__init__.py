"""Penalties that keep a model near what it was: EWC, online EWC, SI, L2-SP. One formula, four kinds of importance; see docs/regularizers.md."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hf_grow.training.config.regularizer_options import PenaltyOptions

if TYPE_CHECKING:
    from hf_grow.training.regularizers.build import make_penalty, penalty_bytes
    from hf_grow.training.regularizers.penalty import Penalty, Quadratic
    from hf_grow.training.regularizers.si import SynapticIntelligence

_HOMES = {"make_penalty": "make", "penalty_bytes": "make", "Penalty": "penalty", "Quadratic": "penalty", "SynapticIntelligence": "si"}
__all__ = ["Penalty", "PenaltyOptions", "Quadratic", "SynapticIntelligence", "make_penalty", "penalty_bytes"]


def __getattr__(name: str) -> Any:
    """A recipe is read with the options alone, without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
