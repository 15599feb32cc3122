"""Distillation: the loss against its formula, the cache against the teacher, refusals, and the whole through the real entry point."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import BY_NAME, make, save
from trained import WORDS, grown, recipe, run, source, tokenizer
from trainers import Rows, gradients_of_first_step

from hf_grow.errors import ExecutionError, InputError
from hf_grow.training.config.distill_options import DistillOptions, Teacher
from hf_grow.training.distillation import kl_divergence as chunked
from hf_grow.training.distillation.distill import Distiller, ModelTeacher
from hf_grow.training.distillation.kl_divergence import kl_divergence, summed_kl_divergence
from hf_grow.training.distillation.logit_cache import LogitCache, write_logit_cache
from hf_grow.training.trainer.events import read_events
from hf_grow.training.trainer.state import GrowthSettings


def rows(count: int = 12, length: int = 10, seed: int = 3) -> list[dict[str, Any]]:
    draw = np.random.default_rng(seed)
    return [{"input_ids": draw.integers(3, 64, length)} for _ in range(count)]


def ids_of(some: list[dict[str, Any]]) -> torch.Tensor:
    return torch.from_numpy(np.stack([r["input_ids"] for r in some]))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_kl_divergence_equals_explicit_sum(temperature: float) -> None:
    draw = np.random.default_rng(0)
    z, y = draw.normal(0, 3, (2, 3, 7)), draw.normal(0, 3, (2, 3, 7))
    expected = np.zeros((2, 3))
    for b in range(2):
        for i in range(3):
            p, q = (np.exp(x[b, i] / temperature) / np.exp(x[b, i] / temperature).sum() for x in (z, y))
            expected[b, i] = temperature**2 * sum(p[v] * (np.log(p[v]) - np.log(q[v])) for v in range(7))
    found = kl_divergence(torch.tensor(y), torch.tensor(z), temperature)
    assert torch.allclose(found, torch.tensor(expected, dtype=found.dtype), atol=1e-5)
    every = torch.arange(7).flip(0).expand(2, 3, 7)
    assert torch.allclose(kl_divergence(torch.tensor(y), torch.tensor(z).flip(-1), temperature, every), found, atol=1e-5)


@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("positions", [1, 3, 100])
def test_chunked_kl_equals_plain_formula(top_k: int | None, positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp64, to the last digits, whatever the size of the chunks; nothing reaches positions that do not count."""
    monkeypatch.setattr(chunked, "CHUNK", 31 * positions)
    draw = torch.Generator().manual_seed(0)
    student = torch.randn(2, 7, 31, generator=draw, dtype=torch.float64).mul_(3).requires_grad_()
    teacher = torch.randn(2, 7, 31, generator=draw, dtype=torch.float64) * 3
    chosen = None
    if top_k is not None:
        teacher, chosen = teacher.topk(top_k, dim=-1)
    counted = torch.rand(2, 7, generator=draw) > 0.3
    plain = (kl_divergence(student, teacher, 2.5, chosen) * counted).sum()
    (expected,) = torch.autograd.grad(plain * 0.7, student)
    found = summed_kl_divergence(student, teacher, 2.5, counted, chosen)
    (gradient,) = torch.autograd.grad(found * 0.7, student)
    torch.testing.assert_close(found, plain, rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)
    assert not gradient[~counted].any() and gradient[counted].any()
    assert torch.autograd.gradcheck(lambda s: summed_kl_divergence(s, teacher, 2.5, counted, chosen), student)
    with torch.no_grad():
        torch.testing.assert_close(summed_kl_divergence(student, teacher, 2.5, counted, chosen), plain.detach(), rtol=1e-13, atol=0)


def test_chunked_kl_makes_no_fp32_copy_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside what is given, one tensor in the student's dtype, and chunks."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        whole = wide = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.numel() >= 2 * 64 * 97 and out._base is None:
                self.whole += 1
                self.wide += out.dtype == torch.float32
            return out

    monkeypatch.setattr(chunked, "CHUNK", 97 * 8)
    student, teacher = (torch.randn(2, 64, 97, dtype=torch.bfloat16) for _ in range(2))
    student.requires_grad_()
    with Largest() as seen:
        summed_kl_divergence(student, teacher, 1.0, torch.ones(2, 64, dtype=torch.bool)).backward()
    assert (seen.whole > 0, seen.wide) == (True, 0)
    with Largest() as plain:
        kl_divergence(student, teacher, 1.0).sum().backward()
    assert plain.wide > 0


@torch.no_grad()
def test_distillation_loss_equals_closed_form() -> None:
    """Two teachers of weights 1 and 3, a label that does not count, and a given number of tokens."""
    model, one, two = (make(BY_NAME["llama"], seed=s, num_hidden_layers=2) for s in range(3))
    ids = ids_of(rows(2, 6))
    labels = ids.clone()
    labels[0, 3] = -100
    options = DistillOptions(teachers=[Teacher(model="a", weight=1.0), Teacher(model="b", weight=3.0)], alpha=0.3, temperature=2.0)
    logits = model(ids).logits
    found = Distiller(options, [ModelTeacher(one), ModelTeacher(two)]).loss(logits, ids, labels, None)
    total, count = 0.0, 0
    for b in range(2):
        for i in range(5):
            if labels[b, i + 1] == -100:
                continue
            q = (logits[b, i] / 2).softmax(-1)
            for weight, teacher in ((0.25, one), (0.75, two)):
                p = (teacher(ids).logits[b, i] / 2).softmax(-1)
                total += weight * 4 * float((p * (p.log() - q.log())).sum())
            count += 1
    assert count == 9
    assert float(found) == pytest.approx(total / 9, rel=1e-5)
    assert float(Distiller(options, [ModelTeacher(one), ModelTeacher(two)]).loss(logits, ids, labels, torch.tensor(18))) == pytest.approx(
        total / 18, rel=1e-5
    )


def test_distillation_gradients_with_accumulation(tmp_path: Path) -> None:
    """(1 - alpha) CE + alpha KL over eight rows, differentiated at once, is what four pieces add up to; a mixture's router loss is apart."""
    for case in ("llama", "mixtral"):
        model, teacher, twin = (make(BY_NAME[case], seed=s, num_hidden_layers=2) for s in (0, 1, 0))
        options = DistillOptions(teachers=[Teacher(model="t")], alpha=0.3, temperature=2.0)
        mixture = {} if case == "llama" else {"output_router_logits": True}
        growth = GrowthSettings(
            distiller=Distiller(options, [ModelTeacher(teacher)]), aux_loss=model.router_aux_loss_coef if mixture else None
        )
        found, _ = gradients_of_first_step(model, tmp_path / case, growth, gradient_accumulation_steps=4)

        total = torch.zeros(())
        for i in range(0, 8, 2):
            ids = Rows().rows[i : i + 2]
            outputs = twin.train()(ids, **mixture)
            own, said = outputs.logits[:, :-1], teacher(ids).logits[:, :-1].detach()
            total = total + 0.7 * torch.nn.functional.cross_entropy(own.flatten(0, 1), ids[:, 1:].flatten()) / 4
            p, q = (said / 2).softmax(-1), (own / 2).log_softmax(-1)
            total = total + 0.3 * 4 * torch.nn.functional.kl_div(q.flatten(0, 1), p.flatten(0, 1), reduction="batchmean") / 4
            if mixture:
                total = total + twin.router_aux_loss_coef * outputs.aux_loss / 4
        total.backward()
        for n, p in twin.named_parameters():
            assert torch.allclose(found[n], p.grad, atol=1e-6), (case, n)


@torch.no_grad()
@pytest.mark.parametrize(("top_k", "dtype", "tolerance"), [(64, "float32", 1e-6), (500, "float32", 1e-6), (64, "float16", 5e-3)])
def test_full_logit_cache_equals_teacher(top_k: int, dtype: str, tolerance: float, tmp_path: Path) -> None:
    model, teacher = (make(BY_NAME["llama"], seed=s, num_hidden_layers=2) for s in range(2))
    some = rows()
    cache = write_logit_cache(teacher, some, tmp_path / "cache", top_k=top_k, dtype=dtype, identity="t")
    options = DistillOptions(teachers=[Teacher(model="t")], temperature=1.5)
    mixed = ids_of([some[i] for i in (7, 2, 11)])  # in any order
    logits = model(mixed).logits
    here, there = (Distiller(options, [t]).loss(logits, mixed, mixed, None) for t in (ModelTeacher(teacher), cache))
    assert float(there) == pytest.approx(float(here), rel=tolerance)
    assert cache.meta["covered"] == pytest.approx(1, abs=1e-5)


@torch.no_grad()
def test_top_k_cache_reports_covered_probability(tmp_path: Path) -> None:
    model, teacher = (make(BY_NAME["llama"], seed=s, num_hidden_layers=2) for s in range(2))
    some = rows()
    cache = write_logit_cache(teacher, some, tmp_path / "cache", top_k=5, dtype="float32", identity="t", batch=5)
    ids = ids_of(some)
    p = teacher(ids).logits.softmax(-1)
    top, chosen = p.topk(5, dim=-1)
    assert cache.meta["covered"] == pytest.approx(float(top.sum(-1).mean()), abs=1e-5)
    q = model(ids).logits.log_softmax(-1).gather(-1, chosen)
    kept = top / top.sum(-1, keepdim=True)
    expected = (kept * (kept.log() - q)).sum(-1)[:, :-1].mean()
    found = Distiller(DistillOptions(teachers=[Teacher(model="t")]), [cache]).loss(model(ids).logits, ids, ids, None)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    assert {f.suffix for f in (tmp_path / "cache").iterdir()} == {".npy", ".json"}


def test_logit_cache_is_reused_only_if_it_matches(tmp_path: Path) -> None:
    teacher = make(BY_NAME["llama"], num_hidden_layers=2)
    folder = tmp_path / "cache"
    write_logit_cache(teacher, rows(), folder, top_k=4, dtype="float16", identity="t")
    stamp = (folder / "logits.npy").stat().st_mtime_ns
    assert write_logit_cache(teacher, rows(), folder, top_k=4, dtype="float16", identity="t").meta["rows"] == 12
    assert (folder / "logits.npy").stat().st_mtime_ns == stamp
    for changed in ({"identity": "u"}, {"top_k": 5}, {"dtype": "float32"}):
        with pytest.raises(InputError, match="other data"):
            write_logit_cache(teacher, rows(), folder, **{"top_k": 4, "dtype": "float16", "identity": "t", **changed})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="other data"):
        write_logit_cache(teacher, rows(seed=9), folder, top_k=4, dtype="float16", identity="t")
    with pytest.raises(ExecutionError, match="no logits for a training row"):
        LogitCache(folder)(ids_of(rows(1, seed=9)))
    (folder / "keys.npy").write_bytes(b"\x93NUMPY\x01")
    with pytest.raises(InputError, match="cannot be read"):
        LogitCache(folder)


def test_logit_cache_rejects_pickles(tmp_path: Path) -> None:
    teacher = make(BY_NAME["llama"], num_hidden_layers=2)
    write_logit_cache(teacher, rows(), tmp_path / "cache", top_k=4, dtype="float16", identity="t")
    np.save(tmp_path / "cache" / "keys.npy", np.array([{"an": "object"}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="cannot be read"):
        LogitCache(tmp_path / "cache")


def test_training_with_source_as_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In memory and from a full cache alike. With nothing but the source to follow, a model that begins as the source stays it."""
    model = grown(tmp_path)
    losses = {}
    kl = {}
    ways = {"none": None, "alone": {"alpha": 1.0}, "memory": {"alpha": 0.8}, "cache": {"alpha": 0.8, "top_k": 64, "cache_dtype": "float32"}}
    for name, distill in ways.items():
        # Its gradients are nothing but rounding where it is the source: a large epsilon keeps AdamW from making steps of them.
        path = recipe(tmp_path, model, output=str(tmp_path / f"by-{name}"), distill=distill, kl_rows=2, adam_epsilon=1e-2, weight_decay=0.0)
        run(capsys, "train", path)
        events = list(read_events(tmp_path / f"by-{name}" / "events.jsonl"))
        losses[name] = [e["loss"] for e in events if e["event"] == "log"]
        kl[name] = next(e["kl"] for e in reversed(events) if e["event"] == "evaluation")
    assert losses["memory"] == pytest.approx(losses["cache"], abs=1e-4)
    assert kl["alone"] == pytest.approx(0, abs=1e-5)
    assert min(kl[n] for n in ways if n != "alone") > 1e-3
    events = list(read_events(tmp_path / "by-cache" / "events.jsonl"))
    assert next(e for e in events if e["event"] == "teacher")["covered"] == pytest.approx(1, abs=1e-4)


def test_invalid_teachers_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = grown(tmp_path)
    other = save(make(BY_NAME["llama"], vocab_size=80, num_hidden_layers=2), tmp_path / "other")
    swapped = source(tmp_path / "swapped")
    tokenizer(WORDS[::-1]).save_pretrained(swapped)
    teachers = [{"model": str(other)}, {"model": str(swapped)}, {"model": str(tmp_path / "nowhere")}]
    said = run(capsys, "train", recipe(tmp_path, model, distill={"teachers": teachers}), status=2)["error"]
    assert "vocabulary of 80 tokens, but the model has 64" in said
    assert "so its token ids differ" in said
    assert "nowhere" in said
    assert "3 mistakes" in said
    (model / "growth.json").unlink()
    said = run(capsys, "train", recipe(tmp_path, model, distill={}), status=2)["error"]
    assert "it has no source" in said
    said = run(capsys, "train", recipe(tmp_path, model, distill={"teachers": [{"model": str(tmp_path / "source")}], "top_k": 3},
                                       data={"streaming": True}), status=2)["error"]  # fmt: skip
    assert "does not work with streaming" in said
    assert not (tmp_path / "out" / "config.json").exists()


def test_resumed_run_reuses_logit_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, grown(tmp_path), distill={"top_k": 8})
    run(capsys, "train", path)
    folder = tmp_path / "out" / "teacher-logits" / "teacher-0"
    assert json.loads((folder / "meta.json").read_text())["top_k"] == 8
    stamp = (folder / "logits.npy").stat().st_mtime_ns
    run(capsys, "train", path, "--resume")
    assert (folder / "logits.npy").stat().st_mtime_ns == stamp
