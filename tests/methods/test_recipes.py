"""Every recipe of recipes/ through the real command: grown on a tiny model, and planned, as written, at its true size.

The true-size source is a ghost: the published config, and a weight file that has the header transformers' own model of that config asks for
and no data behind it (a sparse file). What is planned from it is what an owner of the real checkpoint sees.
"""

from __future__ import annotations

import json
import math
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from models import SIZES, make, real_config, save
from transformers import AutoModelForCausalLM

from hf_grow.cli import main
from hf_grow.cli.grow import RECIPES
from hf_grow.convert.in_memory import disk_tensors
from hf_grow.model.architecture import Architecture
from hf_grow.model.param_count import count_parameters

FOLDER = Path(__file__).parents[2] / "recipes"
PATHS = sorted(p for p in FOLDER.glob("*") if p.suffix in (".yaml", ".yml"))  # those of train/ have a test of their own
each_recipe = pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)

# config.json of the sources, as published; a recipe for a further source needs its row here.
LLAMA_2 = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "mistralai/Mistral-7B-v0.1": {
        **LLAMA_2, "model_type": "mistral", "torch_dtype": "bfloat16", "intermediate_size": 14336, "num_key_value_heads": 8,
        "max_position_embeddings": 32768, "rope_theta": 10000.0, "sliding_window": 4096},
    "meta-llama/Llama-2-7b-hf": {**LLAMA_2, "model_type": "llama", "torch_dtype": "float16"},
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": {
        **LLAMA_2, "model_type": "llama", "torch_dtype": "float32", "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
        "num_key_value_heads": 4, "max_position_embeddings": 2048},
    "HuggingFaceTB/SmolLM2-135M": {
        **LLAMA_2, "model_type": "llama", "torch_dtype": "bfloat16", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
        "rope_theta": 100000, "tie_word_embeddings": True},
    "meta-llama/Llama-3.2-3B": {
        **LLAMA_2, "model_type": "llama", "torch_dtype": "bfloat16", "vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192,
        "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072,
        "rope_theta": 500000.0, "tie_word_embeddings": True,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
                         "rope_type": "llama3"}},
    "Qwen/Qwen3-0.6B-Base": {
        "model_type": "qwen3", "torch_dtype": "bfloat16", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 32768,
        "max_window_layers": 28, "use_sliding_window": False, "sliding_window": None, "rms_norm_eps": 1e-6, "rope_theta": 1000000,
        "tie_word_embeddings": True},
}  # fmt: skip


def spread(n: int, target: int) -> list[int]:
    """LLaMA-Pro's order: n layers in groups, a new block after each."""
    after = [(k + 1) * n // (target - n) - 1 for k in range(target - n)]
    return sorted([*range(n), *after])


# recipe -> parameters before and after, layers of the target, guarantee; counted by hand from the papers' layouts
EXPECTED: dict[str, tuple[int, int, list[int], str]] = {
    "solar_10b7": (7_241_732_096, 10_731_524_096, [*range(24), *range(8, 32)], "changes the function"),
    "llama_pro_8b3": (
        6_738_415_616, 8_357_482_496, [i for k in range(8) for i in (4 * k, 4 * k + 1, 4 * k + 2, 4 * k + 3, 4 * k + 3)], "lossless"),
    "interleave_smollm2": (134_515_008, 240_717_888, [i // 2 for i in range(60)], "changes the function"),
    "stack_tinyllama": (1_100_048_384, 2_069_022_720, [*range(22), *range(22)], "changes the function"),
    "layers_qwen3": (596_049_920, 721_897_472, [*range(18), *range(10, 28)], "changes the function"),
    "upgrade_3b_7b": (3_212_749_824, 7_002_021_120, spread(28, 41), "lossless"),
    "upgrade_7b_10b": (7_241_732_096, 9_997_488_128, spread(32, 44), "lossless"),
    "upgrade_7b_13b": (7_241_732_096, 12_993_071_616, spread(32, 46), "lossless"),
}  # fmt: skip


def recipe_for(path: Path, source: Path, folder: Path, **changes: Any) -> Path:
    """The recipe with its source, and only what `changes` names, replaced."""
    data = yaml.safe_load(path.read_text())
    file = folder / path.name
    file.write_text(yaml.safe_dump({**data, "source": str(source), **changes}))
    return file


def run_json(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    status = main([*map(str, words), "--json"])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return json.loads(captured.out)


def ghost(source: str, folder: Path) -> Path:
    """A checkpoint of the true size without a weight."""
    config = CONFIGS[source]
    with torch.device("meta"):
        wanted = {n: list(t.shape) for n, t in disk_tensors(AutoModelForCausalLM.from_config(real_config(config))).items()}
    name, width = {"float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2)}[config["torch_dtype"]]
    header, at = {}, 0
    for tensor, shape in wanted.items():
        stop = at + math.prod(shape) * width
        header[tensor] = {"dtype": name, "shape": shape, "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(header).encode()
    out = folder / source.rpartition("/")[2]
    out.mkdir()
    (out / "config.json").write_text(json.dumps(config))
    with (out / "model.safetensors").open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + at)
    return out


def test_there_are_recipes_and_all_of_them_come_with_the_package() -> None:
    assert PATHS
    assert {p.stem for p in PATHS} == set(EXPECTED)
    assert {name: p.read_text() for name, p in RECIPES.items()} == {p.stem: p.read_text() for p in PATHS}


@each_recipe
def test_the_plan_at_true_size_is_the_papers(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "total used free")(1 << 50, 0, 1 << 50))
    monkeypatch.chdir(tmp_path)
    source = ghost(yaml.safe_load(path.read_text())["source"], tmp_path)
    found = run_json(capsys, "grow", recipe_for(path, source, tmp_path), "--dry-run")
    before, after, layers, guarantee = EXPECTED[path.stem]
    plan = found["plan"]
    assert plan["parameters"] == [before, after]
    assert [o[0] for o in plan["layer_map"]] == layers
    assert plan["layers"][1] == len(layers)
    assert plan["guarantee"] == guarantee
    assert found["dry_run"]
    assert not list(tmp_path.glob("*-*-*B*.partial"))


@each_recipe
def test_the_recipe_grows_a_tiny_model_that_verifies(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As many layers as the real source, so that every option of the recipe applies as written; `to` alone counts parameters, and is scaled."""
    data = yaml.safe_load(path.read_text())
    real = CONFIGS[data["source"]]
    tiny = {"model_type": real["model_type"], **SIZES, "num_hidden_layers": real["num_hidden_layers"],
            "tie_word_embeddings": real["tie_word_embeddings"]}  # fmt: skip
    source = save(make(tiny, dtype=torch.bfloat16), tmp_path / "tiny")
    layers = EXPECTED[path.stem][2]
    target = count_parameters(Architecture({**tiny, "num_hidden_layers": len(layers)})).total
    recipe = recipe_for(path, source, tmp_path, **({"to": target} if "to" in data else {}))
    out = tmp_path / "out"
    found = run_json(capsys, "grow", recipe, "-o", out)
    if data["method"] == "hybrid":  # the shape is searched, so the tiny one is another
        assert abs(found["plan"]["parameters"][1] / target - 1) <= 0.05
    else:
        assert [o[0] for o in found["plan"]["layer_map"]] == layers
    report = run_json(capsys, "verify", source, out, "--structure-only")
    assert report["ok"]
    assert {c["name"] for c in report["checks"]} >= {"tensors", "SHA-256", "source", "provenance"}


@each_recipe
def test_a_recipe_says_its_paper_and_its_guarantee(path: Path) -> None:
    text = path.read_text()
    assert "# Paper" in text
    assert f"# Guarantee  {EXPECTED[path.stem][3]}" in text


def test_a_recipe_is_found_by_its_bare_name(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = ghost("HuggingFaceTB/SmolLM2-135M", tmp_path)
    monkeypatch.setitem(RECIPES, "mine", recipe_for(RECIPES["interleave_smollm2"], source, tmp_path))
    assert run_json(capsys, "grow", "mine", "--dry-run")["output"] == "SmolLM2-135M-interleave-241M"
    assert main(["grow", "no_such_recipe"]) == 2
    assert "solar_10b7" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["grow", "--help"])
    said = "".join(capsys.readouterr().out.split())
    assert all(name in said for name in RECIPES)
