"""Learning rates and freezing of rows: stepping the optimizer by batches of parameters is the same as at once, bit for bit, with fewer copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from grown import plan_of
from models import BY_NAME, make
from torch import Tensor
from transformers import Adafactor

from hf_grow.convert.in_memory import grow_model
from hf_grow.training.param_updates import updates
from hf_grow.training.param_updates.masks import both, inverse
from hf_grow.training.param_updates.param_provenance import new_masks, parts
from hf_grow.training.param_updates.updates import LrFactors, ParamUpdates, steps_by_parameter

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "adafactor": lambda p: Adafactor(p, lr=1e-2, scale_parameter=False, relative_step=False),
}


class Recorder:
    """What `_hold` and `_release` do: the largest number of bytes held at a time, and how often something was held."""

    def __init__(self, made: ParamUpdates) -> None:
        self.most = self.times = 0
        hold = made._hold

        def counted(batch: Any) -> None:
            hold(batch)
            self.times += 1
            self.most = max(self.most, sum(t.nbytes for _, _, taken, _ in made._held for t in taken))

        made._hold = counted  # type: ignore[method-assign]


def run(
    optimizer: str, monkeypatch: pytest.MonkeyPatch, limit: int, *, scaler: Any = None, at_once: bool = False
) -> tuple[Any, Recorder, Any]:
    """Four steps of a wider model: rows frozen, a phase, a warm-up of new rows; the weights and states after them."""
    monkeypatch.setattr(updates, "COPY_BYTES", limit)
    source = make(BY_NAME["llama"], num_hidden_layers=2)
    plan = plan_of(source, "tile", factor=2)
    model = grow_model(source, plan)
    new = new_masks(model, plan)
    norms = parts(model, plan)["norms"]
    trains = {n: inverse(both(norms.get(n, False), inverse(new[n]))) for n in new}  # old entries of norms do not train
    made = ParamUpdates(trains, new, [new])
    made.freeze(model)
    inner = OPTIMIZERS[optimizer](model.parameters())
    made.name_groups(model, inner)
    recorder = Recorder(made)
    called: list[int] = []
    inner.register_step_post_hook(lambda *_: called.append(1))
    schedule = torch.optim.lr_scheduler.LambdaLR(inner, lambda step: 1 / (1 + step))
    for step in range(4):
        inner.zero_grad()
        ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(step))
        loss = model(ids, labels=ids, use_cache=False).loss
        (loss if scaler is None else scaler.scale(loss)).backward()
        phase = 0 if step == 0 else None
        if scaler is not None and step == 1:
            next(model.parameters()).grad.fill_(float("inf"))  # type: ignore[union-attr]
        made.mask_gradients(model, phase)
        made.before_step(model, inner, phase, LrFactors(new=0.25 * (step + 1)), at_once=at_once)
        if scaler is None:
            inner.step()
        else:
            scaler.step(inner)
            scaler.update()
        made.after_step(inner)
        schedule.step()
        assert not made._held and not made._batches
    groups = [{k: v for k, v in g.items() if k != "params"} | {"params": len(g["params"])} for g in inner.param_groups]
    state = {n: inner.state[p] for n, p in model.named_parameters()}
    return ({n: p.detach().clone() for n, p in model.named_parameters()}, state, groups, len(called)), recorder, model


def assert_same(a: Any, b: Any) -> None:
    assert a[0].keys() == b[0].keys() and a[2:] == b[2:]
    assert all(torch.equal(a[0][n], b[0][n]) for n in a[0])
    for n, state in a[1].items():
        for key, value in state.items():
            assert torch.equal(value, b[1][n][key]) if isinstance(value, Tensor) else value == b[1][n][key]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_steps_in_batches_equal_steps_at_once(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, together, _ = run(optimizer, monkeypatch, 1 << 40)
    split, apart, model = run(optimizer, monkeypatch, 1)
    middle, few, _ = run(optimizer, monkeypatch, together.most // 3)
    assert_same(whole, split)
    assert_same(whole, middle)
    largest = max(p.nbytes for p in model.parameters())
    assert apart.most <= largest < together.most / 3 and few.most <= together.most / 3
    assert together.times == 4 < few.times < apart.times
    assert whole[3] == split[3] == 4  # hooks of others see one step


def test_steps_skipped_by_a_grad_scaler(monkeypatch: pytest.MonkeyPatch) -> None:
    def scaler() -> Any:
        return torch.amp.GradScaler("cpu", init_scale=8.0)

    whole, _, _ = run("adamw", monkeypatch, 1 << 40, scaler=scaler())
    split, _, _ = run("adamw", monkeypatch, 1, scaler=scaler())
    assert_same(whole, split)
    assert whole[3] == 3
    fused, _, _ = run("adamw fused", monkeypatch, 1, scaler=scaler())
    assert_same(fused, run("adamw fused", monkeypatch, 1 << 40, scaler=scaler())[0])


def test_what_moves_weights_after_the_step_gets_all_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, together, _ = run("adamw", monkeypatch, 1 << 40)
    kept, recorder, _ = run("adamw", monkeypatch, 1, at_once=True)
    assert_same(whole, kept)
    assert recorder.most == together.most


def test_optimizers_that_need_all_parameters_at_once() -> None:
    p = [torch.nn.Parameter(torch.zeros(2))]

    class Other(torch.optim.SGD):
        pass

    assert (
        steps_by_parameter(torch.optim.AdamW(p))
        and not steps_by_parameter(torch.optim.LBFGS(p))
        and not steps_by_parameter(Other(p, lr=1.0))
    )
