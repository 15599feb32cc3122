"""The public Python API: frozen names, and the same results as the command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from models import BY_NAME, make, save

import hf_grow


def test_the_public_names_are_these() -> None:
    assert hf_grow.__all__ == [
        "EWC", "L2SP", "METHODS", "SI", "ExecutionError", "GrowConfig", "GrowError", "GrowTrainer", "GrowthPlan", "Guarantee", "InputError",
        "OnlineEWC", "OutputError", "PlanError", "Report", "Result", "SourceError", "VerificationError", "__version__", "grow", "grow_model", "grow_optimizer", "plan", "push", "train", "verify",
    ]  # fmt: skip
    assert all(getattr(hf_grow, name) is not None for name in hf_grow.__all__)
    assert dir(hf_grow) == sorted(hf_grow.__all__)
    with pytest.raises(AttributeError, match="no attribute 'grwo'"):
        hf_grow.grwo  # noqa: B018


def test_importing_it_loads_nothing_heavy() -> None:
    code = "import sys, hf_grow; sys.exit(bool({'torch', 'transformers', 'pydantic', 'numpy', 'huggingface_hub'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=300).returncode == 0


def test_plan_grow_and_verify_from_python(tmp_path: Path) -> None:
    source = save(make(BY_NAME["qwen3"]), tmp_path / "source")
    plan = hf_grow.plan(source, "identity", layers_to=6)
    assert plan.guarantee.lossless
    result = hf_grow.grow(source, tmp_path / "out", "identity", layers_to=6)
    assert result.nbytes >= plan.nbytes
    report = hf_grow.verify(source, tmp_path / "out")
    assert report.ok
    assert report.metrics["logit_difference_max"] == 0


def test_wrong_calls_raise_input_errors_that_list_every_mistake(tmp_path: Path) -> None:
    source = save(make(BY_NAME["llama"]), tmp_path / "source")
    with pytest.raises(hf_grow.InputError, match="Methods: dus"):
        hf_grow.plan(source, "nonsense")
    with pytest.raises(hf_grow.InputError, match="2 mistakes"):
        hf_grow.plan(source, "dus", layer_to=6, noise="much")
    with pytest.raises(hf_grow.PlanError, match="Nearest layer counts"):
        hf_grow.plan(source, "dus", layers_to=7)
    with pytest.raises(hf_grow.SourceError):
        hf_grow.grow(tmp_path / "none", tmp_path / "out")


def test_growing_in_memory_keeps_the_generation_settings() -> None:
    """A chat model ends at several tokens; a config names one, and generate() would run on past the others."""
    model = make(BY_NAME["llama"])
    model.generation_config.eos_token_id = [2, 7]
    model.generation_config.temperature = 0.3
    grown = hf_grow.grow_model(model, hf_grow.plan(model, "identity", at="1"))
    assert grown.generation_config.to_dict() == model.generation_config.to_dict()
    grown.generation_config.eos_token_id.append(9)
    assert model.generation_config.eos_token_id == [2, 7]
