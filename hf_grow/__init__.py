"""hf-grow: grow a trained checkpoint into a larger one, and go on training it.

    import hf_grow

    plan = hf_grow.plan("mistralai/Mistral-7B-v0.1", "dus", to="10.7B")     # config and headers only
    hf_grow.grow("mistralai/Mistral-7B-v0.1", "Mistral-10.7B", "dus", to="10.7B")
    report = hf_grow.verify("mistralai/Mistral-7B-v0.1", "Mistral-10.7B")
    larger = hf_grow.grow_model(model, hf_grow.plan(model, "identity", layers_to=40))

Importing this loads nothing; torch and transformers come with the first call that needs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hf_grow._version import __version__

if TYPE_CHECKING:
    from hf_grow.api import grow, plan, push, train, verify
    from hf_grow.checkpoint.writer import Result
    from hf_grow.convert.in_memory import grow_model
    from hf_grow.errors import ExecutionError, GrowError, InputError, OutputError, PlanError, SourceError, VerificationError
    from hf_grow.growth.growth import Guarantee
    from hf_grow.growth.plan import GrowthPlan
    from hf_grow.methods import METHODS
    from hf_grow.training.config.regularizers import EWC, L2SP, SI, OnlineEWC
    from hf_grow.training.grow_config import GrowConfig
    from hf_grow.training.grow_trainer import GrowTrainer
    from hf_grow.training.growth_state.grow_optimizer import grow_optimizer
    from hf_grow.verification import Report

_HOMES = {
    **dict.fromkeys(("grow", "plan", "push", "train", "verify"), "hf_grow.api"),
    **dict.fromkeys(
        ("ExecutionError", "GrowError", "InputError", "OutputError", "PlanError", "SourceError", "VerificationError"), "hf_grow.errors"
    ),
    "Result": "hf_grow.checkpoint.writer",
    "Guarantee": "hf_grow.growth.growth",
    "grow_model": "hf_grow.convert.in_memory",
    "METHODS": "hf_grow.methods",
    "GrowthPlan": "hf_grow.growth.plan",
    "Report": "hf_grow.verification",
    **dict.fromkeys(("EWC", "L2SP", "SI", "OnlineEWC"), "hf_grow.training.config.regularizers"),
    "grow_optimizer": "hf_grow.training.growth_state.grow_optimizer",
    "GrowConfig": "hf_grow.training.grow_config",
    "GrowTrainer": "hf_grow.training.grow_trainer",
}

__all__ = [
    "EWC",
    "L2SP",
    "METHODS",
    "SI",
    "ExecutionError",
    "GrowConfig",
    "GrowError",
    "GrowTrainer",
    "GrowthPlan",
    "Guarantee",
    "InputError",
    "OnlineEWC",
    "OutputError",
    "PlanError",
    "Report",
    "Result",
    "SourceError",
    "VerificationError",
    "__version__",
    "grow",
    "grow_model",
    "grow_optimizer",
    "plan",
    "push",
    "train",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hf_grow' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
