"""The loss in chunks of tokens against the formula over all logits: every family, teachers and caches, accumulation; what is held at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import BY_NAME, each_case, make
from trained import grown, recipe, run
from trainers import gradients_of_first_step

from hf_grow.training.config.distill_options import DistillOptions, Teacher
from hf_grow.training.distillation import chunked_loss as module
from hf_grow.training.distillation.chunked_loss import chunked_loss
from hf_grow.training.distillation.distill import Distiller, ModelTeacher
from hf_grow.training.distillation.head import Head
from hf_grow.training.distillation.kl_divergence import kl_divergence
from hf_grow.training.distillation.logit_cache import write_logit_cache
from hf_grow.training.trainer.events import read_events
from hf_grow.training.trainer.state import GrowthSettings

ALPHA, TEMPERATURE = 0.3, 2.0


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 64, (3, 11), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[0, 4:7] = labels[2, 1] = -100
    return ids, labels


def distiller_of(*teachers: Any, alpha: float = ALPHA) -> Distiller:
    named = [Teacher(model=str(i), weight=1.0 + i) for i in range(len(teachers))]
    return Distiller(DistillOptions(teachers=named, alpha=alpha, temperature=TEMPERATURE), list(teachers))


def plain(
    model: Any, ids: torch.Tensor, labels: torch.Tensor, teachers: dict[float, Any], tokens: float | None, alpha: float
) -> torch.Tensor:
    """(1 - alpha) CE + alpha T^2 KL over all logits, in the model's dtype."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    following, mask = labels[:, 1:], labels[:, 1:] != -100
    total = (1 - alpha) * torch.nn.functional.cross_entropy(logits[mask], following[mask], reduction="sum")
    for weight, (said, chosen) in teachers.items():
        kl = kl_divergence(logits, said[:, :-1], TEMPERATURE, None if chosen is None else chosen[:, :-1])
        total = total + alpha * weight * kl[mask].sum()
    return total / (mask.sum() if tokens is None else tokens)


def assert_same_gradients(found: Any, expected: Any, tolerance: float) -> None:
    for (name, one), two in zip(expected.named_parameters(), found.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None), name
        if one.grad is not None:
            torch.testing.assert_close(two.grad, one.grad, rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


@each_case
@pytest.mark.parametrize(("positions", "tokens"), [(1, None), (7, 50.0), (1000, None)])
def test_loss_and_gradients_in_chunks(case: Any, positions: int, tokens: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if case.config.get("num_experts") or case.config.get("num_local_experts"):
        pytest.skip("torch's grouped multiplication knows no fp64")
    monkeypatch.setattr(module, "CHUNK", 64 * positions)
    twin, model, *others = (make(case, dtype=torch.float64, seed=s) for s in (0, 0, 1, 2))
    ids, labels = batch()
    distiller = distiller_of(*map(ModelTeacher, others))
    said = {w: t(ids) for w, t in distiller.teachers}
    expected = plain(twin.train(), ids, labels, said, tokens, ALPHA)
    (expected * 0.7).backward()
    with chunked_loss(Head(model.train()), labels, tokens, distiller=distiller, input_ids=ids):
        outputs = model(input_ids=ids, labels=labels, use_cache=False)
    (outputs.loss * 0.7).backward()
    assert outputs.logits.numel() == 1
    torch.testing.assert_close(outputs.loss, expected, rtol=0, atol=1e-12)
    assert_same_gradients(model, twin, 1e-12)
    assert "forward" not in vars(model.lm_head) and model(input_ids=ids).logits.shape == (3, 11, 64), "the model is as it was"


def test_head_follows_the_models_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that scales and caps its logits."""
    from transformers import LlamaForCausalLM

    own = LlamaForCausalLM.forward

    def capped(self: Any, *args: Any, **more: Any) -> Any:
        labels = more.pop("labels", None)
        out = own(self, *args, **more)
        out.logits = 3 * torch.tanh(out.logits / 5)
        if labels is not None:
            out.loss = self.loss_function(logits=out.logits, labels=labels, vocab_size=64)
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", capped)
    twin, model, other = (make(BY_NAME["llama"], dtype=torch.float64, seed=s, num_hidden_layers=2) for s in (0, 0, 1))
    ids, labels = batch()
    distiller = distiller_of(ModelTeacher(other))
    expected = plain(twin, ids, labels, {1.0: (other(input_ids=ids).logits.detach(), None)}, None, ALPHA)
    expected.backward()
    with chunked_loss(Head(model), labels, None, distiller=distiller, input_ids=ids):
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    assert_same_gradients(model, twin, 1e-12)


def test_frozen_heads_caches_and_no_teachers(tmp_path: Path) -> None:
    twin, model, other = (make(BY_NAME["llama"], dtype=torch.float64, seed=s, num_hidden_layers=2) for s in (0, 0, 1))
    ids, labels = batch()
    rows = [{"input_ids": np.asarray(r)} for r in ids]
    cache = write_logit_cache(other, rows, tmp_path / "cache", top_k=5, dtype="float32", identity="t")
    for each in (twin, model):
        each.lm_head.requires_grad_(False)
    for distiller, said, alpha in ((distiller_of(cache), {1.0: cache(ids)}, ALPHA), (distiller_of(cache, alpha=1.0), {1.0: cache(ids)}, 1.0),
                                   (None, {}, 0.0)):  # fmt: skip
        expected = plain(twin, ids, labels, said, None, alpha)
        with chunked_loss(Head(model), labels, None, distiller=distiller, input_ids=ids):
            loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        for each, value in ((twin, expected), (model, loss)):
            each.zero_grad()
            value.backward()
        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
        assert_same_gradients(model, twin, 1e-12)
    with torch.no_grad(), chunked_loss(Head(model), labels, None):
        assert float(model(input_ids=ids, labels=labels).loss) == pytest.approx(float(expected), abs=1e-12)


def test_second_backward_pass_fails() -> None:
    model = make(BY_NAME["llama"], num_hidden_layers=2)
    ids, labels = batch()
    with chunked_loss(Head(model), labels, None):
        loss = model(input_ids=ids, labels=labels).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_logits_of_a_batch_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of forward and backward is near as large."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else [out]:
                if isinstance(t, torch.Tensor):
                    self.numel = max(self.numel, t.numel())
            return out

    monkeypatch.setattr(module, "CHUNK", 4096 * 8)
    model, other = (make(BY_NAME["llama"], seed=s, num_hidden_layers=2, vocab_size=4096) for s in range(2))
    ids = torch.randint(3, 4096, (16, 64))
    distiller = distiller_of(ModelTeacher(other))
    with Largest() as seen:
        with chunked_loss(Head(model), ids, None, distiller=distiller, input_ids=ids):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
    assert seen.numel < ids.numel() * 4096 / 8


@pytest.mark.parametrize("case", ["llama", "llama-tied", "mixtral"])
def test_trainer_step_in_chunks(case: str, tmp_path: Path) -> None:
    """Accumulation, penalties' place in the step, the router loss and the logged loss are those of all logits."""
    found = []
    for chunked in (False, True):
        model, teacher = (make(BY_NAME[case], seed=s, num_hidden_layers=2) for s in range(2))
        growth = GrowthSettings(distiller=distiller_of(ModelTeacher(teacher)), chunked_loss=chunked,
                                aux_loss=model.router_aux_loss_coef if case == "mixtral" else None)  # fmt: skip
        found.append(gradients_of_first_step(model, tmp_path / str(chunked), growth, gradient_accumulation_steps=4))
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-6)
    for name, gradient in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], gradient, rtol=1e-5, atol=1e-6)


def test_chunked_loss_in_recipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Under autocast, with LoRA, with checkpointing, and without teachers, near the loss of all logits; what it does not work with is refused."""
    model = grown(tmp_path)
    ways: dict[str, dict[str, Any]] = {
        "bf16": {"distill": {}, "bf16": True}, "lora": {"distill": {}, "lora": {}}, "checkpointing": {"distill": {}, "activation_checkpointing": True},
        "text": {},
    }  # fmt: skip
    for name, settings in ways.items():
        losses = []
        for chunked in (False, True):
            run(capsys, "train", recipe(tmp_path, model, chunked_loss=chunked, output=str(tmp_path / f"{name}-{chunked}"), **settings))
            losses.append([e["loss"] for e in read_events(tmp_path / f"{name}-{chunked}" / "events.jsonl") if e["event"] == "log"])
        assert losses[0] == pytest.approx(losses[1], rel=2e-2 if name == "bf16" else 1e-3), name
    said = run(capsys, "train", recipe(tmp_path, model, chunked_loss=True, label_smoothing_factor=0.1), status=2)["error"]
    assert "chunked_loss: does not work with label_smoothing_factor" in said
