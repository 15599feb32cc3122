"""Penalties: gradient, proximal step and value against their formulas; accumulation, dtypes, memory, resuming, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from grown import dense_mask, plan_of
from models import BY_NAME, make, on_disk, tokens
from penalties import backward, grads_on_disk, importances, plain_penalty, random_importance, shaken
from torch import Tensor
from transformers import PreTrainedModel

from hf_grow.convert.in_memory import grow_model
from hf_grow.errors import InputError
from hf_grow.growth.tensormap import Expr, Take
from hf_grow.options import parse
from hf_grow.training.config.regularizer_options import PenaltyOptions
from hf_grow.training.param_updates.param_provenance import new_masks
from hf_grow.training.param_updates.parameter_map import parameters
from hf_grow.training.regularizers.build import make_penalty, penalty_bytes
from hf_grow.training.regularizers.penalty import Penalty, QuadraticPenalty
from hf_grow.training.regularizers.si import SynapticIntelligence

LAMBDA = 7.0
FAMILIES = ["llama", "llama-tied", "mixtral", "qwen3_moe-mixed"]


def small(name: str = "llama", **changes: Any) -> PreTrainedModel:
    return make(BY_NAME[name], **{"num_hidden_layers": 2, **changes})


def options(kind: str = "ewc", **given: Any) -> PenaltyOptions:
    """As a recipe gives them."""
    return parse(PenaltyOptions, {"kind": kind, "lambda": LAMBDA, **given}, where="test")


def ewc(model: PreTrainedModel, tmp_path: Path, **given: Any) -> tuple[Penalty, dict[str, Tensor]]:
    fisher = random_importance(model, tmp_path / "fisher.safetensors")
    penalty = make_penalty(options(fisher=str(tmp_path / "fisher.safetensors"), **given), model)
    assert penalty is not None
    penalty.attach(model)
    return penalty, fisher


# ---- the formula ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_and_value_equal_closed_form(name: str, tmp_path: Path) -> None:
    model = make(BY_NAME[name], dtype=torch.float64)
    penalty, fisher = ewc(model, tmp_path)
    anchor = shaken(model)
    backward(model)
    task = {n: g.clone() for n, g in grads_on_disk(model).items()}
    penalty.add_gradient()
    now = on_disk(model)
    for n, found in grads_on_disk(model).items():
        # Held in fp32: the anchor of an fp64 model is rounded.
        torch.testing.assert_close(found - task[n], LAMBDA * fisher[n] * (now[n] - anchor[n]), rtol=1e-6, atol=1e-6)
    assert penalty.value() == pytest.approx(plain_penalty(LAMBDA, fisher, now, anchor), rel=1e-6)


def test_gradient_equals_that_of_loss_term(tmp_path: Path) -> None:
    model = small("llama-tied")
    penalty, _ = ewc(model, tmp_path)
    assert isinstance(penalty, QuadraticPenalty)
    shaken(model)
    penalty.add_gradient()
    found = {n: p.grad for n, p in model.named_parameters()}
    term = penalty.term()
    expected = torch.autograd.grad(term, list(model.parameters()))
    for (n, got), right in zip(found.items(), expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-6, atol=1e-6, msg=n)
    assert penalty.value() == pytest.approx(float(term.detach()), rel=1e-5)


def test_gradient_is_zero_at_anchor(tmp_path: Path) -> None:
    model = small()
    penalty, _ = ewc(model, tmp_path)
    backward(model)
    before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    penalty.add_gradient()
    assert penalty.value() == 0.0
    assert all(torch.equal(p.grad, before[n]) for n, p in model.named_parameters() if p.grad is not None)


@pytest.mark.parametrize("form", ["loss", "proximal"])
@pytest.mark.parametrize("accumulation", [2, 4])
def test_penalty_with_gradient_accumulation(form: str, accumulation: int, tmp_path: Path) -> None:
    rows = torch.randint(0, 64, (8, 12), generator=torch.Generator().manual_seed(2))
    after = []
    for parts in (1, accumulation):
        model = small(dtype=torch.float64)
        penalty, _ = ewc(model, tmp_path, form=form)
        # Norms and attention compute in fp32 inside an fp64 model, and batches of other sizes round otherwise; a large eps does not magnify that.
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            for part in rows.chunk(parts):
                backward(model, part, 1 / parts)
            penalty.add_gradient()
            penalty.before_step()
            optimizer.step()
            penalty.after_step(1e-3)
        after.append((torch.cat([p.detach().flatten() for p in model.parameters()]), penalty.value()))
    torch.testing.assert_close(after[0][0], after[1][0], rtol=0, atol=1e-6)
    assert after[0][1] == pytest.approx(after[1][1], rel=1e-3) and after[0][1] > 0


def test_gradient_is_scaled_with_loss_scale(tmp_path: Path) -> None:
    model = small()
    penalty, fisher = ewc(model, tmp_path)
    anchor = shaken(model)
    penalty.add_gradient(scale=1024.0)
    now, found = on_disk(model), grads_on_disk(model)
    for n in fisher:
        torch.testing.assert_close(found[n], 1024 * LAMBDA * fisher[n] * (now[n] - anchor[n]))


def test_frozen_parameters_have_no_penalty_until_unfrozen(tmp_path: Path) -> None:
    model = small()
    penalty, _ = ewc(model, tmp_path)
    shaken(model)
    model.model.embed_tokens.weight.requires_grad_(False)
    penalty.add_gradient()
    assert model.model.embed_tokens.weight.grad is None
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.model.embed_tokens.weight.requires_grad_(True)
    penalty.add_gradient()
    assert model.model.embed_tokens.weight.grad is not None


def test_proximal_step_minimizes_its_objective(tmp_path: Path) -> None:
    """x = argmin 1/2 |x - w|^2 + lr * penalty(x): its gradient there is zero, and x is what the formula says."""
    model = small("mixtral")
    penalty, fisher = ewc(model, tmp_path, form="proximal")
    anchor = shaken(model)
    before = {n: t.clone() for n, t in on_disk(model).items()}
    penalty.add_gradient()
    assert all(p.grad is None for p in model.parameters())
    lr = 0.05
    penalty.after_step(lr)
    for n, x in on_disk(model).items():
        t = lr * LAMBDA * fisher[n]
        torch.testing.assert_close(x, (before[n] + t * anchor[n]) / (1 + t), rtol=1e-5, atol=1e-6)
        assert (x - before[n] + t * (x - anchor[n])).abs().max() < 1e-5
    assert (on_disk(model)["model.embed_tokens.weight"] - before["model.embed_tokens.weight"]).abs().max() > 1e-3


def test_proximal_step_with_learning_rate_per_parameter(tmp_path: Path) -> None:
    model = small()
    penalty, fisher = ewc(model, tmp_path, form="proximal")
    anchor, first = shaken(model), model.model.embed_tokens.weight
    before = {n: t.clone() for n, t in on_disk(model).items()}
    penalty.after_step({first: 0.2})
    name = "model.embed_tokens.weight"
    t = 0.2 * LAMBDA * fisher[name]
    torch.testing.assert_close(first.data, (before[name] + t * anchor[name]) / (1 + t), rtol=1e-5, atol=1e-6)
    assert all(torch.equal(x, before[n]) for n, x in on_disk(model).items() if n != name)


# ---- dtypes, memory ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["fp32", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_storage_and_weight_dtypes(storage: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = small(dtype=torch.bfloat16).to(dtype)  # a bf16 checkpoint, loaded as either
    fisher = random_importance(model, tmp_path / "f.safetensors", storage=storage)
    penalty = make_penalty(options(fisher=str(tmp_path / "f.safetensors"), storage=storage), model)
    assert penalty is not None
    penalty.attach(model)
    assert penalty.value() == 0.0  # bf16 holds a bf16 checkpoint exactly
    anchor = shaken(model)
    penalty.add_gradient()
    now, found = on_disk(model), grads_on_disk(model)
    for n in fisher:
        right = LAMBDA * fisher[n].float() * (now[n].float() - anchor[n].float())
        tolerance = 2.0**-7 if torch.bfloat16 in (dtype, fisher[n].dtype) else 1e-6
        torch.testing.assert_close(found[n].float(), right, rtol=tolerance, atol=1e-7)
    assert penalty.value() == pytest.approx(plain_penalty(LAMBDA, fisher, now, anchor), rel=1e-2)
    assert penalty.nbytes() == 2 * model.num_parameters() * (4 if storage == "fp32" else 2)


@pytest.mark.parametrize("kind", ["ewc", "si", "l2sp", "collapsed"])
def test_penalty_bytes_equals_nbytes(kind: str, tmp_path: Path) -> None:
    source = small()
    plan = plan_of(source, "tile", factor=2)
    model = grow_model(source, plan)
    of = source if kind == "collapsed" else model
    given: dict[str, Any] = {"collapsed": True} if kind == "collapsed" else {}
    if kind in ("ewc", "collapsed"):
        random_importance(of, tmp_path / "f.safetensors")
        given["fisher"] = str(tmp_path / "f.safetensors")
    chosen = options("ewc" if kind == "collapsed" else kind, **given)
    penalty = make_penalty(chosen, model, plan)
    assert penalty is not None
    with torch.device("meta"):
        shapes = type(model)(model.config)
    expected = {"ewc": 8, "si": 24, "l2sp": 4, "collapsed": 8}[kind] * of.num_parameters()
    assert penalty_bytes(chosen, shapes, plan) == penalty.nbytes() == expected


# ---- the other kinds --------------------------------------------------------------------------------------------------------------------


def test_kind_none_has_no_penalty() -> None:
    assert make_penalty(PenaltyOptions(), small()) is None


def test_online_ewc_decays_older_tasks(tmp_path: Path) -> None:
    model = small("mixtral")
    files = [tmp_path / f"{i}.safetensors" for i in range(3)]
    values = [random_importance(model, f, seed=i) for i, f in enumerate(files)]
    penalty = make_penalty(options("online-ewc", fisher=[str(f) for f in files], decay=0.5), model)
    assert penalty is not None
    penalty.attach(model)
    anchor = shaken(model)
    penalty.add_gradient()
    now, found = on_disk(model), grads_on_disk(model)
    for n in values[0]:
        f = 0.25 * values[0][n] + 0.5 * values[1][n] + values[2][n]
        torch.testing.assert_close(found[n], LAMBDA * f * (now[n] - anchor[n]))


def test_l2sp_uses_mean_of_fisher(tmp_path: Path) -> None:
    model = small("mixtral")
    fisher = random_importance(model, tmp_path / "f.safetensors")
    mean = torch.cat([f.flatten() for f in fisher.values()]).mean()
    for given, even in (({}, 1.0), ({"fisher": str(tmp_path / "f.safetensors")}, float(mean))):
        fresh = small("mixtral")
        penalty = make_penalty(options("l2sp", **given), fresh)
        assert penalty is not None
        penalty.attach(fresh)
        anchor = shaken(fresh)
        penalty.add_gradient()
        now, found = on_disk(fresh), grads_on_disk(fresh)
        for n in found:
            torch.testing.assert_close(found[n], LAMBDA * even * (now[n] - anchor[n]), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["ewc", "l2sp"])
def test_over_inherited_leaves_new_weights_free(kind: str, tmp_path: Path) -> None:
    source = small()
    plan = plan_of(source, "tile", deeper="after", factor=2)
    model = grow_model(source, plan)
    random_importance(model, tmp_path / "f.safetensors")
    given = {"fisher": str(tmp_path / "f.safetensors")} if kind == "ewc" else {}
    penalty = make_penalty(options(kind, over="inherited", **given), model, plan)
    assert penalty is not None
    penalty.attach(model)
    shaken(model)
    penalty.add_gradient()
    masks = new_masks(model, plan)
    for n, p in parameters(model).items():
        mask = dense_mask(masks[n], p.shape)
        assert p.grad is not None and not p.grad[mask].any() and p.grad[~mask].all()


# ---- synaptic intelligence ----------------------------------------------------------------------------------------------------------------


def test_si_path_uses_task_gradient_only() -> None:
    """Against a slow loop that keeps everything, under a penalty that pulls, clipping, and accumulation."""
    model = small(dtype=torch.float64)
    penalty = make_penalty(options("si", xi=0.01, consolidate_every=3), model)
    assert isinstance(penalty, SynapticIntelligence)
    penalty.attach(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    names = [n for n, _ in model.named_parameters()]
    weights = lambda: [p.detach().clone() for p in model.parameters()]  # noqa: E731
    anchor, start, f, omega = weights(), weights(), [torch.zeros_like(p) for p in model.parameters()], [0.0 for _ in names]
    for step in range(1, 8):
        optimizer.zero_grad()
        for part in torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(step)).chunk(2):
            backward(model, part, 0.5)
        task = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        before = weights()
        penalty.add_gradient()
        for i, p in enumerate(model.parameters()):
            assert p.grad is not None
            torch.testing.assert_close(p.grad - task[i], LAMBDA * f[i] * (before[i] - anchor[i]), rtol=1e-5, atol=1e-6)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        penalty.before_step()
        optimizer.step()
        penalty.after_step(1e-2)
        omega = [o - g * (p - b) for o, g, p, b in zip(omega, task, weights(), before, strict=True)]
        if step % 3 == 0:
            f = [x + 2 * o.clamp(min=0) / ((p - s) ** 2 + 0.01) for x, o, p, s in zip(f, omega, weights(), start, strict=True)]
            anchor, start, omega = weights(), weights(), [0.0 for _ in names]
    found = importances(penalty)
    for n, right in zip(names, f, strict=True):
        torch.testing.assert_close(found[n].double(), right, rtol=1e-5, atol=1e-6)
        assert (found[n] >= 0).all() and (found[n] > 0).any()
    assert penalty.value() > 0


class _Bowl(torch.nn.Module):
    """1/2 sum h w^2, whose second derivative is known."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([3.0, -2.0, 1.0, 0.0], dtype=torch.float64))
        self.h = torch.tensor([1.0, 4.0, 0.25, 2.0], dtype=torch.float64)

    def loss(self) -> Tensor:
        return 0.5 * (self.h * self.w**2).sum()


def test_si_importance_of_quadratic_loss() -> None:
    bowl = _Bowl()
    penalty = SynapticIntelligence(1.0, {"w": bowl.w.detach().clone()}, None, xi=1e-9, storage=torch.float64)
    penalty.attach(bowl)
    optimizer = torch.optim.SGD(bowl.parameters(), lr=4e-3)
    first = float(bowl.loss().detach())
    for _ in range(8_000):
        optimizer.zero_grad()
        bowl.loss().backward()
        penalty.add_gradient()
        penalty.before_step()
        optimizer.step()
        penalty.after_step(4e-3)
    gained = first - float(bowl.loss().detach())
    assert float(penalty.path["w"]["omega"].sum()) == pytest.approx(gained, rel=1e-2)
    penalty.consolidate()
    f = importances(penalty)["w"]
    torch.testing.assert_close(f[:3], bowl.h[:3], rtol=1e-2, atol=0)
    assert f[3] == 0  # it never moved


def test_si_resume(tmp_path: Path) -> None:
    def run(model: PreTrainedModel, penalty: Penalty, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            backward(model, torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(step)))
            penalty.add_gradient()
            penalty.before_step()
            optimizer.step()
            penalty.after_step(1e-2)

    chosen = options("si", xi=0.01, consolidate_every=2)
    model, other = small(), small()
    whole, stopped = make_penalty(chosen, model), make_penalty(chosen, other)
    assert whole is not None and stopped is not None
    whole.attach(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.0)
    run(model, whole, optimizer, range(7))
    stopped.attach(other)
    run(other, stopped, torch.optim.SGD(other.parameters(), lr=1e-2), range(5))
    torch.save(stopped.whole_state(), tmp_path / "penalty.pt")
    resumed_model = small()
    resumed = make_penalty(chosen, resumed_model)
    assert resumed is not None
    resumed_model.load_state_dict(other.state_dict())
    resumed.attach(resumed_model)
    resumed.load_whole_state(torch.load(tmp_path / "penalty.pt", weights_only=True))
    run(resumed_model, resumed, torch.optim.SGD(resumed_model.parameters(), lr=1e-2), range(5, 7))
    assert resumed.value() == whole.value() > 0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed_model.parameters(), strict=True))


@pytest.mark.parametrize("name", ["llama-tied", "mixtral"])
def test_si_importance_file_is_read_by_later_run(name: str, tmp_path: Path) -> None:
    model = small(name)
    penalty = make_penalty(options("si", xi=0.01), model)
    assert isinstance(penalty, SynapticIntelligence)
    penalty.attach(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        backward(model)
        penalty.add_gradient()
        penalty.before_step()
        optimizer.step()
        penalty.after_step(1e-2)
    penalty.finish(tmp_path, model)
    later = make_penalty(options("si", fisher=str(tmp_path / "importance.safetensors")), model)
    assert isinstance(later, SynapticIntelligence) and not later.collect
    later.attach(model)
    assert later.value() == 0
    assert all(torch.equal(f, importances(penalty)[n]) for n, f in importances(later).items())
    shaken(model)
    assert later.value() > 0
    with pytest.raises(InputError, match="the weights differ"):
        make_penalty(options("si", fisher=str(tmp_path / "importance.safetensors")), small(name))


def test_si_ignores_skipped_steps() -> None:
    model = small()
    penalty = make_penalty(options("si"), model)
    assert isinstance(penalty, SynapticIntelligence)
    penalty.attach(model)
    backward(model)
    next(model.parameters()).grad.fill_(float("inf"))  # type: ignore[union-attr]
    penalty.add_gradient(scale=2.0)
    penalty.before_step()
    penalty.after_step(1e-3)  # the GradScaler skipped optimizer.step
    assert all(not kept["omega"].any() for kept in penalty.path.values())


# ---- resuming, wrapping ------------------------------------------------------------------------------------------------------------------


def test_second_attach_keeps_anchor(tmp_path: Path) -> None:
    model = small()
    penalty, _ = ewc(model, tmp_path)
    shaken(model)
    value = penalty.value()
    penalty.attach(torch.nn.parallel.DataParallel(model))
    assert penalty.value() == value > 0


def test_state_of_another_penalty_or_anchor_is_refused(tmp_path: Path) -> None:
    model = small()
    penalty, _ = ewc(model, tmp_path)
    state = penalty.state_dict()
    torch.save(state, tmp_path / "penalty.pt")
    penalty.load_state_dict(torch.load(tmp_path / "penalty.pt", weights_only=True))
    assert sum(len(v) for v in state.values()) < 100_000
    si = make_penalty(options("si"), model)
    assert si is not None
    with pytest.raises(InputError, match="saved with penalty 'ewc'"):
        si.load_state_dict(state)
    shaken(model)
    random_importance(model, tmp_path / "g.safetensors")
    other = make_penalty(options(fisher=str(tmp_path / "g.safetensors")), model)
    assert other is not None
    with pytest.raises(InputError, match="anchored to other weights"):
        other.load_state_dict(state)


# ---- collapsed coordinates ------------------------------------------------------------------------------------------------------------------


def matrices(expr: Expr, axes: Any) -> list[tuple[int, Tensor]]:
    """(dimension, B or A as a dense matrix target x source) of every map on the way to the source's weights."""
    if not isinstance(expr, Take):
        first = next(iter(expr.children()), None)
        return [] if first is None else matrices(first, axes)
    rows = list(axes[expr.axis].rows())
    dense = torch.zeros(len(rows), axes[expr.axis].source_size, dtype=torch.float64)
    for at, (source, a, b) in enumerate(rows):
        if source is not None:
            dense[at, source] = b if expr.role == "out" else a
    return [*matrices(expr.of, axes), (expr.dim, dense)]


WIDTHS: dict[str, dict[str, Any]] = {
    "x2 split": {"factor": 2, "symmetry": "split"},
    "x2 noise": {"factor": 2, "symmetry": "noise"},
    "uneven": {"hidden": 60, "heads": 10, "kv_heads": 2, "intermediate": 50},
    "head_dim": {"head_dim": 16},
    "pad": {"method": "pad", "hidden": 96, "heads": 8, "kv_heads": 2, "new_heads": "null"},
    "with new blocks": {"factor": 2, "deeper": "after"},
}


@pytest.mark.parametrize("way", WIDTHS)
@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3", "mixtral"])
def test_collapsed_penalty_equals_dense_matrices(name: str, way: str, tmp_path: Path) -> None:
    source = small(name, dtype=torch.float64)
    given = dict(WIDTHS[way])
    plan = plan_of(source, given.pop("method", "tile"), **given)
    model = grow_model(source, plan)
    fisher = random_importance(source, tmp_path / "f.safetensors")
    penalty = make_penalty(options(fisher=str(tmp_path / "f.safetensors"), collapsed=True), model, plan)
    assert penalty is not None
    penalty.attach(model)
    assert penalty.value() < 1e-9  # in fp32: the anchor is rounded
    shaken(model)
    now = {n: t.double().requires_grad_(True) for n, t in on_disk(model).items()}
    total: Any = 0.0
    weights = on_disk(source)
    free = [f"layers.{i}." for i, o in enumerate(plan.growth.layers) if o.identity]
    for n, expr in plan.growth.tensors.items():
        if any(f in n for f in free):
            continue
        collapsed = now[n]
        for dim, dense in matrices(expr, plan.growth.axes):
            collapsed = torch.tensordot(collapsed, dense, dims=([dim], [0])).movedim(-1, dim)
        origin = next(expr.sources()).name
        total = total + 0.5 * LAMBDA * (fisher[origin] * (collapsed - weights[origin]) ** 2).sum()
    assert penalty.value() == pytest.approx(float(total.detach()), rel=1e-6) and float(total.detach()) > 1
    expected = torch.autograd.grad(total, list(now.values()), allow_unused=True)
    penalty.add_gradient()
    for n, found in grads_on_disk(model).items():
        right = expected[list(now).index(n)]
        torch.testing.assert_close(found, torch.zeros_like(found) if right is None else right, rtol=1e-5, atol=1e-5, msg=n)


def test_collapsed_is_refused_without_inverse(tmp_path: Path) -> None:
    source = small()
    random_importance(source, tmp_path / "f.safetensors")
    chosen = options(fisher=str(tmp_path / "f.safetensors"), collapsed=True)
    for method, given in (("stack", {}), ("aki", {"factor": 2}), ("dus", {"drop": 0})):
        plan = plan_of(source, method, **given)
        with pytest.raises(InputError, match="collapsed: "):
            make_penalty(chosen, grow_model(source, plan), plan)
    with pytest.raises(InputError, match="collapsed needs growth"):
        make_penalty(chosen, source, None)
    plan = plan_of(source, "tile", factor=2)
    random_importance(small(seed=3), tmp_path / "f.safetensors")
    with pytest.raises(InputError, match="the weights differ"):
        make_penalty(chosen, grow_model(source, plan), plan)


# ---- bad input ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"kind": "ewc"}, "needs one file"),
        ({"kind": "online-ewc"}, "needs files"),
        ({"kind": "l2sp", "collapsed": True, "decay": 0.5, "consolidate_every": 3}, "collapsed belongs.*decay belongs.*consolidate_every belongs"),
        ({"kind": "ewc", "fisher": "f", "lambda": "1e1"}, "is a string"),
        ({"kind": "ewc", "fisher": "f", "lambda": -1.0}, "greater than or equal to 0"),
        ({"kind": "ewc", "fisher": "f", "strength": 1.0}, "unknown key"),
        ({"kind": "ewc", "fisher": "f", "storage": "fp16"}, "'fp32' or 'bf16'"),
        ({"kind": "si", "xi": 0.0}, "greater than 0"),
    ],
)  # fmt: skip
def test_invalid_options_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        parse(PenaltyOptions, given, where="penalty")


def test_fisher_of_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    random_importance(small(), path)
    chosen = options(fisher=str(path))
    assert make_penalty(chosen, small()) is not None
    for other, words in (
        (small(num_hidden_layers=3), "9 tensors are in only one"),
        (small(intermediate_size=44), "has shape"),
        (small(seed=1), "the weights differ"),
    ):
        with pytest.raises(InputError, match=words):
            make_penalty(chosen, other)
    tuned = small()
    with torch.no_grad():
        tuned.model.layers[1].mlp.up_proj.weight.mul_(1.01)  # a fine-tuned sibling
    with pytest.raises(InputError, match="the weights differ"):
        make_penalty(chosen, tuned)


def test_invalid_importance_files_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model, path = small(), tmp_path / "f.safetensors"
    chosen = options(fisher=str(path))
    with pytest.raises(InputError, match="does not exist"):
        make_penalty(chosen, model)
    path.write_bytes(b"garbage")
    with pytest.raises(InputError, match="cannot be read"):
        make_penalty(chosen, model)
    save_file(on_disk(model), path)
    with pytest.raises(InputError, match="not an importance file"):
        make_penalty(chosen, model)
    meta = {"format": "hf-grow importance 1", "sample": ""}
    save_file({n: t.half() for n, t in on_disk(model).items()}, path, meta)
    with pytest.raises(InputError, match="squares overflow F16"):
        make_penalty(chosen, model)
    from hf_grow.training.regularizers.importance_file import model_fingerprint

    save_file(on_disk(model), path, meta | {"sample": model_fingerprint(model)})
    penalty = make_penalty(chosen, model)
    assert penalty is not None
    with pytest.raises(InputError, match="negative or not finite"):
        penalty.attach(model)


def test_new_modules_have_no_anchor(tmp_path: Path) -> None:
    model = small()
    penalty, _ = ewc(model, tmp_path)
    model.adapter = torch.nn.Linear(2, 2)
    with pytest.raises(InputError, match="no anchor for adapter"):
        penalty.attach(model)


@pytest.mark.slow
def test_ewc_overhead_benchmark_runs(tmp_path: Path) -> None:
    script = Path(__file__).parents[3] / "benchmarks" / "ewc_overhead.py"
    subprocess.run([sys.executable, script, "--size", "tiny", "--rounds", "1", "--batch", "2", "--out", tmp_path / "r.md"], check=True)
    text = (tmp_path / "r.md").read_text()
    assert all(f"| {arm} |" in text for arm in ("none", "EWC", "EWC, proximal step", "L2-SP", "SI, following the path"))


@pytest.mark.slow
def test_trainer_overhead_benchmark_runs(tmp_path: Path) -> None:
    script = Path(__file__).parents[3] / "benchmarks" / "trainer_overhead.py"
    words = ["--size", "tiny", "--rounds", "1", "--steps", "2", "--batch", "2"]
    subprocess.run([sys.executable, script, *words, "--out", tmp_path / "r.md"], check=True)
    text = (tmp_path / "r.md").read_text()
    assert all(f"| {arm} |" in text for arm in ("plain Trainer", "EWC", "warm-up of new rows", "EWC and warm-up", "copies of a step"))


def test_test_models_route_tokens_to_every_expert() -> None:
    """Gradients of zero would make some of the tests above say nothing."""
    model = small("mixtral")
    backward(model, tokens(model, 40))
    assert all(g.any() for g in grads_on_disk(model).values())
