"""Draws from a teacher's distribution: the mean over all outcomes against the whole distribution, the draws themselves, files, refusals, recipes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import BY_NAME, make
from trained import grown, recipe, run

from hf_grow.errors import ExecutionError, InputError
from hf_grow.training.config.distill_options import DistillOptions, Teacher
from hf_grow.training.distillation import sampled_tokens
from hf_grow.training.distillation.chunked_loss import chunked_loss
from hf_grow.training.distillation.distill import Distiller, ModelTeacher
from hf_grow.training.distillation.head import Head
from hf_grow.training.distillation.logit_cache import LogitCache, write_logit_cache
from hf_grow.training.distillation.sampled_tokens import draw
from hf_grow.training.trainer.events import read_events

VOCABULARY, DRAWS, TEMPERATURE = 6, 2, 1.7


def rows(count: int = 5, length: int = 10, vocabulary: int = 64) -> list[dict[str, Any]]:
    random = np.random.default_rng(3)
    return [{"input_ids": random.integers(3, vocabulary, length)} for _ in range(count)]


def ids_of(some: list[dict[str, Any]]) -> torch.Tensor:
    return torch.from_numpy(np.stack([r["input_ids"] for r in some]))


def gradients(
    model: Any, distiller: Distiller, ids: torch.Tensor, labels: torch.Tensor, in_chunks: bool
) -> tuple[float, list[torch.Tensor]]:
    """Of the loss as a training computes it."""
    model.zero_grad()
    if in_chunks:
        with chunked_loss(Head(model), labels, None, distiller=distiller, input_ids=ids):
            loss = model(input_ids=ids, labels=labels, use_cache=False).loss
    else:
        loss = distiller.loss(model(input_ids=ids, use_cache=False).logits, ids, labels, None)
    loss.backward()
    return float(loss.detach()), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("in_chunks", [True, False])
def test_mean_gradient_over_all_outcomes_is_that_of_whole_distribution(
    in_chunks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the V^N outcomes is written to a cache and trained on, in fp64; top-k of as many tokens is another gradient."""
    model, teacher = (make(BY_NAME["llama"], dtype=torch.float64, seed=s, num_hidden_layers=2, vocab_size=VOCABULARY) for s in (0, 1))
    teacher.lm_head.weight.data.mul_(2)  # far from uniform
    ids, labels = torch.tensor([[3, 5, 4]]), torch.tensor([[-100, -100, 4]])
    options = DistillOptions(teachers=[Teacher(model="t")], alpha=1.0, temperature=TEMPERATURE)
    full, expected = gradients(model, Distiller(options, [ModelTeacher(teacher)]), ids, labels, in_chunks)
    with torch.no_grad():
        p = (teacher(ids).logits[0, 1] / TEMPERATURE).softmax(-1)
    assert 0.3 < float(p.max()) < 0.9
    mean, total, loss = [torch.zeros_like(g) for g in expected], 0.0, 0.0
    for i, outcome in enumerate(itertools.product(range(VOCABULARY), repeat=DRAWS)):
        tokens = np.sort(np.tile(np.array(outcome), (3, 1)), axis=1)
        monkeypatch.setattr(sampled_tokens, "draw", lambda *_, t=tokens: (t, np.ones_like(t, np.float64)))
        cache = write_logit_cache(
            teacher, [{"input_ids": ids[0].numpy()}], tmp_path / str(i), samples=DRAWS, temperature=TEMPERATURE, identity="t"
        )
        probability = float(p[list(outcome)].prod())
        value, found = gradients(model, Distiller(options, [cache]), ids, labels, in_chunks)
        for summed, gradient in zip(mean, found, strict=True):
            summed += probability * gradient
        total, loss = total + probability, loss + probability * value
    assert total == pytest.approx(1, abs=1e-12)
    for (name, _), summed, gradient in zip(model.named_parameters(), mean, expected, strict=True):
        # What lies below the head gets its gradient through norms, which compute in fp32.
        torch.testing.assert_close(summed, gradient, rtol=0, atol=1e-12 if name == "lm_head.weight" else 1e-6)
    assert loss > full + 1e-3, "the loss itself is not unbiased: draws have less entropy than their distribution"
    monkeypatch.undo()
    top = write_logit_cache(teacher, [{"input_ids": ids[0].numpy()}], tmp_path / "top", top_k=DRAWS, dtype="float32", identity="t")
    _, biased = gradients(model, Distiller(options, [top]), ids, labels, in_chunks)
    assert max(float((a - b).abs().max()) for a, b in zip(biased, expected, strict=True)) > 1e-3


def test_draws_follow_the_distribution() -> None:
    """Evenly spread uniform numbers: each token as often as its probability says, up to one; never a token of probability 0."""
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)) * 2
    logits[:, [0, 4, 8]] = -torch.inf
    number = 10_000
    uniform = np.tile((np.arange(number) + 0.5) / number, (4, 1))
    tokens, probability = draw(logits, TEMPERATURE, uniform)
    p = (logits.double() / TEMPERATURE).softmax(-1).numpy()
    for i in range(4):
        assert np.abs(np.bincount(tokens[i], minlength=9) - number * p[i]).max() <= 1 + 1e-6
    np.testing.assert_array_equal(probability, np.take_along_axis(p, tokens, axis=1))
    edges = np.tile([0.0, np.nextafter(1.0, 0.0)], (4, 1))
    np.testing.assert_array_equal(draw(logits, TEMPERATURE, edges)[0], np.tile([1, 7], (4, 1)))
    logits[2, 3] = torch.nan
    with pytest.raises(ExecutionError, match="not finite"):
        draw(logits, 1.0, uniform)


def test_cache_holds_the_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same whatever the batch and the chunks; N per position; others for another text or seed; small integers."""
    teacher = make(BY_NAME["llama"], num_hidden_layers=2).double()
    some = rows()
    one = write_logit_cache(teacher, some, tmp_path / "one", samples=7, temperature=2.0, identity="t", batch=1)
    monkeypatch.setattr(sampled_tokens, "CHUNK", 64 * 3)
    five = write_logit_cache(teacher, some, tmp_path / "five", samples=7, temperature=2.0, identity="t", batch=5)
    for name in ("keys", "starts", "distinct", "chosen", "counts"):
        assert (tmp_path / "one" / f"{name}.npy").read_bytes() == (tmp_path / "five" / f"{name}.npy").read_bytes(), name
    assert one.meta == {**five.meta, "covered": pytest.approx(five.meta["covered"], abs=1e-12)}
    counts, token_ids = one(ids_of([some[i] for i in (3, 1)]))
    assert token_ids is not None and counts.shape == token_ids.shape and not counts.is_floating_point()
    assert (counts.sum(-1) == 7).all() and int(token_ids.max()) < 64
    for position, drawn in zip(token_ids.flatten(0, 1), counts.flatten(0, 1), strict=True):
        kept = position[drawn > 0].tolist()
        assert len(set(kept)) == len(kept)
    assert isinstance(one.outputs, sampled_tokens.SampledTokens)
    assert one.meta["distinct"] == len(one.outputs.counts) / 50
    assert (one.outputs.token_ids.dtype, one.outputs.counts.dtype, one.outputs.distinct.dtype) == (np.uint8,) * 3
    with torch.no_grad():
        p = (teacher(ids_of(some)).logits / 2).softmax(-1).flatten(0, 1).numpy()
    positions = np.repeat(np.arange(50), one.outputs.distinct.ravel())
    assert one.meta["covered"] == pytest.approx(p[positions, one.outputs.token_ids].sum() / 50, abs=1e-9)

    def said(row: int, cache: LogitCache) -> list[int]:
        found: list[int] = cache.outputs.token_ids[cache.outputs.starts[row] : cache.outputs.starts[row + 1]].tolist()  # type: ignore[union-attr]
        return found

    other = write_logit_cache(teacher, some, tmp_path / "other", samples=7, temperature=2.0, seed=1, identity="t")
    fewer = write_logit_cache(teacher, some[2:], tmp_path / "fewer", samples=7, temperature=2.0, identity="u")
    assert said(0, one) != said(1, one) and said(0, one) != said(0, other)
    assert [said(r, one) for r in (2, 3, 4)] == [said(r, fewer) for r in range(3)]


def test_cache_is_reused_only_if_it_matches(tmp_path: Path) -> None:
    teacher, some = make(BY_NAME["llama"], num_hidden_layers=2), rows()
    folder = tmp_path / "cache"
    settings: dict[str, Any] = {"samples": 4, "temperature": 1.0, "identity": "t"}
    write_logit_cache(teacher, some, folder, **settings)
    stamp = (folder / "chosen.npy").stat().st_mtime_ns
    write_logit_cache(teacher, some, folder, **settings)
    assert (folder / "chosen.npy").stat().st_mtime_ns == stamp
    for changed in ({"identity": "u"}, {"samples": 5}, {"temperature": 2.0}, {"seed": 1}, {"samples": None, "top_k": 4}):
        with pytest.raises(InputError, match="other settings"):
            write_logit_cache(teacher, some, folder, **{**settings, **changed})
    write_logit_cache(teacher, some, tmp_path / "top", top_k=4, identity="t")
    with pytest.raises(InputError, match="other settings"):
        write_logit_cache(teacher, some, tmp_path / "top", **settings)
    assert json.loads((tmp_path / "top" / "meta.json").read_text()).keys() == {
        "format",
        "teacher",
        "rows",
        "top_k",
        "dtype",
        "data",
        "covered",
    }
    np.save(folder / "counts.npy", np.load(folder / "counts.npy")[:-1], allow_pickle=False)
    with pytest.raises(InputError, match="cannot be read: its files do not fit each other"):
        LogitCache(folder)


def test_recipes_with_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained, and resumed, in chunks and with all logits alike; the dry run counts no teacher."""
    model = grown(tmp_path)
    losses = {}
    for name, more in {"chunks": {}, "whole": {"chunked_loss": False}}.items():
        out = tmp_path / name
        path = recipe(
            tmp_path, model, output=str(out), distill={"samples": 8, "temperature": 2.0, "cache": str(tmp_path / "draws")}, **more
        )
        run(capsys, "train", path)
        losses[name] = [e["loss"] for e in read_events(out / "events.jsonl") if e["event"] == "log"]
    assert losses["chunks"] == pytest.approx(losses["whole"], rel=1e-3)
    folder = tmp_path / "draws" / "teacher-0"
    meta = json.loads((folder / "meta.json").read_text())
    assert (meta["samples"], meta["temperature"]) == (8, 2.0) and 1 <= meta["distinct"] <= 8
    stamp = (folder / "chosen.npy").stat().st_mtime_ns
    run(capsys, "train", path, "--resume")
    assert (folder / "chosen.npy").stat().st_mtime_ns == stamp
    changed = recipe(tmp_path, model, distill={"samples": 9, "temperature": 2.0, "cache": str(tmp_path / "draws")})
    assert "other settings" in run(capsys, "train", changed, status=2)["error"]
    with_teacher, with_draws = (
        run(capsys, "train", recipe(tmp_path, model, output=str(tmp_path / "no"), distill=distill), "--dry-run")["memory"]["teachers"]
        for distill in ({}, {"samples": 8})
    )
    assert with_draws == 0 < with_teacher


@pytest.mark.parametrize(
    ("distill", "more", "line"),
    [
        ({"samples": 4, "top_k": 4}, {}, "distill.samples: cannot be combined with top_k. Remove one of them."),
        ({"samples": 0}, {}, "distill.samples: should be greater than or equal to 1, got 0."),
        ({"samples": 70_000}, {}, "distill.samples: should be less than or equal to 65535, got 70000."),
        ({"samples": 4}, {"data": {"streaming": True}}, "distill.samples: does not work with streaming; the teacher reads the text beforehand."),
        ({"cache": "somewhere"}, {}, "distill.cache: requires top_k or samples. Add top_k or samples, or remove cache."),
        ({"samples": 4, "cache_dtype": "float32"}, {}, "distill.cache_dtype: requires top_k."),
    ],
    ids=["both", "none", "many", "streaming", "cache", "dtype"],
)  # fmt: skip
def test_contradictions_are_refused(
    distill: dict[str, Any], more: dict[str, Any], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = run(capsys, "train", recipe(tmp_path, grown(tmp_path), distill=distill, **more), status=2)["error"]
    assert line in said and "has 1 mistake:" in said
    assert not (tmp_path / "out").exists()
