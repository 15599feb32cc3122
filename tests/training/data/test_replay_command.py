"""`hf-grow replay`, and self-replay in a training's data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from replay_samples import base_tokenizer, data_options_with_replay, replay_options, sampled_texts

from hf_grow import api
from hf_grow.cli import main
from hf_grow.common import progress_bars as bars
from hf_grow.errors import InputError
from hf_grow.training.data import build
from hf_grow.training.data.replay import sample_replay
from hf_grow.training.data.replay_files import RECORD_FILE, read_record
from hf_grow.training.data.sampling import Sampler


@pytest.fixture(scope="module")
def tokenizer():
    return base_tokenizer()


def command(saved: Path, out: Path, *more: str) -> list[str]:
    return ["replay", str(saved), "-o", str(out), "--tokens", "400", "--max-length", "24", "--batch-size", "8", "--min-tokens", "4", *more]


def test_replay_command_equals_sample_replay(saved: Path, model, tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(saved, tmp_path / "out", "--json", "--device", "cpu")) == 0
    result = json.loads(capsys.readouterr().out)
    sample_replay(model, tokenizer, tmp_path / "own", replay_options())
    assert sampled_texts(tmp_path / "out") == sampled_texts(tmp_path / "own")
    record = read_record(tmp_path / "out")
    assert {k: result[k] for k in record} == record
    assert record["model"] == str(saved) and result["tokens_per_second"] > 0
    assert record["counts"]["texts"] == len(sampled_texts(tmp_path / "out"))
    assert main(command(saved, tmp_path / "out")) == 0
    output = capsys.readouterr().out
    assert "kept" in output and f"cut        {record['counts']['cut']} texts, at 24 tokens" in output
    assert "chats" not in output, "there are none"


def test_progress_lines_without_terminal(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bars, "LOG_INTERVAL", 0.0)
    assert main(command(saved, tmp_path / "out")) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sampling: ")]
    done = [int(line.split()[1].replace(",", "")) for line in lines]
    assert "sampling: 0 of 400 tokens; this batch: token 1 of at most 23" in lines
    assert done and done == sorted(done) and all(line.endswith("tokens") or "; this batch: token " in line for line in lines)
    assert main(command(saved, tmp_path / "more", "--json")) == 0
    assert not capsys.readouterr().err


def test_dry_run_writes_nothing(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(saved, tmp_path / "out", "--dry-run")) == 0
    assert "tokens/s" in capsys.readouterr().out
    assert main(command(saved, tmp_path / "out", "--dry-run", "--json")) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["dry_run"] is True and result["seconds"] > 0
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--temperature", "0"], "temperature: should be greater than 0"),
        (["--top-p", "2"], "top_p"),
        (["--tokens", "none"], "is not a size"),
        (["--prompts", "nowhere.txt"], "no file or folder"),
        (["--device", "quantum"], "cannot be moved to quantum"),
        (["--revision", "v1"], "is a folder and has no revision"),
    ],
)
def test_bad_flags_fail(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str) -> None:
    assert main(command(saved, tmp_path / "out", *more)) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_model_without_tokenizer_fails(model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model.save_pretrained(tmp_path / "bare")
    assert main(command(tmp_path / "bare", tmp_path / "out")) == 2
    assert "no usable tokenizer" in capsys.readouterr().err


SAMPLING = {"tokens": 400, "max_length": 24, "batch_size": 8, "min_tokens": 4}


def test_replay_folder_as_data_source_must_be_complete(model, tokenizer, tmp_path: Path) -> None:
    out = tmp_path / "old"
    sample_replay(model, tokenizer, out, replay_options())
    data = build(data_options_with_replay(tmp_path, path=str(out), share=0.25), tokenizer, cache=tmp_path / "cache")
    assert data.parts[0].use == "replay" and data.parts[0].documents == len(sampled_texts(out))
    record = read_record(out) | {"complete": False}
    (out / RECORD_FILE).write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"(?s)is unfinished \(4\d\d of 400 tokens\).*hf-grow replay"):
        build(data_options_with_replay(tmp_path, path=str(out)), tokenizer, cache=tmp_path / "cache")


@pytest.mark.parametrize("named", [True, False])
def test_self_replay_samples_source_once(
    saved: Path, model, tokenizer, tmp_path: Path, named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model that is named, or what the trained one was grown from, as growth.json says."""
    grown = tmp_path / "grown"
    api.grow(str(saved), grown, "identity", layers_to=6)
    wanted = data_options_with_replay(tmp_path, share=0.2, self=SAMPLING | ({"model": str(saved)} if named else {}))
    messages: list[str] = []
    data = build(wanted, tokenizer, cache=tmp_path / "cache", model=str(grown), notify=messages.append)
    assert any("Sampling 400 tokens from" in t for t in messages)
    sample_replay(model, tokenizer, tmp_path / "own", replay_options())
    by_hand = build(data_options_with_replay(tmp_path, path=str(tmp_path / "own"), share=0.2), tokenizer, cache=tmp_path / "cache")
    assert list(data.train["input_ids"]) == list(by_hand.train["input_ids"])
    monkeypatch.setattr(Sampler, "draw", lambda *a, **k: pytest.fail("sampled again"))
    again = build(wanted, tokenizer, cache=tmp_path / "cache", model=str(grown))
    assert list(again.train["input_ids"]) == list(data.train["input_ids"])


def test_self_replay_without_source_fails(saved: Path, tokenizer, tmp_path: Path) -> None:
    wanted = data_options_with_replay(tmp_path, self=SAMPLING)
    with pytest.raises(InputError, match="needs a model to sample from"):
        build(wanted, tokenizer, cache=tmp_path / "cache")
    grown = tmp_path / "grown"
    api.grow(str(saved), grown, "identity", layers_to=6)
    shutil.rmtree(saved)
    with pytest.raises(InputError, match=r"(?s)cannot sample from .*Name the model"):
        build(wanted, tokenizer, cache=tmp_path / "cache", model=str(grown))
