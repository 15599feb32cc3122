"""Data position: what a resumed run reads, tokenises and trains on, and which batches a rollback skips."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from trained import ROLLBACK_OPTIONS, edited, grown, logged, recipe, run, source, text, with_spike

from hf_grow.cli import main
from hf_grow.training.config.monitor_options import MonitorOptions
from hf_grow.training.data import packing, sources, stream
from hf_grow.training.trainer.events import read_events
from hf_grow.training.trainer.monitor import Monitor
from hf_grow.training.trainer.trainer import BaseGrowTrainer


def write_texts(folder: Path, files: int = 16) -> str:
    """Writes several files of documents."""
    (folder / "new").mkdir(exist_ok=True)
    for i in range(files):
        text(folder / "new", f"part-{i:02}", 6, seed=i)
    return str(folder / "new")


@pytest.fixture
def trained_batches(monkeypatch: pytest.MonkeyPatch) -> list[list[list[int]]]:
    """The rows of every trained micro-batch, in order."""
    found: list[list[list[int]]] = []
    step = BaseGrowTrainer.training_step

    def noted(self: BaseGrowTrainer, model: Any, inputs: dict[str, Any], *more: Any) -> Any:
        assert inputs.keys() == {"input_ids", "labels"}
        found.append(inputs["input_ids"].tolist())
        return step(self, model, inputs, *more)

    monkeypatch.setattr(BaseGrowTrainer, "training_step", noted)
    return found


@pytest.fixture
def read_counts(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Documents that were tokenised for training, and read, by file; 4 at once."""
    counts: dict[str, Any] = {"tokenised": 0, "read": []}
    encode, read = packing.DocumentEncoder.__call__, sources.read_documents

    def encoded(self: packing.DocumentEncoder, batch: Any) -> Any:
        counts["tokenised"] += len(batch)
        return encode(self, batch)

    def documents(files: Any, *more: Any, **named: Any) -> Any:
        for row in read(files, *more, **named):
            counts["read"].append(Path(files[0]).name)
            yield row

    monkeypatch.setattr(packing.DocumentEncoder, "__call__", encoded)
    monkeypatch.setattr(sources, "read_documents", documents)
    monkeypatch.setattr(stream, "BATCH", 4)
    return counts


def streaming_recipe(folder: Path, model: Path, **changes: Any) -> Path:
    """A recipe that reads about half of the text in ten steps."""
    data = {"streaming": True, "train": write_texts(folder), "eval": {}, **changes.pop("data", {})}
    settings = {"max_steps": 10, "save_steps": 5, "gradient_accumulation_steps": 4, "eval_strategy": None, "eval_steps": None, **changes}
    return recipe(folder, model, data=data, **settings)


@pytest.mark.parametrize("workers", [0, 1])
def test_resumed_stream_continues_at_its_position(
    workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], trained_batches: list[Any], read_counts: dict[str, Any]
) -> None:
    """The batches are those of an uninterrupted run; nothing that was trained on is tokenised again but what shares a batch of documents."""
    path = streaming_recipe(tmp_path, grown(tmp_path), dataloader_num_workers=workers)
    read_counts["tokenised"] = 0
    run(capsys, "train", path)
    whole, losses, all_documents, read = list(trained_batches), logged(tmp_path / "out"), read_counts["tokenised"], len(read_counts["read"])
    assert len(whole) == 40 and len({json.dumps(b) for b in whole}) == 40
    shutil.rmtree(tmp_path / "out" / "checkpoint-10")
    trained_batches.clear()
    read_counts.update(tokenised=0, read=[])
    run(capsys, "train", path, "--resume")
    assert trained_batches == whole[20:]
    assert logged(tmp_path / "out") == losses
    if workers == 0:  # counts of a worker process are not seen here
        ends, at = [], 0
        for file in sorted((tmp_path / "new").iterdir()):
            for line in file.read_text().splitlines():
                at += len(json.loads(line)["text"].split()) + 1
                ends.append(at)
        done = sum(end <= 20 * 2 * 16 for end in ends)  # documents that were trained on to their end
        assert done > 12 and 0 < read_counts["tokenised"] <= all_documents - done + 4
        assert len(read_counts["read"]) <= read - 12 and not {"part-00.jsonl", "part-01.jsonl"} & set(read_counts["read"]), (
            "files before the position"
        )


def test_resuming_finished_stream_trains_no_step(tmp_path: Path, capsys: pytest.CaptureFixture[str], trained_batches: list[Any]) -> None:
    path = streaming_recipe(tmp_path, grown(tmp_path), max_steps=5)
    first = run(capsys, "train", path)
    trained_batches.clear()
    assert run(capsys, "train", path, "--resume")["steps"] == first["steps"] == 5
    assert trained_batches == []


def test_resume_with_other_text_skips_same_number_of_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], trained_batches: list[Any]
) -> None:
    """Like text that is not streamed: the position is the 41st sequence."""
    path = streaming_recipe(tmp_path, grown(tmp_path))
    run(capsys, "train", path)
    shutil.rmtree(tmp_path / "out" / "checkpoint-10")
    other = text(tmp_path, "other", 200, seed=9)
    trained_batches.clear()
    assert main(["train", str(path), "--resume", "--data.train", str(other)]) == 0
    assert "has no position in this text; skipping the first 40 sequences" in capsys.readouterr().err
    resumed = list(trained_batches)
    trained_batches.clear()
    run(capsys, "train", path, "--data.train", other, "-o", tmp_path / "whole")
    assert resumed == trained_batches[20:]


def test_damaged_data_state_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = streaming_recipe(tmp_path, grown(tmp_path))
    run(capsys, "train", path)
    edited(tmp_path / "out" / "checkpoint-10" / "data_state.json", stream={"place": 3})
    output = run(capsys, "train", path, "--resume", status=2)["error"]
    assert "data_state.json is damaged" in output and "Traceback" not in output


@pytest.mark.parametrize("streaming", [True, False])
def test_grown_run_continues_at_its_data_position(
    streaming: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], trained_batches: list[Any]
) -> None:
    """Also with another batch size: the position is counted in rows."""
    data = {"streaming": streaming}
    path = streaming_recipe(tmp_path, source(tmp_path / "model"), data=data)
    run(capsys, "train", path)
    rows = [r for batch in trained_batches for r in batch]
    checkpoint = tmp_path / "out" / "checkpoint-5"
    run(capsys, "depth", checkpoint, "--method", "identity", "--layers-to", 4, "--with-optimizer", checkpoint, "-o", tmp_path / "grown")
    trained_batches.clear()
    again = streaming_recipe(tmp_path, tmp_path / "grown", data=data, resume_from_checkpoint=str(tmp_path / "grown"), max_steps=7,
                     per_device_train_batch_size=4, output=str(tmp_path / "more"))  # fmt: skip
    run(capsys, "train", again)
    found = [r for batch in trained_batches for r in batch]
    assert len(found) == 2 * 4 * 4 and found == rows[40:72]


# ---- rollbacks -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [True, False])
def test_rollback_skips_the_batches_before_the_spike(
    streaming: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], trained_batches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Back from step 7 to the checkpoint of step 4: steps 5 to 7 take the rows that 8 to 10 would have had; a resumed run knows of it."""
    settings = {"max_steps": 10, "save_steps": 4, "gradient_accumulation_steps": 1, "monitor": {**ROLLBACK_OPTIONS, "restore_steps": 4},
                "data": {"streaming": streaming}, "learning_rate": 1e-3}  # fmt: skip
    path = streaming_recipe(tmp_path, grown(tmp_path), **settings)
    run(capsys, "train", path, "-o", tmp_path / "calm", "--max_steps", 13)
    uninterrupted = list(trained_batches)
    trained_batches.clear()
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        with_spike(patch, at=7)
        run(capsys, "train", path)
    # Without a stream the text is as long as the training: rows missing at its end are taken from its beginning.
    expected = [*uninterrupted[:7], *uninterrupted[7:13]] if streaming else [*uninterrupted[:10], *uninterrupted[:3]]
    assert trained_batches == expected
    reaction = next(e for e in read_events(out / "events.jsonl") if e["event"] == "reaction")
    assert (reaction["action"], reaction["lr_factor"], reaction["skipped"]) == ("rollback", 0.5, 3)
    factors = [e.get("lr_factor", 1.0) for e in read_events(out / "events.jsonl") if e["event"] == "log"]
    assert factors == [1.0] * 6 + [0.5, 0.625, 0.75, 0.875, 1.0, 1.0]
    losses = logged(out)
    # Killed before its next checkpoint, it resumes from the checkpoint of the rollback, after the same batches and at the same learning rate.
    shutil.rmtree(out / "checkpoint-8")
    shutil.rmtree(out / "checkpoint-10")
    trained_batches.clear()
    run(capsys, "train", path, "--resume")
    assert trained_batches == expected[7:]
    assert logged(out) == losses


def test_lr_recovers_after_rollback() -> None:
    monitor = Monitor(MonitorOptions(on_instability="rollback", restore_steps=10, lr_factor=0.5))
    assert monitor.react(29, "checkpoint", back=10).facts["lr_factor"] == 0.5
    assert [monitor.lr_factor_at(t) for t in (20, 25, 30, 99)] == [0.5, 0.75, 1.0, 1.0]
    assert monitor.react(24, "checkpoint", back=5).facts["lr_factor"] == pytest.approx(0.35)  # from 0.7, in step 24
    assert monitor.lr_factor_at(20) == pytest.approx(0.35) and monitor.lr_factor_at(30) == 1.0
    stays = Monitor(MonitorOptions(on_instability="rollback", restore_steps=0))
    stays.react(3, "checkpoint", back=1)
    assert stays.lr_factor_at(1000) == 0.5
    for_good = Monitor(MonitorOptions(on_instability="lower_lr"))
    for_good.react(3, None)
    assert for_good.lr_factor_at(1000) == 0.5
    kept = Monitor(monitor.options)
    kept.load(json.loads(json.dumps(monitor.state())))
    assert kept.lr_factor_at(23) == monitor.lr_factor_at(23)
