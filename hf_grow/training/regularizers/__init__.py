"""Penalties that keep a model near what it was: EWC, online EWC, SI, L2-SP. One formula, four kinds of importance; see docs/regularizers.md."""

from __future__ import annotations

from hf_grow.training.regularizers.make import make_penalty, penalty_bytes
from hf_grow.training.regularizers.options import PenaltyOptions
from hf_grow.training.regularizers.penalty import Penalty, Quadratic
from hf_grow.training.regularizers.si import SynapticIntelligence

__all__ = ["Penalty", "PenaltyOptions", "Quadratic", "SynapticIntelligence", "make_penalty", "penalty_bytes"]
