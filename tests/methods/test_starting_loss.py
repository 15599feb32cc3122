"""What plans and cards say of the loss right after a growth is what was measured, in the one table that the documents hold too."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from grown import SMOLLM2_135M, growth_of
from models import BY_NAME, make, save

from hf_grow.cli import main
from hf_grow.demo.small_model import build_tokenizer
from hf_grow.growth.growth import Growth
from hf_grow.methods import METHODS
from hf_grow.methods.starting_loss import MODEL, SOURCE_LOSS, STARTING_LOSSES, VOCABULARY, StartingLoss, nearest_starting_loss
from hf_grow.model.architecture import Architecture

SMOL = Architecture(SMOLLM2_135M)
ROOT = Path(__file__).parents[2]
RESULTS = (ROOT / "benchmarks" / "results" / "starting-loss.md").read_text()
each_start = pytest.mark.parametrize("start", STARTING_LOSSES, ids=lambda s: s.how)


@each_start
def test_a_figure_is_that_of_the_benchmark_and_of_the_documents(start: StartingLoss) -> None:
    row = next(line for line in RESULTS.splitlines() if line.startswith(f"| `{start.how}` |"))
    cells = [c.strip() for c in row.strip("|").split("|")]
    assert cells[2] == "changes the function"
    assert (cells[3], cells[6]) == (f"{start.prose:+.2f}", f"{start.code:+.2f}")
    assert f"| `{start.how}` | {start.prose:+.2f} | {start.code:+.2f} |" in (ROOT / "docs" / "methods.md").read_text()


def test_the_source_is_that_of_the_benchmark() -> None:
    assert RESULTS.startswith(f"# The loss right after growing {MODEL}\n")
    assert f"{SOURCE_LOSS:.2f}" == f"{float(re.findall(r'source.s loss is ([0-9.]+) on prose', RESULTS)[0]):.2f}"
    assert SMOL.size("vocab") == VOCABULARY


@each_start
def test_a_growth_is_told_its_own_measurement(start: StartingLoss) -> None:
    """The command of every measurement, planned on the shapes that it was made on."""
    words = start.how.split()
    options: dict[str, Any] = {}
    for flag, value in zip(words[1::2], words[2::2], strict=True):
        options[flag.removeprefix("--").replace("-", "_")] = float(value) if re.fullmatch(r"[\d.]+", value) else value
    options = {k: int(v) if isinstance(v, float) and v == int(v) and k not in ("drop", "factor") else v for k, v in options.items()}
    assert nearest_starting_loss(growth_of(SMOLLM2_135M, words[0], **options), SMOL) == start


def test_lossless_growths_and_unmeasured_ones_are_told_nothing() -> None:
    ways: list[Growth] = [
        growth_of(SMOLLM2_135M, "identity"),
        growth_of(SMOLLM2_135M, "tile", factor=2),
        growth_of(SMOLLM2_135M, "aki", factor=2, lossless=True),
        growth_of(SMOLLM2_135M, "layers", layers="0-29,3"),
    ]
    mixture = Architecture(BY_NAME["mixtral"].config)
    more = METHODS["experts"].build(mixture, METHODS["experts"].options(experts=6))
    assert [nearest_starting_loss(way, SMOL) for way in ways] == [None] * 4
    assert nearest_starting_loss(more, mixture) is None and not more.guarantee.lossless


def test_the_nearest_measurement_is_taken() -> None:
    near = nearest_starting_loss(growth_of(SMOLLM2_135M, "experts", experts=4, init="drop", drop=0.45), SMOL)
    assert near is not None and near.how.endswith("--drop 0.5")
    assert near.is_chance_level and "untrained" in str(near)
    small = nearest_starting_loss(growth_of(SMOLLM2_135M, "dus", layers_to=34), SMOL)
    assert small is not None and not small.is_chance_level


def test_twice_the_layers_by_dus_is_the_stack_and_far_growths_are_told_nothing() -> None:
    twice = nearest_starting_loss(growth_of(SMOLLM2_135M, "dus", layers_to=60), SMOL)
    assert twice is not None and twice.how == "stack"
    for far in (
        growth_of(SMOLLM2_135M, "dus", layers_to=56),
        growth_of(SMOLLM2_135M, "interleave", layers_to=240),
        growth_of(SMOLLM2_135M, "aki", factor=3),
    ):
        assert nearest_starting_loss(far, SMOL) is None


def test_plan_dry_run_and_json_tell_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save(make(BY_NAME["llama"]), tmp_path / "model")
    assert main(["depth", str(source), "--method", "stack", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert str(next(s for s in STARTING_LOSSES if s.kind == "stack")) in said
    assert "guidance only" in said
    assert main(["depth", str(source), "--method", "identity", "--dry-run"]) == 0
    assert MODEL not in capsys.readouterr().out
    assert main(["depth", str(source), "--method", "stack", "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["plan"]["starting_loss"]
    assert (told["model"], told["how"], told["prose"]) == (MODEL, "stack", 4.92)
    assert main(["plan", str(source), "--to", "120K"]) == 0
    said = capsys.readouterr().out
    assert "+4.9 nats" in said and "lossless" in said and "one model, guidance only" in said


@pytest.mark.slow  # two processes that load torch and transformers
def test_the_benchmark_measures_goes_on_and_writes_its_table(tmp_path: Path) -> None:
    """On a tiny model with a tokenizer: lossless is zero, what changes the function is not, and a second run computes nothing anew."""
    source = save(make(BY_NAME["llama"], vocab_size=300), tmp_path / "model")
    build_tokenizer(("every text has words in it", "def words(text): return text.split()"), 300).save_pretrained(source)
    command = [sys.executable, ROOT / "benchmarks" / "starting_loss.py", source, "--tokens", "64", "--length", "32", "--only", "identity", "stack", "--results", tmp_path]  # fmt: skip
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "starting-loss.jsonl").read_text().splitlines()]
    assert [row["method"] for row in rows] == ["stack", "identity"]
    rise = {row["method"]: abs(row["measured"]["prose"]["grown"] - row["measured"]["prose"]["source"]) for row in rows}
    assert rise["identity"] == 0 < rise["stack"]
    assert "| `stack` |" in (tmp_path / "starting-loss.md").read_text()
