"""Growth methods: pure functions from an architecture and options to a Growth. METHODS is the one list of them."""

from __future__ import annotations

from hf_grow.growth.growth import Method
from hf_grow.methods.depth import DEPTH_METHODS
from hf_grow.methods.experts.expert_methods import EXPERTS
from hf_grow.methods.hybrid import HYBRID
from hf_grow.methods.width.width_methods import WIDTH_METHODS

METHODS: dict[str, Method] = {m.name: m for m in (*DEPTH_METHODS, *WIDTH_METHODS, HYBRID, EXPERTS)}
