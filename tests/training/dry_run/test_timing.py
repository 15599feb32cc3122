"""`hf-grow train --dry-run --time`: real steps are run and told by a clock, and nothing is left behind."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from launched import FILES
from trained import grown, recipe, run, source

from hf_grow.cli import main
from hf_grow.training.dry_run import dry_run, step_time
from hf_grow.training.regularizers.penalty import QuadraticPenalty
from hf_grow.training.trainer.trainer import BaseGrowTrainer

DURATIONS = [100.0, 3.0, 1.0, 2.0, 9.0, 4.0]
"""Of each step; the first is no measurement. The median of the rest is 3."""


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[int, ...]]:
    """The shapes of the micro-batches that were trained on. A clock that says DURATIONS, and a folder of its own for what is temporary."""
    seen: list[tuple[int, ...]] = []
    real = BaseGrowTrainer.training_step

    def step(self: BaseGrowTrainer, model: Any, inputs: dict[str, Any], items: Any = None) -> Any:
        seen.append(tuple(inputs["input_ids"].shape))
        assert int(inputs["input_ids"].max()) < 64 and (inputs["labels"] == inputs["input_ids"]).all()
        return real(self, model, inputs, items)

    monkeypatch.setattr(BaseGrowTrainer, "training_step", step)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    clock_says(monkeypatch, DURATIONS)
    return seen


def clock_says(monkeypatch: pytest.MonkeyPatch, durations: list[float]) -> None:
    ends = iter([sum(durations[: i + 1]) for i in range(len(durations))])
    real = step_time.time_steps
    monkeypatch.setattr(step_time, "time_steps", lambda checked, notify: real(checked, notify, clock=lambda: next(ends)))


def everything(folder: Path) -> set[Path]:
    return {p for p in folder.rglob("*") if "source" not in p.parts}


def test_step_time_is_median_without_first_step(
    steps: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = recipe(tmp_path, grown(tmp_path), gradient_accumulation_steps=4, max_steps=50, early_stopping_patience=2, kl_rows=2)
    before = everything(tmp_path)
    found = run(capsys, "train", path, "--dry-run", "--time")
    assert steps == [(2, 16)] * 4 * len(DURATIONS)
    assert everything(tmp_path) == before
    assert found["output"] == str(tmp_path / "out")
    assert found["time"] == {
        "seconds_a_step": 3.0, "tokens_a_second": 2 * 4 * 16 / 3.0, "timed_steps": DURATIONS[1:], "seconds": 150.0,
        "leaves_out": ["reading the texts", "evaluations", "checkpoints"],
    }  # fmt: skip
    assert found["recipe"]["save_steps"] == 3 and found["recipe"]["kl_rows"] == 2
    assert "time" not in run(capsys, "train", path, "--dry-run")


def test_text_output_shows_time_after_steps(steps: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, grown(tmp_path), max_steps=4000)
    assert main(["train", str(path), "--dry-run", "--time"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said[:5]] == ["output", "model", "training", "time", "memory"]
    assert said[3].removeprefix("time").strip() == (
        "3 s per step, 11 tokens/s (median of 5): 3.3 h in all, without reading the texts, evaluations, checkpoints"
    )


def test_slow_steps_end_the_timing(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock_says(monkeypatch, [1.0, 70.0, 80.0, 1.0])
    found = run(capsys, "train", recipe(tmp_path, grown(tmp_path)), "--dry-run", "--time")
    assert found["time"]["timed_steps"] == [70.0, 80.0]


@pytest.mark.parametrize(
    ("case", "method", "more"),
    [
        ("llama", "identity", {"regularizer": {"kind": "l2sp"}, "train": "new", "warmup": {"steps": 3, "alpha_steps": 2}, "phases": [{"steps": 2, "train": ["new"]}]}),
        ("llama", "identity", {"regularizer": {"kind": "si", "lambda": 1.0, "form": "proximal"}}),
        ("llama", "identity", {"distill": {}}),
        ("llama", "identity", {"distill": {"top_k": 4, "cache": "CACHE"}}),
        ("llama", "identity", {"lora": {}}),
        ("mixtral", "identity", {"gradient_accumulation_steps": 3}),
        ("llama", "stack", {"monitor": {"baseline": "source"}, "kl_rows": 2}),
    ],
    ids=["l2sp", "si", "teacher", "cache", "lora", "experts", "source"],
)  # fmt: skip
def test_timed_steps_use_the_recipe(
    case: str,
    method: str,
    more: dict[str, Any],
    steps: list[Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever acts on a step acts on these."""
    acted: dict[str, int] = {"penalty": 0, "teacher": 0, "adapters": 0}
    penalty, chunks, step = QuadraticPenalty.add_gradient, BaseGrowTrainer._in_chunks, BaseGrowTrainer.training_step

    def counted(what: str, real: Any) -> Any:
        def call(self: Any, *a: Any, **k: Any) -> Any:
            acted[what] += 1
            return real(self, *a, **k)

        return call

    def trained(self: BaseGrowTrainer, *a: Any, **k: Any) -> Any:
        acted["adapters"] += any("lora_" in n for n, p in self.model.named_parameters() if p.requires_grad)
        return step(self, *a, **k)

    monkeypatch.setattr(QuadraticPenalty, "add_gradient", counted("penalty", penalty))

    def taught(self: BaseGrowTrainer, *a: Any, **k: Any) -> Any:
        acted["teacher"] += self.growth.distiller is not None
        return chunks(self, *a, **k)

    monkeypatch.setattr(BaseGrowTrainer, "_in_chunks", taught)
    monkeypatch.setattr(BaseGrowTrainer, "training_step", trained)
    more = {k: {**v, "cache": str(tmp_path / "logits")} if k == "distill" and "cache" in v else v for k, v in more.items()}
    path = recipe(tmp_path, grown(tmp_path, case, method), **more)
    before = everything(tmp_path)
    found = run(capsys, "train", path, "--dry-run", "--time")
    batches = len(DURATIONS) * more.get("gradient_accumulation_steps", 1)
    assert len(steps) == batches and found["time"]["seconds_a_step"] == 3.0
    wanted = {"penalty": "regularizer" in more, "teacher": "distill" in more, "adapters": "lora" in more}
    assert acted == {what: batches * there for what, there in wanted.items()}
    assert everything(tmp_path) == before


def test_timing_without_texts(steps: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = grown(tmp_path)
    path = recipe(tmp_path, model, max_steps=None, data={"train": str(tmp_path / "nowhere.txt")})
    assert "nowhere.txt" in run(capsys, "train", path, "--dry-run", status=2)["error"]
    assert main(["train", str(path), "--dry-run", "--time"]) == 0
    said = capsys.readouterr()
    assert "their size is unknown" in said.out + said.err
    assert "3 s per step, 11 tokens/s (median of 5); the number of steps is unknown" in said.out
    assert len(steps) == len(DURATIONS)


def test_timing_without_enough_memory_is_one_message(
    steps: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe(tmp_path, source(tmp_path / "model"))
    with monkeypatch.context() as patched:
        patched.setattr(dry_run, "device_free_memory", lambda arguments: {"device": "cpu", "bytes": 1000})
        said = run(capsys, "train", path, "--dry-run", "--time", status=1)["error"]
        assert "steps cannot be timed" in said and "per_device_train_batch_size" in said and steps == []
    for full, words in (
        (torch.OutOfMemoryError("full"), "The accelerator is out of memory"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
            "This machine is out of memory",
        ),
        (MemoryError(), "This machine is out of memory"),
    ):

        def fails(*a: Any, full: BaseException = full, **k: Any) -> Any:
            raise full

        with monkeypatch.context() as patched:
            patched.setattr(BaseGrowTrainer, "training_step", fails)
            said = run(capsys, "train", path, "--dry-run", "--time", status=1)["error"]
        assert words in said and "per_device_train_batch_size" in said and "Traceback" not in said


def test_zero_step_time() -> None:
    zero = step_time.StepTimes((0.0,) * 3, 64).to_json(10, [])
    assert zero["tokens_a_second"] is None and zero["seconds"] == 0.0


def test_time_requires_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, tmp_path / "grown")
    assert "time: requires dry_run" in run(capsys, "train", path, "--time", status=2)["error"]
    said = run(capsys, "train", path, "--dry-run", "--time", "--processes", 2, status=2)["error"]
    assert "time: cannot be combined with processes" in said
    said = run(capsys, "train", path, "--dry-run", "--time", "--accelerate", FILES / "ddp.yaml", status=2)["error"]
    assert "time: cannot be combined with accelerate" in said
