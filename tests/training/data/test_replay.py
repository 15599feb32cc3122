"""Replay folders: interrupted runs, damaged folders and folders of other models."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import BY_NAME, make
from replay_samples import base_tokenizer, data_options_with_replay, interrupted_replay, replay_options, sampled_texts

from hf_grow.cli import main
from hf_grow.errors import InputError, OutputError
from hf_grow.training.data import build
from hf_grow.training.data.replay import estimate_sampling, sample_replay
from hf_grow.training.data.replay_files import RECORD_FILE, TEXTS_FILE, read_record
from hf_grow.training.data.sampling import Sampler
from hf_grow.training.data.source_model import weights_digest


@pytest.fixture(scope="module")
def tokenizer():
    return base_tokenizer()


@pytest.mark.parametrize("more", [{}, {"max_surprise": 2.0, "start": "random"}])
def test_interrupted_sampling_continues_to_same_texts(model, tokenizer, tmp_path: Path, more: dict[str, Any]) -> None:
    whole = sample_replay(model, tokenizer, tmp_path / "whole", replay_options(**more))
    assert whole.record["batches"] > 2 and whole.record["complete"]
    for stop in range(1, whole.record["batches"]):
        out = tmp_path / f"stopped-{stop}"
        interrupted_replay(model, tokenizer, out, stop, replay_options(**more))
        assert read_record(out)["batches"] == stop
        assert read_record(out)["complete"] is False
        with (out / TEXTS_FILE).open("a") as file:  # a batch that was written when the process died, but not noted
            file.write('{"text": "half a li')
        sample_replay(model, tokenizer, out, replay_options(**more))
        for name in (TEXTS_FILE, RECORD_FILE):
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_killed_before_first_record(model, tokenizer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / TEXTS_FILE).write_text('{"text": "of the first batch"}\n')
    sample_replay(model, tokenizer, out, replay_options())
    sample_replay(model, tokenizer, tmp_path / "whole", replay_options())
    assert sampled_texts(out) == sampled_texts(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("batches", [0, 1, 4])
def test_killed_command_continues_to_same_texts(saved: Path, tmp_path: Path, batches: int) -> None:
    import time

    def command(out: Path) -> list[str]:
        sizes = ["--tokens", "12000", "--batch-size", "8", "--max-length", "32"]
        return [sys.executable, "-m", "hf_grow", "replay", str(saved), "-o", str(out), *sizes]

    out = tmp_path / "out"
    with subprocess.Popen(command(out), stdout=subprocess.DEVNULL) as process:
        while not (out / RECORD_FILE).exists() or ((out / TEXTS_FILE).read_bytes() if batches else b"").count(b"\n") < 8 * batches:
            assert process.poll() is None
            time.sleep(0.001)
        process.kill()
    assert read_record(out)["complete"] is False
    assert subprocess.run(command(out), capture_output=True).returncode == 0
    assert subprocess.run(command(tmp_path / "whole"), capture_output=True).returncode == 0
    for name in (TEXTS_FILE, RECORD_FILE):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_complete_replay_is_reused_and_can_be_extended(model, tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = sample_replay(model, tokenizer, tmp_path / "out", replay_options())
    before = sampled_texts(tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(Sampler, "draw", lambda *a, **k: pytest.fail("sampled again"))
        again = sample_replay(model, tokenizer, tmp_path / "out", replay_options())
    assert again.record == first.record
    longer = sample_replay(model, tokenizer, tmp_path / "out", replay_options(tokens=600))
    assert longer.record["counts"]["tokens"] >= 600
    assert sampled_texts(tmp_path / "out")[: len(before)] == before


def test_replay_with_enough_tokens_is_complete(model, tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for those who read the folder later; a batch that was written but not noted goes first."""
    out = tmp_path / "out"
    interrupted_replay(model, tokenizer, out, 2, replay_options(tokens=6000))
    there = read_record(out)["counts"]["tokens"]
    with pytest.raises(InputError, match="unfinished"):
        build(data_options_with_replay(tmp_path, path=str(out)), tokenizer, cache=tmp_path / "cache")
    with (out / TEXTS_FILE).open("a") as file:
        file.write('{"text": "half a li')
    monkeypatch.setattr(Sampler, "draw", lambda *a, **k: pytest.fail("sampled again"))
    sample_replay(model, tokenizer, out, replay_options(tokens=there - 1))
    assert (read_record(out)["tokens"], read_record(out)["complete"]) == (there - 1, True)
    data = build(data_options_with_replay(tmp_path, path=str(out), share=0.25), tokenizer, cache=tmp_path / "cache")
    assert data.parts[0].documents == len(sampled_texts(out)) == read_record(out)["counts"]["texts"]


def test_extended_replay_is_unfinished_until_done(model, tokenizer, tmp_path: Path) -> None:
    """Before more is written: what stands half in the file when it is killed must not be read."""
    out = tmp_path / "out"
    sample_replay(model, tokenizer, out, replay_options())
    interrupted_replay(model, tokenizer, out, 0, replay_options(tokens=6000))
    with pytest.raises(InputError, match="unfinished"):
        build(data_options_with_replay(tmp_path, path=str(out)), tokenizer, cache=tmp_path / "cache")


def test_unfinished_replay_error_gives_resume_command(
    saved: Path, model, tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Copied from the message it goes on, with every setting, to what a run without a stop writes."""
    (tmp_path / "prompts.txt").write_text("of the model and more of it " * 9)
    out, whole = tmp_path / "it's old", tmp_path / "whole"
    settings = {
        "temperature": 0.9,
        "top_k": 40,
        "prompts": str(tmp_path / "prompts.txt"),
        "prompt_tokens": 3,
        "seed": 4,
    }
    interrupted_replay(model, tokenizer, out, 1, replay_options(**settings))
    record = read_record(out)
    (out / RECORD_FILE).write_text(json.dumps(record | {"model": str(saved)}))
    with pytest.raises(InputError) as refused:
        build(data_options_with_replay(tmp_path, path=str(out)), tokenizer, cache=tmp_path / "cache")
    name, *words = shlex.split(refused.value.hint.removeprefix("Finish it: "))
    assert name == "hf-grow" and main(words) == 0, capsys.readouterr().err
    sample_replay(model, tokenizer, whole, replay_options(**settings))
    assert sampled_texts(out) == sampled_texts(whole) and read_record(out)["complete"]


@pytest.mark.parametrize("damage", [{"complete": "yes"}, {"tokens": None}, {"model": 3}, {"settings": []}])
def test_damaged_record_error(model, tokenizer, tmp_path: Path, damage: dict[str, Any]) -> None:
    out = tmp_path / "out"
    sample_replay(model, tokenizer, out, replay_options())
    (out / RECORD_FILE).write_text(json.dumps(read_record(out) | damage))
    with pytest.raises(InputError, match="damaged"):
        build(data_options_with_replay(tmp_path, path=str(out)), tokenizer, cache=tmp_path / "cache")


def test_output_folder_checks(model, tokenizer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sample_replay(model, tokenizer, out, replay_options())
    with pytest.raises(OutputError, match=r"other settings \(temperature, seed\)"):
        sample_replay(model, tokenizer, out, replay_options(temperature=0.5, seed=3))
    other = make(BY_NAME["llama"], vocab_size=300, seed=1)
    with pytest.raises(OutputError, match="samples of another model"):
        sample_replay(other, tokenizer, out, replay_options())
    sample_replay(other, tokenizer, out, replay_options(), overwrite=True)
    assert read_record(out)["digest"] == weights_digest(other)
    (out / TEXTS_FILE).write_text("")
    with pytest.raises(OutputError, match="was changed after"):
        sample_replay(other, tokenizer, out, replay_options())
    (out / RECORD_FILE).write_text("{}")
    with pytest.raises(InputError, match="is damaged"):
        sample_replay(other, tokenizer, out, replay_options())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"contains no sampled texts|contains files other than"):
            sample_replay(model, tokenizer, tmp_path / "full", replay_options(), overwrite=overwrite)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        sample_replay(model, tokenizer, tmp_path / "file", replay_options())
    assert (tmp_path / "full" / "thesis.txt").read_text() == "years of work"


def test_on_token_is_called_per_token(model, tokenizer, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    sample_replay(model, tokenizer, tmp_path / "a", replay_options(tokens=1), on_token=lambda token, most: calls.append((token, most)))
    sample_replay(model, tokenizer, tmp_path / "b", replay_options(tokens=1))
    assert sampled_texts(tmp_path / "a") == sampled_texts(tmp_path / "b")
    batches, last = read_record(tmp_path / "a")["batches"], max(calls)[0]
    assert batches == 1 and calls == [(n, 23) for n in range(1, last + 1)]  # one of the 24 is there before
    assert last >= read_record(tmp_path / "a")["counts"]["tokens"] - 1


def test_weights_digest(model, saved: Path) -> None:
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float64)
    assert weights_digest(loaded) == weights_digest(model)
    with torch.no_grad():
        loaded.model.norm.weight[3] += 1e-9
    assert weights_digest(loaded) != weights_digest(model)


def test_estimate_samples_one_batch_and_writes_nothing(model, tokenizer, tmp_path: Path) -> None:
    found = estimate_sampling(model, tokenizer, replay_options(tokens=10_000))
    drawn = Sampler(model, tokenizer, replay_options()).draw(0, 8)
    kept = sum(s.tokens for s in drawn if s.tokens >= 4) / sum(s.tokens for s in drawn)
    assert found.kept == pytest.approx(kept)
    assert found.seconds == pytest.approx(10_000 / (found.tokens_per_second * kept))


def test_invalid_eos_ids_are_ignored() -> None:
    """generation_config.json may name anything; found by the fuzzer (an overflow in generate)."""
    from types import SimpleNamespace

    from hf_grow.training.data.sampling import _eos_ids

    for named, expected in ((2**70, {2}), ([2**70, -1, "x", True, None, 5], {2, 5}), ({"a": 1}, {2}), (None, {2})):
        model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=named), config=SimpleNamespace(vocab_size=64))
        assert _eos_ids(model, SimpleNamespace(eos_token_id=2)) == expected  # type: ignore[arg-type]
