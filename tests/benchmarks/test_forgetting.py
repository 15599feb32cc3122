"""The forgetting benchmark: how it compares trajectories, and that it runs. Measured results are not tested."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def _importable() -> Any:
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


def run(arm: str, *losses: tuple[float, float], seconds: float = 1.0, steps: int = 10, memory: int = 100) -> dict[str, Any]:
    """``losses``: (old, new) at every evaluation."""
    track = [{"step": i, "old": old, "new": new} for i, (old, new) in enumerate(losses)]
    held = {"weights": memory, "activations": 999, "total": 999 + memory}
    return {"arm": arm, "seed": 0, "trajectory": track, "steps": steps, "step_seconds": seconds, "memory": held}


def test_forgetting_is_read_where_the_new_loss_is_first_reached() -> None:
    from tradeoff import forgetting_at, points

    track = points(run("a", (3.0, 9.0), (3.2, 7.0), (3.6, 5.0), (3.4, 6.0), (3.5, 4.0)), 3.0)
    assert forgetting_at(track, 9.0) == 0.0
    assert forgetting_at(track, 8.0) == pytest.approx(0.1)  # halfway from 0 to 0.2
    assert forgetting_at(track, 5.5) == pytest.approx(0.5)  # on the way down, not when it comes back up to 6 and down again
    assert forgetting_at(track, 4.0) == pytest.approx(0.5)
    assert forgetting_at(track, 3.9) is None


def test_an_arm_is_compared_with_the_best_plain_fine_tuning_at_the_same_new_loss() -> None:
    from tradeoff import BASELINES, compare

    plain, slow, slower, fast, short = BASELINES
    runs = {
        plain: run(plain, (3.0, 9.0), (4.0, 7.0), (4.2, 5.0)),
        slow: run(slow, (3.0, 9.0), (3.4, 7.0)),
        slower: run(slower, (3.0, 9.0), (3.1, 8.5)),
        fast: run(fast, (3.0, 9.0), (5.0, 4.0)),
        short: run(short, (3.0, 9.0), (3.9, 6.0), steps=5),
        "EWC 10": run("EWC 10", (3.0, 9.0), (3.1, 7.0), (3.3, 6.5), seconds=1.5, memory=150),
        "depth: fine-tuning": run("depth: fine-tuning", (3.0, 9.0), (3.2, 6.0), (3.6, 4.0), seconds=2.0),
    }
    found = compare(runs)
    weak = found["EWC 10"]  # does not get to 5.0: compared at its own lowest, 6.5, where the hull runs from (7, 0.4) to (5, 1.2)
    assert weak.level == 6.5 and weak.rise_there == pytest.approx(0.3) and weak.plain_there == pytest.approx(0.6)
    assert weak.ratio == pytest.approx(0.5) and weak.time == 1.5 and weak.memory == 1.5
    strong = found["depth: fine-tuning"]  # gets further: compared where plain fine-tuning ended
    assert strong.level == 5.0 and strong.rise_there == pytest.approx(0.4) and strong.plain_there == pytest.approx(1.2)
    assert found[plain].ratio == pytest.approx(1.0) and found[slow].ratio == pytest.approx(1.0)
    assert found[short].ratio == pytest.approx(0.9 / 0.8) and found[short].time == 0.5  # one of the five, and above their hull


def test_no_ratio_where_nothing_was_forgotten() -> None:
    from tradeoff import BASELINES, compare, relative_forgetting

    runs = {name: run(name, (3.0, 9.0), (2.9, 7.0)) for name in BASELINES}
    assert compare(runs)[BASELINES[0]].ratio == float("inf")
    assert relative_forgetting(runs[BASELINES[0]], runs[BASELINES[1]]) is None


def test_every_arm_is_a_valid_recipe_and_declares_whether_it_needs_old_text() -> None:
    from arms import ARMS
    from stage import QUICK, Stage
    from tradeoff import BASELINES
    from tradeoff_table import PAIRS

    from hf_grow.training.config.train_config import read_recipe

    stage = Stage(QUICK, 0, Path("/nowhere"))
    for name, arm in ARMS.items():
        recipe = arm.recipe(stage)
        assert not read_recipe(recipe, name).mistakes, name
        named = json.dumps({k: v for k, v in recipe.items() if k != "data"}) + json.dumps(recipe["data"].get("replay", ""))
        assert arm.old_data == any(word in named for word in ("fisher-old", "fisher-mapped", "fisher-si", "old.jsonl")), name
    assert {*BASELINES, *(n for pair in PAIRS for n in pair)} <= ARMS.keys()


@pytest.mark.slow
def test_the_benchmark_runs_resumes_and_cites_its_command(tmp_path: Path) -> None:
    def benchmark(*words: str) -> str:
        command = [sys.executable, FOLDER / "forgetting.py", "--quick", "--seeds", "1", "--threads", "1", "--results", tmp_path / "results"]
        environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*command, *words], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stderr

    words = ("--arms", "replay 5", "width: EWC", "only new", "LoRA r16, LR", "SI 10", "distillation")
    said = benchmark(*words)
    store = tmp_path / "results" / "forgetting-quick.jsonl"
    lines = [line for line in store.read_text().splitlines(keepends=True) if "timing" not in line]
    assert said.count("seed 0") == len(lines) > 12
    store.write_text("".join(lines[:-1]) + lines[-1][:40])  # killed in the middle of a line
    assert benchmark(*words).count("seed 0") == 1
    assert benchmark(*words, "--stored").count("seed 0") == 0
    table = store.with_suffix(".md").read_text()
    assert "`python benchmarks/forgetting.py --seeds 1 --threads 1 --quick --arms 'replay 5' " in table and str(tmp_path) not in table
    assert "| SI 10 | yes |" in table and store.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    wrong = subprocess.run([sys.executable, FOLDER / "forgetting.py", "--arms", "nonsense"], capture_output=True, text=True)
    assert wrong.returncode == 1 and "There is no arm 'nonsense'" in wrong.stderr and "EWC 10" in wrong.stderr
