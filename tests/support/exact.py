"""Exact arithmetic: transformers computes norms, softmax, routing and rotary angles in fp32 even where the model is fp64.

Inside `exact()` every float32 that is asked for is a float64, so that two ways of computing one function agree to about 1e-13.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel


class _Fp32IsFp64(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*map(wide, args), **{k: wide(v) for k, v in (kwargs or {}).items()})


@contextmanager
def exact() -> Iterator[None]:
    with _Fp32IsFp64():
        yield


@pytest.fixture
def exact_math() -> Iterator[None]:
    """For tests that build, load and run their models in exact arithmetic; models must be made inside, for their rotary tables."""
    with exact():
        yield


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, use_cache=False).logits
