"""Sampled batches against a plain loop, and the filters."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from models import BY_NAME, make
from replay_samples import DOCS, base_tokenizer, replay_options, sampled_texts

from hf_grow.errors import ExecutionError, InputError
from hf_grow.training.data.replay import sample_replay
from hf_grow.training.data.sample_filters import Sample, compression, repetition
from hf_grow.training.data.sampling import Sampler


@pytest.fixture(scope="module")
def tokenizer():
    return base_tokenizer()


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 5, 1.0), (1.3, 0, 0.8)])
def test_batch_equals_plain_sampling_loop(model, tokenizer, temperature: float, top_k: int, top_p: float) -> None:
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


def test_sampling_restores_global_state(model, tokenizer, tmp_path: Path) -> None:
    own, state = model.generation_config, torch.random.get_rng_state()
    sample_replay(model, tokenizer, tmp_path / "out", replay_options(tokens=50))
    assert model.generation_config is own
    assert torch.equal(torch.random.get_rng_state(), state)


def test_document_start_options(model, tokenizer, tmp_path: Path) -> None:
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


def test_all_eos_tokens_of_checkpoint_end_texts(model, tokenizer) -> None:
    many = list(range(1, 60))
    own = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = many
    try:
        drawn = Sampler(model, tokenizer, replay_options()).draw(0, 16)
    finally:
        model.generation_config.eos_token_id = own
    assert not {i for s in drawn for i in s.ids} & set(many)
    assert np.mean([len(s.ids) for s in drawn]) < 20


def test_max_length_is_limited_by_max_position_embeddings(tokenizer) -> None:
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
def test_drop_reason(model, tokenizer, given: Sample, reason: str | None) -> None:
    assert Sampler(model, tokenizer, replay_options()).drop_reason(given) == reason


def test_repetition_and_compression_values() -> None:
    ids = [1, 2, 3, 4, 1, 2, 3, 4, 9]
    grams = [(1, 2, 3, 4), (2, 3, 4, 1), (3, 4, 1, 2), (4, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 9)]
    assert repetition(ids) == pytest.approx(1 - len(set(grams)) / len(grams))
    assert repetition([1, 2]) == 0
    prose = DOCS[0][:2000]
    assert 1.5 < compression(prose) < 6 < compression("and so on " * 200)
    assert all(repetition(list(range(n))) == 0 for n in range(8))


def test_duplicates_are_dropped_ignoring_white_space(model, tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_surprise_equals_model_nats_per_token(model, tokenizer) -> None:
    sampler = Sampler(model, tokenizer, replay_options(max_surprise=1.0))
    drawn = sampler.draw(0, 12)
    sampler.measure_surprise(drawn, chat=False)
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


def test_filters_that_drop_everything_fail(model, tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ExecutionError, match=r"None of the last 64 texts was kept \(short 64, of 64 sampled\)"):
        sample_replay(model, tokenizer, tmp_path / "out", replay_options(min_tokens=1000))
    assert sampled_texts(tmp_path / "out") == []
