"""The dual map: gradients, squared gradients and AdamW's moments through the same plan as the weights, against autograd.

Left out of the comparison is what growth set to zero: rows that write, or columns that read, coordinates which did not exist before. Their
gradients come from random values that are new too, and the map gives them zero. Random new values themselves must get, as the map says,
exactly no gradient at first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from exact import logits
from grown import gradients, plan_of, through
from models import BY_NAME, CASES, Case, each_case, from_disk, make, on_disk, tokens
from torch import Tensor
from transformers import PreTrainedModel

from hf_grow.convert.in_memory import disk_names, grow_model
from hf_grow.growth.plan import GrowthPlan
from hf_grow.growth.tensormap import Expr, Noise

TOLERANCE = 1e-9

WAYS: dict[str, dict[str, Any]] = {
    "x2": {"factor": 2},
    "x3": {"factor": 3},
    "1.25x": {"hidden": 60, "heads": 10, "kv_heads": 2},
    "2.5x": {"hidden": 120, "heads": 12, "kv_heads": 2},
    "1.25x by eps": {"hidden": 60, "heads": 10, "kv_heads": 2, "rms_mode": "eps"},
    "padded": {"method": "pad", "hidden": 96, "heads": 8, "kv_heads": 2, "new_heads": "null"},
    "fpi": {"method": "fpi", "factor": 2},
    "ffn null": {"intermediate": 52, "ffn": "null"},
    "ffn copied unevenly": {"intermediate": 100, "ffn": "copies"},
    "null heads": {"heads": 8, "kv_heads": 2, "new_heads": "null"},
    "head_dim by a whole factor": {"head_dim": 24},
    "head_dim by theta": {"head_dim": 18},
}
EVERYWHERE = ("x2", "1.25x")  # the others on the cases that can tell something
TELLING = ("llama-tied", "llama-bias", "mixtral", "qwen2", "qwen3-tied")


def width_plan(model: PreTrainedModel, way: str, deeper: str = "") -> GrowthPlan:
    options = dict(WAYS[way])
    if "heads" in options and model.config.num_key_value_heads == model.config.num_attention_heads:
        options |= {"heads": 12, "kv_heads": 12}
    method = options.pop("method", "tile")
    symmetry = {} if method == "fpi" else {"symmetry": "none"}
    return plan_of(model, method, deeper=deeper, **symmetry, **options)


def check_gradients(model: PreTrainedModel, plan: GrowthPlan, leave_out: Callable[[str], bool] = lambda name: False) -> None:
    grown, ids = grow_model(model, plan), tokens(model)
    mapped, found = through(plan, gradients(model, ids), "grad"), gradients(grown, ids)
    for name, weight in on_disk(grown).items():
        if not leave_out(name):
            assert found[name].abs().max() > 1e-6, f"{name}: nothing to compare"
            assert (mapped[name] - found[name])[weight != 0].abs().max() < TOLERANCE, name


CASE_WAYS = [(c, w) for c in CASES for w in WAYS if w in EVERYWHERE or c.name in TELLING if not ("eps" in w and "qwen3" in c.family)]


@pytest.mark.parametrize(("case", "way"), CASE_WAYS, ids=str)
def test_gradients_of_the_grown_model_are_the_mapped_gradients(case: Case, way: str, exact_math: None) -> None:
    model = make(case, dtype=torch.float64)
    check_gradients(model, width_plan(model, way))


@each_case
def test_whole_factors_leave_no_coordinate_out(case: Case, exact_math: None) -> None:
    model = make(case, dtype=torch.float64)
    assert all((weight != 0).all() for weight in on_disk(grow_model(model, width_plan(model, "x2"))).values())


@pytest.mark.parametrize("name", TELLING)
def test_what_is_left_out_has_a_gradient_that_the_map_does_not_know(name: str, exact_math: None) -> None:
    """Why zeros are left out: they are alive, through random values that the source never had."""
    model = make(BY_NAME[name], dtype=torch.float64)
    plan = width_plan(model, "ffn null")
    grown = grow_model(model, plan)
    found, mapped = gradients(grown, tokens(model)), through(plan, gradients(model, tokens(model)), "grad")
    down = [n for n in found if n.endswith(("down_proj.weight", "w2.weight"))]
    assert all((found[n][:, 40:] != 0).any() and not mapped[n][:, 40:].any() for n in down)


@pytest.mark.parametrize("deeper", ["before", "after"])
@pytest.mark.parametrize("name", TELLING)
def test_gradients_go_through_width_and_identity_blocks_together(name: str, deeper: str, exact_math: None) -> None:
    """Old blocks only: an identity block passes nothing to its own weights, while the map, which copies, gives it its origin's gradients."""
    model = make(BY_NAME[name], dtype=torch.float64)
    plan = width_plan(model, "x2", deeper)
    new = [f"layers.{i}." for i, layer in enumerate(plan.growth.layers) if layer.identity]
    assert len(new) == 2
    check_gradients(model, plan, leave_out=lambda name: any(place in name for place in new))
    grown = grow_model(model, plan)
    weights = on_disk(grown)
    for tensor, gradient in gradients(grown, tokens(model)).items():
        if any(place in tensor for place in new):
            assert not gradient[weights[tensor] != 0].any()


# ---- keys and values that share unevenly ------------------------------------------------------------------------------------------------

# Even: every copy of a kv head serves all query heads of its group alike.
EVEN = [((6, 2), (12, 4)), ((6, 2), (12, 2)), ((6, 2), (9, 3)), ((6, 2), (12, 3)), ((6, 3), (15, 5)), ((6, 1), (12, 2))]
UNEVEN = [((6, 2), (6, 6)), ((8, 2), (8, 4)), ((6, 1), (12, 4)), ((6, 2), (8, 4)), ((6, 2), (16, 8)), ((6, 1), (8, 2))]


def heads_plan(old: tuple[int, int], new: tuple[int, int]) -> tuple[PreTrainedModel, GrowthPlan]:
    model = make(BY_NAME["qwen2"], dtype=torch.float64, num_attention_heads=old[0], num_key_value_heads=old[1], head_dim=8)
    return model, plan_of(model, "tile", heads=new[0], kv_heads=new[1], symmetry="none")


@pytest.mark.parametrize(("old", "new"), EVEN, ids=str)
def test_keys_and_values_that_serve_their_queries_evenly_have_exact_gradients(old: Any, new: Any, exact_math: None) -> None:
    check_gradients(*heads_plan(old, new))


@pytest.mark.parametrize(("old", "new"), UNEVEN, ids=str)
def test_keys_and_values_that_serve_unevenly_have_exact_gradients_only_in_sum(old: Any, new: Any, exact_math: None) -> None:
    """Copies of one kv head that serve different query heads: each gets its share of the old gradient, not its own part of it."""
    model, plan = heads_plan(old, new)
    uneven = ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias")
    check_gradients(model, plan, leave_out=lambda name: name.endswith(uneven))
    source, found = gradients(model, tokens(model)), gradients(grow_model(model, plan), tokens(model))
    mapped = through(plan, source, "grad")
    for name in (n for n in source if n.endswith(uneven)):
        assert (mapped[name] - found[name]).abs().max() > 1e-5
        for grown_gradient in (mapped[name], found[name]):
            total = torch.zeros_like(source[name])
            for i, head in enumerate(grown_gradient.split(8)):  # new kv head i is a copy of kv head i mod G
                at = 8 * (i % old[1])
                total[at : at + 8] += head
            assert (total - source[name]).abs().max() < TOLERANCE


# ---- squared gradients ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama-tied", "mixtral"])
def test_squares_go_through_the_map_as_the_square_of_the_map(name: str, way: str, exact_math: None) -> None:
    model = make(BY_NAME[name], dtype=torch.float64)
    plan, gradient = width_plan(model, way), gradients(model, tokens(model))
    once = through(plan, {n: g.abs() for n, g in gradient.items()}, "grad")
    squared = through(plan, {n: g.square() for n, g in gradient.items()}, "grad2")
    for tensor in once:
        torch.testing.assert_close(squared[tensor], once[tensor].square(), rtol=1e-12, atol=0)


def fisher(model: PreTrainedModel, samples: Tensor) -> dict[str, Tensor]:
    """The diagonal from per-sample gradients: the mean of their squares."""
    each = [gradients(model, sample[None]) for sample in samples]
    return {n: torch.stack([g[n].square() for g in each]).mean(0) for n in each[0]}


@pytest.mark.parametrize("way", ["x2", "1.25x", "fpi", "ffn copied unevenly", "head_dim by theta"])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3", "mixtral"])
def test_the_fisher_diagonal_of_the_grown_model_is_the_mapped_diagonal(name: str, way: str, exact_math: None) -> None:
    model = make(BY_NAME[name], dtype=torch.float64)
    plan, samples = width_plan(model, way), torch.cat([tokens(model), tokens(model).flip(1)])
    grown = grow_model(model, plan)
    mapped, found = through(plan, fisher(model, samples), "grad2"), fisher(grown, samples)
    for tensor, weight in on_disk(grown).items():
        assert (mapped[tensor] - found[tensor])[weight != 0].abs().max() < 1e-12 + 1e-10 * found[tensor].max(), tensor


# ---- AdamW on the grown model takes the steps it would have taken -----------------------------------------------------------------------


def step_factors(plan: GrowthPlan) -> dict[str, Tensor]:
    """The factor on the learning rate of every entry with which AdamW repeats on the grown model the steps of the source model.

    Gradients map by G' = B_out G A_in^T and Adam is blind to scale: with one nonzero a row in A and B, the update of entry (i, j) of the grown
    tensor is that of its source (s(i), t(j)), signs kept. Weights map by W' = A_out W B_in^T, so it must be taken a_i b_j times: the factor is
    what the *weight* map makes of ones. Hence, for n even copies: 1 on embeddings (tied too) and on whatever only grew rows, 1/n on columns
    grown n times, 1 on norms, but 1/n on the final norm before a tied head, since it carries the head's share; 1/sqrt(r) or sqrt(r) where
    the RMSNorm rule scales; per entry where copies are uneven. New entries have no old step to repeat: 1. Decoupled weight decay is
    lr * decay, so decay is divided by the same factor; eps, which Adam adds to a gradient's size, is multiplied by what the gradient map makes
    of ones.
    """

    def quiet(expr: Expr) -> Expr:
        return replace(expr, std=0.0, like=None) if isinstance(expr, Noise) else expr.map_children(quiet)

    plain = replace(plan, growth=replace(plan.growth, tensors={n: quiet(e) for n, e in plan.growth.tensors.items()}))
    ones = {n: torch.ones(t.shape, dtype=torch.float64) for n, t in plan.source.tensors.items()}
    return {n: torch.where(f == 0, 1.0, f) for n, f in through(plain, ones, "weight").items()}


def in_memory(plan: GrowthPlan, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values by names on disk as the grown model holds its parameters."""
    return {n: p.detach() for n, p in from_disk(plan.growth.config, tensors, torch.float64).named_parameters()}


Optimizer = torch.optim.AdamW
BETAS = (0.9, 0.95)


def train(model: PreTrainedModel, optimizer: Optimizer, steps: range, factors: Mapping[str, Tensor] | None = None) -> list[Tensor]:
    """Steps on batches that depend on the step only; the logits after each. ``factors``: each entry moves so many times as far."""
    out = []
    for step in steps:
        ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer.step()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if factors is not None:
                    p.copy_(before[name] + factors[name] * (p - before[name]))
        out.append(logits(model, tokens(model)))
    return out


def carried(plan: GrowthPlan, model: PreTrainedModel, optimizer: Optimizer, grown: PreTrainedModel, after: Optimizer) -> None:
    """Puts the source's moments, mapped, into the optimizer of the grown model; step counts stay."""
    moments = {}
    for moment, quantity in (("exp_avg", "grad"), ("exp_avg_sq", "grad2")):
        held = disk_names(model, {n: optimizer.state[p][moment] for n, p in model.named_parameters()})
        moments[moment] = in_memory(plan, through(plan, held, quantity))
    step = next(iter(optimizer.state.values()))["step"]
    for name, p in grown.named_parameters():
        after.state[p] = {"step": step.clone(), **{m: moments[m][name].clone() for m in moments}}


def apart(one: list[Tensor], other: list[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(one, other, strict=True))


TRAJECTORIES = [
    *[(name, "x2") for name in ("llama", "llama-tied", "llama-bias", "mixtral", "qwen2", "qwen3-tied")],
    ("llama-tied", "x3"),
    ("llama-tied", "fpi"),
    ("qwen2", "ffn copied unevenly"),
    ("mixtral", "ffn copied unevenly"),
]


@pytest.mark.parametrize(("name", "way"), TRAJECTORIES)
def test_training_goes_on_as_if_nothing_had_grown(name: str, way: str, exact_math: None) -> None:
    model = make(BY_NAME[name], dtype=torch.float64)
    optimizer = Optimizer(model.parameters(), lr=1e-3, betas=BETAS, eps=1e-30, weight_decay=0.0)
    started = train(model, optimizer, range(5))[-1]
    plan = width_plan(model, way)
    grown = grow_model(model, plan)
    after = Optimizer(grown.parameters(), lr=1e-3, betas=BETAS, eps=1e-30, weight_decay=0.0)
    carried(plan, model, optimizer, grown, after)
    small, large = (
        train(model, optimizer, range(5, 15)),
        train(grown, after, range(5, 15), in_memory(plan, step_factors(plan))),
    )
    assert (small[-1] - started).abs().max() > 0.1  # it moved
    assert apart(small, large) < 1e-10


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "mixtral"])
def test_the_rule_is_a_learning_rate_and_a_weight_decay_for_each_tensor(name: str, exact_math: None) -> None:
    """As a user would set it: parameter groups with lr * f, weight_decay / f and eps * g, nothing else."""
    settings = {"lr": 1e-3, "betas": BETAS, "eps": 1e-8, "weight_decay": 0.1}
    model = make(BY_NAME[name], dtype=torch.float64)
    optimizer = Optimizer(model.parameters(), **settings)
    train(model, optimizer, range(5))
    plan = width_plan(model, "x2")
    grown = grow_model(model, plan)
    factors = in_memory(plan, step_factors(plan))
    ones = {n: torch.ones(t.shape, dtype=torch.float64) for n, t in plan.source.tensors.items()}
    sizes = in_memory(plan, through(plan, ones, "grad"))
    assert all(f.min() == f.max() and sizes[n].min() == sizes[n].max() for n, f in factors.items())
    after = Optimizer(
        [
            {"params": [p], "lr": 1e-3 * factors[n].max().item(), "weight_decay": 0.1 / factors[n].max().item(), "eps": 1e-8 * sizes[n].max().item()}
            for n, p in grown.named_parameters()
        ],
        betas=BETAS,
    )  # fmt: skip
    carried(plan, model, optimizer, grown, after)
    assert apart(train(model, optimizer, range(5, 15)), train(grown, after, range(5, 15))) < 1e-10


def test_the_rule_in_words(exact_math: None) -> None:
    for name, last_norm in (("llama", 1.0), ("llama-tied", 0.5)):
        model = make(BY_NAME[name], dtype=torch.float64)
        factors = {n.replace("model.layers.0.", ""): f for n, f in step_factors(width_plan(model, "x2")).items()}
        for tensor in ("model.embed_tokens.weight", "input_layernorm.weight", "post_attention_layernorm.weight"):
            assert factors[tensor].unique().tolist() == [1.0]
        for tensor in (
            "self_attn.q_proj.weight",
            "self_attn.v_proj.weight",
            "self_attn.o_proj.weight",
            "mlp.up_proj.weight",
            "mlp.down_proj.weight",
        ):
            assert factors[tensor].unique().tolist() == [0.5]
        assert factors["model.norm.weight"].unique().tolist() == [last_norm]
        if name == "llama":
            assert factors["lm_head.weight"].unique().tolist() == [0.5]
    rows_only = step_factors(width_plan(model, "ffn copied unevenly"))
    assert rows_only["model.layers.0.mlp.gate_proj.weight"].unique().tolist() == [1.0]
    assert rows_only["model.layers.0.mlp.down_proj.weight"].unique().tolist() == pytest.approx([1 / 3, 1 / 2])


@pytest.mark.parametrize("forgotten", ["moments", "factors", "final norm"])
def test_a_trajectory_without_the_rule_differs(forgotten: str, exact_math: None) -> None:
    model = make(BY_NAME["llama-tied"], dtype=torch.float64)
    settings = {"lr": 1e-3, "betas": BETAS, "eps": 1e-30, "weight_decay": 0.0}
    optimizer = Optimizer(model.parameters(), **settings)
    train(model, optimizer, range(5))
    plan = width_plan(model, "x2")
    grown = grow_model(model, plan)
    after = Optimizer(grown.parameters(), **settings)
    factors = in_memory(plan, step_factors(plan))
    if forgotten != "moments":
        carried(plan, model, optimizer, grown, after)
    if forgotten == "factors":
        factors = {n: torch.ones_like(f) for n, f in factors.items()}
    if forgotten == "final norm":
        factors["model.norm.weight"] = torch.ones_like(factors["model.norm.weight"])
    assert apart(train(model, optimizer, range(5, 8)), train(grown, after, range(5, 8), factors)) > 1e-3
