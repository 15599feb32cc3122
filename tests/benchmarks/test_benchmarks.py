"""The benchmarks run, and their tables have the command. Times are not tested."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

FOLDER = Path(__file__).parents[2] / "benchmarks"


def run(script: str, *arguments: str | Path) -> str:
    done = subprocess.run([sys.executable, FOLDER / script, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmark") / "tiny"
    run("generate.py", "tiny", folder)
    return folder


def test_every_benchmark_can_be_imported() -> None:
    """They are rarely run; this test notices renames in hf_grow."""
    code = "import importlib, sys; sys.path.insert(0, sys.argv[1]); [importlib.import_module(name) for name in sys.argv[2:]]"
    names = [path.stem for path in FOLDER.glob("*.py")]
    done = subprocess.run([sys.executable, "-c", code, FOLDER, *names], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_generated_checkpoint_loads_and_computes(tiny: Path) -> None:
    assert len(list(tiny.glob("*.safetensors"))) > 1
    model, info = AutoModelForCausalLM.from_pretrained(tiny, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16
    for name, p in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (p == 1).all(), name
        else:
            assert p.isfinite().all() and abs(p.float().std() - 0.02) < 1e-3 and abs(p.float().mean()) < 1e-3, name
    with torch.no_grad():
        assert model(torch.arange(8)[None]).logits.isfinite().all()


def test_neighbouring_tensors_differ(tiny: Path) -> None:
    layer = AutoModelForCausalLM.from_pretrained(tiny).model.layers[0].mlp
    assert not torch.equal(layer.gate_proj.weight, layer.up_proj.weight)


@pytest.mark.parametrize(
    "options",
    [
        ["--no-settle"],
        pytest.param(["--cold"], marks=pytest.mark.slow),
        pytest.param(["--method", "identity"], marks=pytest.mark.slow),
        pytest.param(["--seam-average", "1"], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_conversion_benchmark_writes_a_table_that_cites_its_command(tmp_path: Path, options: list[str]) -> None:
    scratch, results = tmp_path / "scratch", tmp_path / "results"
    printed = run("conversion.py", "--size", "tiny", "--repeats", "1", *options, "--scratch", scratch, "--results", results)
    (table,) = results.iterdir()
    text = table.read_text()
    assert str(table) in printed
    assert "`python benchmarks/conversion.py --size tiny --repeats 1 --method" in text and all(o in text for o in options)
    for row in ("| cp |", "| cp, then sync |", "| hf-grow, the conversion itself |", "| hf-grow, whole process |"):
        assert row in text
    assert "verify --structure-only` passes" in text
    assert str(tmp_path) not in text
    assert not list(scratch.iterdir())


def test_compare_finds_one_changed_value(tiny: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    run("generate.py", "tiny", other)
    run("compare.py", tiny, other)
    with sorted(other.glob("*.safetensors"))[0].open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    done = subprocess.run([sys.executable, FOLDER / "compare.py", tiny, other], capture_output=True, text=True)
    assert done.returncode == 1 and "1 of" in done.stderr
