"""Text sampled from a model: against a plain loop, its filters, and runs that stop and go on."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import BY_NAME, make
from replay_samples import DOCS, base_tokenizer, interrupted_replay, replay_options, sampled_texts

from hf_grow import api
from hf_grow.cli import main
from hf_grow.common import progress_bars as bars
from hf_grow.errors import ExecutionError, InputError, OutputError
from hf_grow.options import parse
from hf_grow.training.data import DataOptions, build
from hf_grow.training.data.replay import estimate_sampling, sample_replay
from hf_grow.training.data.replay_files import RECORD_FILE, TEXTS_FILE, read_record
from hf_grow.training.data.sample_filters import Sample, compression, repetition
from hf_grow.training.data.sampling import Sampler
from hf_grow.training.data.source_model import weights_digest


@pytest.fixture(scope="module")
def tokenizer():
    made = base_tokenizer()
    assert len(made) == 300
    return made


@pytest.fixture(scope="module")
def model():
    """Random weights, sharpened, so that its samples differ from those of a wrong temperature; in fp64, so that no cache rounds."""
    made = make(BY_NAME["llama"], vocab_size=300, bos_token_id=0, eos_token_id=1, dtype=torch.float64)
    with torch.no_grad():
        made.lm_head.weight.mul_(1.5)
    return made


@pytest.fixture
def saved(model, tokenizer, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# ---- sampling ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 5, 1.0), (1.3, 0, 0.8)])
def test_a_batch_is_what_a_plain_loop_draws(model, tokenizer, temperature: float, top_k: int, top_p: float) -> None:
    """No cache, one softmax a step, the same random numbers: and nothing of the checkpoint's own generation settings."""
    sampler = Sampler(model, tokenizer, replay_options(temperature=temperature, top_k=top_k, top_p=top_p))
    model.generation_config.repetition_penalty = 5.0
    try:
        drawn = sampler.draw(3, 6)
    finally:
        model.generation_config.repetition_penalty = None
    seed = int(np.random.SeedSequence([0, 3]).generate_state(1, np.uint64)[0] >> 1)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        ids = torch.full((6, 1), tokenizer.bos_token_id)
        over = torch.zeros(6, dtype=torch.bool)
        while ids.shape[1] < 24 and not over.all():
            logits = model(ids, use_cache=False).logits[:, -1].float() / temperature
            if top_k:
                logits[logits < logits.topk(top_k).values[:, -1:]] = -torch.inf
            if top_p < 1:
                order = logits.sort(descending=True)
                before = order.values.softmax(-1).cumsum(-1) - order.values.softmax(-1)
                out = torch.zeros_like(logits, dtype=torch.bool).scatter(1, order.indices, before >= top_p)
                logits[out] = -torch.inf
            token = torch.multinomial(logits.softmax(-1), 1)[:, 0]
            token[over] = tokenizer.eos_token_id
            ids = torch.cat([ids, token[:, None]], 1)
            over |= token == tokenizer.eos_token_id
    for sample, row in zip(drawn, ids.tolist(), strict=True):
        end = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row)
        assert list(sample.ids) == row[:end]
        plain = [i for i in row[:end] if i not in (0, 1)]
        assert sample.tokens == len(plain)
        assert sample.text.rstrip("\ufffd") == tokenizer.decode(plain).rstrip("\ufffd")


def test_nothing_of_the_caller_is_changed(model, tokenizer, tmp_path: Path) -> None:
    own, state = model.generation_config, torch.random.get_rng_state()
    sample_replay(model, tokenizer, tmp_path / "out", replay_options(tokens=50))
    assert model.generation_config is own
    assert torch.equal(torch.random.get_rng_state(), state)


def test_starts(model, tokenizer, tmp_path: Path) -> None:
    """BOS, or EOS where there is none; a random plain token; the first tokens of given texts."""
    assert {s.ids[0] for s in Sampler(model, tokenizer, replay_options()).draw(0, 8)} == {tokenizer.bos_token_id}
    without = base_tokenizer()
    without.bos_token = None
    assert {s.ids[0] for s in Sampler(model, without, replay_options()).draw(0, 8)} == {tokenizer.eos_token_id}
    seconds = {s.ids[1] for s in Sampler(model, tokenizer, replay_options(start="random")).draw(0, 32)}
    assert len(seconds) > 20 and not seconds & {0, 1}
    prompts = tmp_path / "prompts.jsonl"
    beginnings = ["import os and then", "def function(argument):", "x"]
    prompts.write_text("".join(json.dumps({"text": t}) + "\n" for t in beginnings))
    drawn = Sampler(model, tokenizer, replay_options(prompts=str(prompts), prompt_tokens=3)).draw(0, 16)
    wanted = {tuple(tokenizer.encode(t)[:3]) for t in beginnings[:2]}
    assert {s.ids[:3] for s in drawn} == wanted
    with pytest.raises(InputError, match="no text of 99 tokens"):
        Sampler(model, tokenizer, replay_options(prompts=str(prompts), prompt_tokens=99))
    without.eos_token = None
    with pytest.raises(InputError, match="neither BOS nor EOS"):
        Sampler(model, without, replay_options())


def test_all_ends_that_the_checkpoint_names_end_a_text(model, tokenizer) -> None:
    many = list(range(1, 60))
    own = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = many
    try:
        drawn = Sampler(model, tokenizer, replay_options()).draw(0, 16)
    finally:
        model.generation_config.eos_token_id = own
    assert not {i for s in drawn for i in s.ids} & set(many)
    assert np.mean([len(s.ids) for s in drawn]) < 20


def test_texts_are_not_longer_than_the_model_reads(tokenizer) -> None:
    short = make(BY_NAME["llama"], vocab_size=300, max_position_embeddings=16)
    assert max(len(s.ids) for s in Sampler(short, tokenizer, replay_options(max_length=100)).draw(0, 8)) == 16


# ---- filters -------------------------------------------------------------------------------------------------------------------------


def sample(text: str, ids: list[int] | None = None) -> Sample:
    ids = list(range(2, 40)) if ids is None else ids
    return Sample(text, tuple(ids), len(ids))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (sample("A sentence of some length, as it should be."), None),
        (sample("short", [5, 6, 7]), "short"),
        (sample("", []), "short"),
        (sample("bro\ufffd\ufffdken"), "broken"),
        (sample("a long text with one \ufffd in it, which is allowed to be there"), None),
        (sample("la la la", [7, 8] * 30), "repetition"),
        (sample("0" * 5000), "compression"),
    ],
)
def test_what_is_dropped(model, tokenizer, given: Sample, reason: str | None) -> None:
    assert Sampler(model, tokenizer, replay_options()).drop_reason(given) == reason


def test_repetition_and_compression_against_the_plain_count() -> None:
    ids = [1, 2, 3, 4, 1, 2, 3, 4, 9]
    grams = [(1, 2, 3, 4), (2, 3, 4, 1), (3, 4, 1, 2), (4, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 9)]
    assert repetition(ids) == pytest.approx(1 - len(set(grams)) / len(grams))
    assert repetition([1, 2]) == 0
    prose = DOCS[0][:2000]
    assert 1.5 < compression(prose) < 6 < compression("and so on " * 200)
    assert all(repetition(list(range(n))) == 0 for n in range(8))


def test_duplicates_are_dropped_whatever_their_white_space(model, tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(self: Sampler, batch: int, size: int, *, chat: bool) -> list[Sample]:
        words = ["one  two three", "one two\nthree ", f"text number {batch}"]
        return [sample(w, list(range(2, 12))) for w in words]

    monkeypatch.setattr(Sampler, "draw", draw)
    done = sample_replay(model, tokenizer, tmp_path / "out", replay_options(tokens=45))
    assert sampled_texts(tmp_path / "out") == ["one  two three", "text number 0", "text number 1", "text number 2", "text number 3"]
    assert done.record["counts"] == {
        "texts": 5,
        "tokens": 50,
        "cut": 0,
        "chat_tokens": 0,
        "sampled_texts": 12,
        "sampled_tokens": 120,
        "dropped": {"duplicate": 7},
    }


def test_surprise_is_the_nats_a_token_of_the_model(model, tokenizer) -> None:
    sampler = Sampler(model, tokenizer, replay_options(max_surprise=1.0))
    drawn = sampler.draw(0, 12)
    for s in drawn:
        ids = torch.tensor([s.ids])
        if len(s.ids) > 1:
            with torch.no_grad():
                assert s.surprise == pytest.approx(float(model(ids, labels=ids).loss), rel=1e-5)
    values = np.array([s.surprise for s in drawn])
    median = float(np.median(values))
    spread = 1.4826 * np.median(np.abs(values - median))
    assert sampler.surprise["plain"] == pytest.approx((median, spread))
    dropped = [sampler.drop_reason(s) == "surprise" for s in drawn if s.tokens >= 4]
    assert dropped == [bool(abs(s.surprise - median) > spread) for s in drawn if s.tokens >= 4]
    assert 0 < sum(dropped) < len(dropped)


def test_filters_that_leave_nothing_are_told(model, tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ExecutionError, match=r"None of the last 64 texts was kept \(short 64, of 64 sampled\)"):
        sample_replay(model, tokenizer, tmp_path / "out", replay_options(min_tokens=1000))
    assert sampled_texts(tmp_path / "out") == []


# ---- going on ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{}, {"max_surprise": 2.0, "start": "random"}])
def test_a_run_that_stopped_goes_on_to_the_same_texts(model, tokenizer, tmp_path: Path, more: dict[str, Any]) -> None:
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


def test_killed_before_anything_was_noted(model, tokenizer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / TEXTS_FILE).write_text('{"text": "of the first batch"}\n')
    sample_replay(model, tokenizer, out, replay_options())
    sample_replay(model, tokenizer, tmp_path / "whole", replay_options())
    assert sampled_texts(out) == sampled_texts(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("batches", [0, 1, 4])
def test_kill_at_some_moment_and_the_same_command_again(saved: Path, tmp_path: Path, batches: int) -> None:
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


def test_a_finished_run_is_not_repeated_and_can_be_made_longer(model, tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = sample_replay(model, tokenizer, tmp_path / "out", replay_options())
    before = sampled_texts(tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(Sampler, "draw", lambda *a, **k: pytest.fail("sampled again"))
        again = sample_replay(model, tokenizer, tmp_path / "out", replay_options())
    assert again.record == first.record
    longer = sample_replay(model, tokenizer, tmp_path / "out", replay_options(tokens=600))
    assert longer.record["counts"]["tokens"] >= 600
    assert sampled_texts(tmp_path / "out")[: len(before)] == before


def test_what_is_enough_for_fewer_tokens_is_whole(model, tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for those who read the folder later; a batch that was written but not noted goes first."""
    out = tmp_path / "out"
    interrupted_replay(model, tokenizer, out, 2, replay_options(tokens=6000))
    there = read_record(out)["counts"]["tokens"]
    with pytest.raises(InputError, match="unfinished"):
        build(data_options(tmp_path, path=str(out)), tokenizer, cache=tmp_path / "cache")
    with (out / TEXTS_FILE).open("a") as file:
        file.write('{"text": "half a li')
    monkeypatch.setattr(Sampler, "draw", lambda *a, **k: pytest.fail("sampled again"))
    sample_replay(model, tokenizer, out, replay_options(tokens=there - 1))
    assert (read_record(out)["tokens"], read_record(out)["complete"]) == (there - 1, True)
    data = build(data_options(tmp_path, path=str(out), share=0.25), tokenizer, cache=tmp_path / "cache")
    assert data.parts[0].documents == len(sampled_texts(out)) == read_record(out)["counts"]["texts"]


def test_a_finished_run_that_is_being_made_longer_is_unfinished(model, tokenizer, tmp_path: Path) -> None:
    """Before more is written: what stands half in the file when it is killed must not be read."""
    out = tmp_path / "out"
    sample_replay(model, tokenizer, out, replay_options())
    interrupted_replay(model, tokenizer, out, 0, replay_options(tokens=6000))
    with pytest.raises(InputError, match="unfinished"):
        build(data_options(tmp_path, path=str(out)), tokenizer, cache=tmp_path / "cache")


def test_the_command_that_finishes_is_told_whole(saved: Path, model, tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
        build(data_options(tmp_path, path=str(out)), tokenizer, cache=tmp_path / "cache")
    name, *words = shlex.split(refused.value.hint.removeprefix("Finish it: "))
    assert name == "hf-grow" and main(words) == 0, capsys.readouterr().err
    sample_replay(model, tokenizer, whole, replay_options(**settings))
    assert sampled_texts(out) == sampled_texts(whole) and read_record(out)["complete"]


@pytest.mark.parametrize("damage", [{"complete": "yes"}, {"tokens": None}, {"model": 3}, {"settings": []}])
def test_a_damaged_record_is_one_message(model, tokenizer, tmp_path: Path, damage: dict[str, Any]) -> None:
    out = tmp_path / "out"
    sample_replay(model, tokenizer, out, replay_options())
    (out / RECORD_FILE).write_text(json.dumps(read_record(out) | damage))
    with pytest.raises(InputError, match="damaged"):
        build(data_options(tmp_path, path=str(out)), tokenizer, cache=tmp_path / "cache")


def test_what_stands_in_the_way_of_the_output(model, tokenizer, tmp_path: Path) -> None:
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


def test_every_token_of_a_batch_is_told_and_changes_nothing(model, tokenizer, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    sample_replay(model, tokenizer, tmp_path / "a", replay_options(tokens=1), on_token=lambda token, most: told.append((token, most)))
    sample_replay(model, tokenizer, tmp_path / "b", replay_options(tokens=1))
    assert sampled_texts(tmp_path / "a") == sampled_texts(tmp_path / "b")
    batches, last = read_record(tmp_path / "a")["batches"], max(told)[0]
    assert batches == 1 and told == [(n, 23) for n in range(1, last + 1)]  # one of the 24 is there before
    assert last >= read_record(tmp_path / "a")["counts"]["tokens"] - 1


def test_the_digest_is_of_the_weights(model, saved: Path) -> None:
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float64)
    assert weights_digest(loaded) == weights_digest(model)
    with torch.no_grad():
        loaded.model.norm.weight[3] += 1e-9
    assert weights_digest(loaded) != weights_digest(model)


def test_the_estimate_is_of_one_batch_and_writes_nothing(model, tokenizer, tmp_path: Path) -> None:
    found = estimate_sampling(model, tokenizer, replay_options(tokens=10_000))
    drawn = Sampler(model, tokenizer, replay_options()).draw(0, 8)
    kept = sum(s.tokens for s in drawn if s.tokens >= 4) / sum(s.tokens for s in drawn)
    assert found.kept == pytest.approx(kept)
    assert found.seconds == pytest.approx(10_000 / (found.tokens_per_second * kept))


# ---- the command ---------------------------------------------------------------------------------------------------------------------


def command(saved: Path, out: Path, *more: str) -> list[str]:
    return ["replay", str(saved), "-o", str(out), "--tokens", "400", "--max-length", "24", "--batch-size", "8", "--min-tokens", "4", *more]


def test_the_command_writes_what_the_function_does(
    saved: Path, model, tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(saved, tmp_path / "out", "--json", "--device", "cpu")) == 0
    told = json.loads(capsys.readouterr().out)
    sample_replay(model, tokenizer, tmp_path / "own", replay_options())
    assert sampled_texts(tmp_path / "out") == sampled_texts(tmp_path / "own")
    record = read_record(tmp_path / "out")
    assert {k: told[k] for k in record} == record
    assert record["model"] == str(saved) and told["tokens_per_second"] > 0
    assert record["counts"]["texts"] == len(sampled_texts(tmp_path / "out"))
    assert main(command(saved, tmp_path / "out")) == 0
    said = capsys.readouterr().out
    assert "kept" in said and f"cut        {record['counts']['cut']} texts, at 24 tokens" in said
    assert "chats" not in said, "there are none"


def test_without_a_terminal_a_line_now_and_then_says_how_far_it_is(
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


def test_a_dry_run_writes_nothing(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(saved, tmp_path / "out", "--dry-run")) == 0
    assert "tokens/s" in capsys.readouterr().out
    assert main(command(saved, tmp_path / "out", "--dry-run", "--json")) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["dry_run"] is True and told["seconds"] > 0
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
def test_bad_flags_are_one_message(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str) -> None:
    assert main(command(saved, tmp_path / "out", *more)) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_a_model_without_tokenizer(model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model.save_pretrained(tmp_path / "bare")
    assert main(command(tmp_path / "bare", tmp_path / "out")) == 2
    assert "no usable tokenizer" in capsys.readouterr().err


# ---- in a training's data ------------------------------------------------------------------------------------------------------------


def data_options(tmp_path: Path, **replay: Any) -> DataOptions:
    (tmp_path / "new.txt").write_text(DOCS[0] + DOCS[1])
    return parse(DataOptions, {"train": str(tmp_path / "new.txt"), "replay": replay, "seq_length": 16, "shuffle": False}, where="test")


SAMPLING = {"tokens": 400, "max_length": 24, "batch_size": 8, "min_tokens": 4}


def test_a_folder_of_samples_is_old_text_once_it_is_whole(model, tokenizer, tmp_path: Path) -> None:
    out = tmp_path / "old"
    sample_replay(model, tokenizer, out, replay_options())
    data = build(data_options(tmp_path, path=str(out), share=0.25), tokenizer, cache=tmp_path / "cache")
    assert data.parts[0].use == "replay" and data.parts[0].documents == len(sampled_texts(out))
    record = read_record(out) | {"complete": False}
    (out / RECORD_FILE).write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"(?s)is unfinished \(4\d\d of 400 tokens\).*hf-grow replay"):
        build(data_options(tmp_path, path=str(out)), tokenizer, cache=tmp_path / "cache")


@pytest.mark.parametrize("named", [True, False])
def test_self_replay_samples_the_source_once(
    saved: Path, model, tokenizer, tmp_path: Path, named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model that is named, or what the trained one was grown from, as growth.json says."""
    grown = tmp_path / "grown"
    api.grow(str(saved), grown, "identity", layers_to=6)
    wanted = data_options(tmp_path, share=0.2, self=SAMPLING | ({"model": str(saved)} if named else {}))
    told: list[str] = []
    data = build(wanted, tokenizer, cache=tmp_path / "cache", model=str(grown), notify=told.append)
    assert any("Sampling 400 tokens from" in t for t in told)
    sample_replay(model, tokenizer, tmp_path / "own", replay_options())
    by_hand = build(data_options(tmp_path, path=str(tmp_path / "own"), share=0.2), tokenizer, cache=tmp_path / "cache")
    assert list(data.train["input_ids"]) == list(by_hand.train["input_ids"])
    monkeypatch.setattr(Sampler, "draw", lambda *a, **k: pytest.fail("sampled again"))
    again = build(wanted, tokenizer, cache=tmp_path / "cache", model=str(grown))
    assert list(again.train["input_ids"]) == list(data.train["input_ids"])


def test_self_replay_without_a_source(saved: Path, tokenizer, tmp_path: Path) -> None:
    wanted = data_options(tmp_path, self=SAMPLING)
    with pytest.raises(InputError, match="needs a model to sample from"):
        build(wanted, tokenizer, cache=tmp_path / "cache")
    grown = tmp_path / "grown"
    api.grow(str(saved), grown, "identity", layers_to=6)
    shutil.rmtree(saved)
    with pytest.raises(InputError, match=r"(?s)cannot sample from .*Name the model"):
        build(wanted, tokenizer, cache=tmp_path / "cache", model=str(grown))


def test_ends_that_are_no_tokens_end_nothing() -> None:
    """generation_config.json may name anything; found by the fuzzer (an overflow in generate)."""
    from types import SimpleNamespace

    from hf_grow.training.data.sampling import _eos_ids

    for named, expected in ((2**70, {2}), ([2**70, -1, "x", True, None, 5], {2, 5}), ({"a": 1}, {2}), (None, {2})):
        model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=named), config=SimpleNamespace(vocab_size=64))
        assert _eos_ids(model, SimpleNamespace(eos_token_id=2)) == expected  # type: ignore[arg-type]
