"""Several growths as one map: dense -> experts -> width -> depth, against the same steps one by one, and on a frozen batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from exact import logits
from models import BY_NAME, make, save, tokens

from hf_grow import api
from hf_grow.cli import main
from hf_grow.convert.in_memory import disk_tensors, grow_model
from hf_grow.errors import InputError, PlanError

STEPS: list[dict[str, Any]] = [
    {"method": "experts", "experts": 4, "init": "copy"},
    {"method": "tile", "factor": 2, "seed": 3},
    {"method": "identity", "layers_to": 6},
]


@pytest.mark.parametrize("name", ["llama", "mistral-tied", "qwen2", "qwen3-tied"])
def test_the_four_phases_keep_the_function_one_by_one_and_in_one_map(name: str, exact_math: None) -> None:
    """dense -> experts -> width -> depth; every transition on the same frozen tokens."""
    model = make(BY_NAME[name], dtype=torch.float64)
    ids = tokens(model)
    before = logits(model, ids)
    stage = model
    for step in STEPS:
        options = {k: v for k, v in step.items() if k != "method"}
        stage = grow_model(stage, api.plan(stage, step["method"], **options))
        assert (logits(stage, ids) - before).abs().max() < 1e-10
    plan = api.plan(model, "pipeline", steps=STEPS)
    assert plan.growth.method == "experts+tile+identity"
    assert plan.growth.options == {"steps": [{k: v for k, v in s.items() if v not in ("copy",)} for s in STEPS]}
    assert plan.guarantee.lossless
    one = grow_model(model, plan)
    assert (logits(one, ids) - before).abs().max() < 1e-10
    # What draws no random numbers is the very tensor of the stages (noise has names of its own in a composed plan).
    mine, theirs = disk_tensors(one), disk_tensors(stage)
    assert mine.keys() == theirs.keys()
    plain = [n for n in mine if "layernorm" in n or n == "model.norm.weight" or "embed" in n]
    assert len(plain) > 12
    assert all(torch.allclose(mine[n], theirs[n], atol=1e-12) for n in plain)


def test_without_noise_one_map_is_the_product_of_its_steps_bit_for_bit() -> None:
    model = make(BY_NAME["llama"])
    steps = [
        {"method": "experts", "experts": 3, "router": "zeros"},
        {"method": "dus", "drop": 1},
        {"method": "tile", "factor": 2, "symmetry": "none"},
    ]
    stage = model
    for step in steps:
        stage = grow_model(stage, api.plan(stage, step["method"], **{k: v for k, v in step.items() if k != "method"}))
    one = disk_tensors(grow_model(model, api.plan(model, "pipeline", steps=steps)))
    assert all(torch.equal(one[n], t) for n, t in disk_tensors(stage).items())


def test_a_mixture_grows_on_in_depth_and_width(exact_math: None) -> None:
    model = make(BY_NAME["qwen2_moe-mixed"], dtype=torch.float64)
    steps = [{"method": "experts", "experts": 6, "top_k": 4}, {"method": "tile", "hidden": 96, "heads": 12, "kv_heads": 4, "expert_intermediate": 30,
                                                             "shared_intermediate": 40, "intermediate": 60}]  # fmt: skip
    plan = api.plan(model, "pipeline", steps=steps)
    assert plan.guarantee.lossless
    assert (plan.architecture.size("shared_inter"), plan.architecture.size("expert_inter")) == (40, 30)
    ids = tokens(model)
    assert (logits(grow_model(model, plan), ids) - logits(model, ids)).abs().max() < 1e-10


def test_a_recipe_of_steps_runs_and_verifies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save(make(BY_NAME["llama"], dtype=torch.bfloat16), tmp_path / "source", sharded=True)
    recipe = tmp_path / "recipe.yaml"
    lines = "".join(f"  - {{{', '.join(f'{k}: {v}' for k, v in s.items())}}}\n" for s in STEPS)
    recipe.write_text(f"source: {source}\nsteps:\n{lines}output: {tmp_path / 'out'}\n")
    assert main(["grow", str(recipe)]) == 0
    assert "experts+tile+identity" in capsys.readouterr().out
    assert api.verify(source, tmp_path / "out").ok


WRONG = {
    "no method": ([{"factor": 2}], "a step is"),
    "unknown option": ([{"method": "tile", "facto": 2}], "facto: unknown key"),
    "no steps": ([], "at least 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_steps_are_told(case: str) -> None:
    steps, words = WRONG[case]
    with pytest.raises(InputError, match=words):
        api.plan(make(BY_NAME["llama"]), "pipeline", steps=steps)


def test_a_step_that_does_not_fit_is_named() -> None:
    with pytest.raises(PlanError, match=r"Step 2 \(experts\).*not a growth"):
        api.plan(make(BY_NAME["llama"]), "pipeline", steps=[{"method": "experts", "experts": 4}, {"method": "experts", "experts": 3}])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model of `hf-grow demo --quick`: trained for seconds on real text, with its tokenizer."""
    from hf_grow.cli import main

    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(folder / "cache"))
        assert main(["demo", "--quick", "--output", str(folder / "demo")]) == 0
    return folder / "demo" / "small"


@pytest.mark.slow
def test_each_transition_of_a_trained_model_keeps_a_frozen_batch(trained: Path, tmp_path: Path) -> None:
    """dense -> experts -> width -> depth on disk, in fp32: to 1e-5 of the largest logit after every step, and in one pass."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(trained)("The following example shows how a list can be sorted.", return_tensors="pt")["input_ids"]
    before = logits(AutoModelForCausalLM.from_pretrained(trained), ids)
    source = trained
    for number, step in enumerate(STEPS):
        api.grow(source, tmp_path / str(number), step["method"], **{k: v for k, v in step.items() if k != "method"})
        source = tmp_path / str(number)
        off = (logits(AutoModelForCausalLM.from_pretrained(source), ids) - before).abs().max() / before.abs().max()
        assert off < 1e-5, step
    api.grow(trained, tmp_path / "one", "pipeline", steps=STEPS)
    off = (logits(AutoModelForCausalLM.from_pretrained(tmp_path / "one"), ids) - before).abs().max() / before.abs().max()
    assert off < 1e-5
