"""Other optimizers than AdamW: their state through a growth, against dense matrices and plain formulas in fp64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from adam_states import GROWTHS, adamw, train
from models import BY_NAME, make, save
from plain_maps import mapped, matrix
from torch import Tensor
from transformers import Adafactor, PreTrainedModel

from hf_grow import api
from hf_grow.cli import main
from hf_grow.convert.in_memory import disk_names, grow_model
from hf_grow.errors import InputError, SourceError
from hf_grow.growth.tensors import RowTensor
from hf_grow.model.meta_model import trainer_param_groups
from hf_grow.training.growth_state.block_quantized import Dequantized, quantized
from hf_grow.training.growth_state.grow_optimizer import grow_optimizer, grow_trainer_state
from hf_grow.training.growth_state.optimizer_state import MemoryTensor

TILE = {"method": "tile", "factor": 2, "symmetry": "none"}
UNEVEN = {"method": "tile", "hidden": 60, "intermediate": 50}


def small(name: str = "llama") -> PreTrainedModel:
    """In fp64."""
    model = make(BY_NAME[name], num_hidden_layers=2).double()
    model.config.dtype = torch.float64
    return model


def by_disk(model: PreTrainedModel, found: dict[str, Tensor]) -> dict[str, Tensor]:
    return disk_names(model, found)


def state_of(model: PreTrainedModel, optimizer: Any, key: str) -> dict[str, Tensor]:
    return by_disk(model, {n: optimizer.state[p][key] for n, p in model.named_parameters() if key in optimizer.state[p]})


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023, as its optimizers keep their state."""

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.add_(m.lerp(p.grad, 1 - group["betas"][0]).sign_(), alpha=-group["lr"])
                m.lerp_(p.grad, 1 - group["betas"][1])


GRADIENT_AVERAGES: dict[str, tuple[Any, str]] = {
    "sgd": (lambda m: torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9), "momentum_buffer"),
    "lion": (lambda m: Lion(m.parameters()), "exp_avg"),
    "adamw, fused": (lambda m: torch.optim.AdamW(m.parameters(), fused=True), "exp_avg"),
    "adam, amsgrad": (lambda m: torch.optim.Adam(m.parameters(), amsgrad=True), "exp_avg"),
}


@pytest.mark.parametrize("growth", [TILE, UNEVEN, {"method": "stack"}], ids=["tile", "uneven", "stack"])
@pytest.mark.parametrize("kind", GRADIENT_AVERAGES)
def test_averages_of_gradients_map_as_gradients(kind: str, growth: dict[str, Any]) -> None:
    create, key = GRADIENT_AVERAGES[kind]
    model = small()
    optimizer = create(model)
    train(model, optimizer, 2)
    plan = api.plan(model, **growth)
    grown = grow_model(model, plan)
    after = grow_optimizer(optimizer, plan, grown)
    assert type(after) is type(optimizer)
    quantities = (
        {key: "grad"} | ({"exp_avg_sq": "grad2"} if "adam" in kind else {}) | ({"max_exp_avg_sq": "grad2"} if "ams" in kind else {})
    )
    for name, quantity in quantities.items():
        old, new = state_of(model, optimizer, name), state_of(grown, after, name)
        assert new.keys() == plan.targets.keys()
        for n in plan.targets:
            torch.testing.assert_close(new[n], mapped(plan, plan.growth.tensors[n], old, quantity), rtol=1e-10, atol=1e-14)
    train(grown, after, 1)


# ---- Adafactor ---------------------------------------------------------------------------------------------------------------------------


def adafactor(library: str, model: PreTrainedModel) -> Any:
    if library == "torch":
        return torch.optim.Adafactor(model.parameters(), lr=1e-2)
    return Adafactor(model.parameters(), lr=1e-3, relative_step=False, scale_parameter=False)


def estimate(state: dict[str, Any]) -> Tensor:
    """Adafactor's v (Shazeer & Stern 2018, algorithm 4): R C / mean(R), or v itself."""
    if "row_var" in state:
        rows, columns = state["row_var"].squeeze(-1), state["col_var"].squeeze(-2)
    elif "exp_avg_sq_row" in state:
        rows, columns = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
    else:
        return state.get("variance", state.get("exp_avg_sq"))  # type: ignore[return-value]
    return rows.unsqueeze(-1) * columns.unsqueeze(-2) / rows.mean(-1)[..., None, None]


def estimates(model: PreTrainedModel, optimizer: Any) -> dict[str, Tensor]:
    return by_disk(model, {n: estimate(optimizer.state[p]) for n, p in model.named_parameters() if optimizer.state[p]})


@pytest.mark.parametrize(
    "growth", [TILE, UNEVEN, {"method": "stack"}, {"method": "identity", "at": "0"}], ids=["tile", "uneven", "stack", "identity"]
)
@pytest.mark.parametrize("library", ["torch", "transformers"])
def test_adafactor_gives_the_mapped_second_moment(library: str, growth: dict[str, Any]) -> None:
    model = small()
    optimizer = adafactor(library, model)
    train(model, optimizer, 3)
    plan = api.plan(model, **growth)
    grown = grow_model(model, plan)
    after = grow_optimizer(optimizer, plan, grown)
    old, new = estimates(model, optimizer), estimates(grown, after)
    identity = {i for i, o in enumerate(plan.growth.layers) if o.identity}
    assert new.keys() == {n for n in plan.targets if plan.architecture.tensors[n].layer not in identity}
    for n, v in new.items():
        torch.testing.assert_close(v, mapped(plan, plan.growth.tensors[n], old, "grad2"), rtol=1e-10, atol=0)
    assert all(int(s["step"]) == 3 and estimate(s).shape == p.shape for p, s in after.state.items() if s)
    train(grown, after, 2)


@pytest.mark.parametrize("library", ["torch", "transformers"])
def test_after_even_copies_adafactor_goes_on_as_the_small_model_would(library: str) -> None:
    """One more step, of mapped gradients: v of the grown model is the map of the small model's v."""
    model = small()
    optimizer = adafactor(library, model)
    train(model, optimizer, 3)
    plan = api.plan(model, **TILE)
    grown = grow_model(model, plan)
    after = grow_optimizer(optimizer, plan, grown)
    train(model, optimizer, 1)
    gradients = by_disk(model, {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for n, p in grown.named_parameters():
        p.grad = mapped(plan, plan.growth.tensors[n], gradients, "grad")
    after.step()
    old, new = estimates(model, optimizer), estimates(grown, after)
    for n, v in new.items():
        # transformers adds 1e-30 to every square, which no map scales
        torch.testing.assert_close(v, mapped(plan, plan.growth.tensors[n], old, "grad2"), rtol=1e-10, atol=1e-28)


def test_adafactor_with_fused_experts(tmp_path: Path) -> None:
    model = make(BY_NAME["mixtral"], num_hidden_layers=2)
    optimizer = adafactor("torch", model)
    train(model, optimizer, 2)
    plan = api.plan(model, **TILE)
    grown = grow_model(model, plan)
    after = grow_optimizer(optimizer, plan, grown)
    old, new = estimates(model, optimizer), estimates(grown, after)
    for n, v in new.items():
        expected = mapped(plan, plan.growth.tensors[n], old, "grad2")
        torch.testing.assert_close(v.double(), expected, rtol=1e-4, atol=float(expected.max()) * 1e-6)


def test_adafactor_is_refused_where_sources_mix() -> None:
    model = small()
    optimizer = adafactor("torch", model)
    train(model, optimizer, 2)
    plan = api.plan(model, "aki", factor=2)
    with pytest.raises(SourceError, match="mixes several sources"):
        grow_optimizer(optimizer, plan, grow_model(model, plan))


def test_adafactor_with_averages_of_updates_is_refused() -> None:
    model = small()
    optimizer = Adafactor(model.parameters(), lr=1e-3, relative_step=False, beta1=0.9)
    train(model, optimizer, 1)
    plan = api.plan(model, "stack")
    with pytest.raises(SourceError, match="average of updates"):
        grow_optimizer(optimizer, plan, grow_model(model, plan))


# ---- Muon --------------------------------------------------------------------------------------------------------------------------------


def muon_and_adamw(model: PreTrainedModel) -> tuple[Any, Any]:
    hidden = [p for n, p in model.named_parameters() if p.dim() == 2 and ".layers." in n]
    rest = [p for p in model.parameters() if all(p is not h for h in hidden)]
    return torch.optim.Muon(hidden, lr=1e-2), torch.optim.AdamW(rest, lr=1e-3)


def test_two_optimizers_of_one_model_grow_apart() -> None:
    model = small()
    both = muon_and_adamw(model)
    for optimizer in both:
        train(model, optimizer, 2)
    plan = api.plan(model, **TILE)
    grown = grow_model(model, plan)
    muon, rest = (grow_optimizer(o, plan, grown, source=model) for o in both)
    buffers, averages = state_of(grown, muon, "momentum_buffer"), state_of(grown, rest, "exp_avg")
    assert buffers.keys() | averages.keys() == plan.targets.keys() and not buffers.keys() & averages.keys()
    for found, old in ((buffers, state_of(model, both[0], "momentum_buffer")), (averages, state_of(model, both[1], "exp_avg"))):
        for n, value in found.items():
            torch.testing.assert_close(value, mapped(plan, plan.growth.tensors[n], old, "grad"), rtol=1e-10, atol=1e-14)
    for optimizer in (muon, rest):
        train(grown, optimizer, 1)


def test_one_file_may_hold_muon_and_adamw(tmp_path: Path) -> None:
    """A class of one's own around both, whose state_dict is one of torch's: told apart by what it keeps of each parameter."""
    model = small()
    named = dict(model.named_parameters())
    hidden = [n for n, p in named.items() if p.dim() == 2 and ".layers." in n]
    groups = [
        {"params": hidden, "param_names": hidden, "lr": 0.02},
        {"params": (r := [n for n in named if n not in hidden]), "param_names": r},
    ]
    state: dict[int, Any] = {}
    generator = torch.Generator().manual_seed(0)
    for n in (*hidden, *r):
        value = torch.randn(named[n].shape, generator=generator, dtype=torch.float64)
        state[len(state)] = (
            {"momentum_buffer": value} if n in hidden else {"step": torch.tensor(5.0), "exp_avg": value, "exp_avg_sq": value**2}
        )
    numbered = [{**g, "params": [(*hidden, *r).index(n) for n in g["params"]]} for g in groups]
    save(model, tmp_path)
    torch.save({"state": state, "param_groups": numbered}, tmp_path / "optimizer.pt")
    (tmp_path / "out").mkdir()
    plan = api.plan(tmp_path, **TILE)
    report = grow_trainer_state(tmp_path, tmp_path / "out", plan)
    assert (report.step, report.fresh) == (5, 0)
    saved = torch.load(tmp_path / "out" / "optimizer.pt", weights_only=True)
    names = [n for g in saved["param_groups"] for n in g["param_names"]]
    assert {frozenset(s) for s in saved["state"].values()} == {frozenset({"momentum_buffer"}), frozenset({"step", "exp_avg", "exp_avg_sq"})}
    old = {n: next(v for k, v in s.items() if k != "step") for n, s in zip((*hidden, *r), state.values(), strict=True)}
    for i, s in saved["state"].items():
        value = next(v for k, v in s.items() if k in ("momentum_buffer", "exp_avg"))
        torch.testing.assert_close(value, mapped(plan, plan.growth.tensors[names[i]], old, "grad"), rtol=1e-10, atol=1e-14)


def orthogonalized(update: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration of Muon, in the precision of its input (torch's rounds to bf16)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = update if update.shape[0] <= update.shape[1] else update.T
    x = x / x.norm()
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if update.shape[0] <= update.shape[1] else x.T


@pytest.mark.parametrize(("rows", "columns", "adjust", "repeats"), [
    (2, 2, "original", True), (2, 2, "match_rms_adamw", False), (1, 1, "match_rms_adamw", True),
    (2, 1, "original", False), (3, 1, "original, tall", True), (1, 2, "original", False), ("uneven", 1, "original, tall", False),
])  # fmt: skip
def test_when_muons_update_repeats_that_of_the_small_model(rows: Any, columns: int, adjust: str, repeats: bool) -> None:
    """As the page says: rows and columns copied evenly, as often as each other; with a tall matrix and 'original' rows alone."""
    from hf_grow.growth.axes import duplicate

    height, width = (14, 6) if "tall" in adjust else (6, 14)
    uneven = [*range(height), 0, 1]
    out = duplicate(height, uneven if rows == "uneven" else [*range(height)] * rows)
    into = duplicate(width, [*range(width)] * columns)
    gradient = torch.randn(height, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def step(g: Tensor) -> Tensor:
        shape = g.shape
        ratio = math.sqrt(max(1, shape[0] / shape[1])) if "original" in adjust else 0.2 * math.sqrt(max(shape))
        return orthogonalized(g) * ratio

    grown = step(matrix(out, "b") @ gradient @ matrix(into, "a").T)
    wanted = matrix(out, "a") @ step(gradient) @ matrix(into, "b").T
    assert (float((grown - wanted).norm() / wanted.norm()) < 1e-10) is repeats


# ---- 8 and 4 bits ------------------------------------------------------------------------------------------------------------------------

LEVELS = torch.cat([-torch.logspace(0, -5, 127), torch.zeros(1), torch.logspace(-5, 0, 128)]).sort().values


def bits(values: Tensor, levels: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Codes and scales, block by block."""
    scales, codes = [], []
    for part in values.reshape(-1).split(block):
        scales.append(part.abs().max())
        codes.append((levels[None] - part[:, None] / (scales[-1] or 1)).abs().argmin(1))
    return torch.cat(codes).to(torch.uint8).view(values.shape), torch.stack(scales)


def held_as_levels(values: Tensor, levels: Tensor, block: int) -> Tensor:
    codes, scales = bits(values, levels, block)
    return (levels[codes.long()].reshape(-1) * scales.repeat_interleave(block)[: values.numel()]).view(values.shape)


@pytest.mark.parametrize(
    ("shape", "block", "packed"), [((7, 10), 16, False), ((9, 5, 3), 256, False), ((8, 16), 32, True), ((50,), 8, False)]
)
def test_codes_are_the_nearest_levels(shape: tuple[int, ...], block: int, packed: bool) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values.view(-1)[:block] = 0  # a block of zeros
    levels = LEVELS[::16].contiguous() if packed else LEVELS
    codes, scale = quantized(MemoryTensor(values), levels, block, packed=packed)
    expected, scales = bits(values, levels, block)
    assert torch.equal(scale.whole(), scales)
    whole = codes.whole()
    unpacked = torch.stack([whole >> 4, whole & 15], 1).view(shape) if packed else whole
    near = (levels[unpacked.long()] - levels[expected.long()]).abs()
    assert float(near.max()) < 1e-6  # a tie may go either way
    held = Dequantized(codes, scale, levels, shape, block, packed)
    assert torch.equal(held.whole(), torch.cat([held.rows(i, i + 1) for i in range(shape[0])]))
    torch.testing.assert_close(held.whole(), held_as_levels(values, levels, block), rtol=0, atol=1e-5)


def read(value: RowTensor) -> Tensor:
    return value.whole()


@pytest.mark.parametrize("nested", [True, False])
def test_8_bit_state_of_bitsandbytes_equals_the_map_of_its_values(nested: bool, tmp_path: Path) -> None:
    """Up to one rounding to a level; small tensors are in fp32, and exact."""
    model = make(BY_NAME["llama"], num_hidden_layers=2)
    names = trainer_param_groups(model)
    named = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(0)
    state, values = {}, {}
    for i, n in enumerate(m for g in names for m in g):
        m = torch.randn(named[n].shape, generator=generator) * 1e-3
        entry: dict[str, Any] = {"state1": m, "state2": m**2}
        if m.dim() == 2:
            for k in "12":
                codes, scale = bits(entry[f"state{k}"], LEVELS, 256)
                entry |= {f"state{k}": codes, f"absmax{k}": scale, f"qmap{k}": LEVELS}
            values[n] = tuple(held_as_levels(v, LEVELS, 256) for v in (m, m**2))
        else:
            values[n] = (m, m**2)
        state[i] = {"step": 4, **({"__bnb_optimizer_quant_state__": entry} if nested else entry)}
    groups = [{"params": [*range(len(names[0]))], "lr": 1e-3}, {"params": [*range(len(names[0]), len(state))], "lr": 1e-3}]
    save(model, tmp_path)
    torch.save({"state": state, "param_groups": groups}, tmp_path / "optimizer.pt")
    (tmp_path / "out").mkdir()
    plan = api.plan(tmp_path, **UNEVEN)
    grow_trainer_state(tmp_path, tmp_path / "out", plan)
    saved = torch.load(tmp_path / "out" / "optimizer.pt", weights_only=True)["state"]
    gap = (LEVELS[1:] - LEVELS[:-1]).max() / 2
    for i, n in enumerate(m for g in trainer_param_groups(grow_model(model, plan)) for m in g):
        found = saved[i].get("__bnb_optimizer_quant_state__", saved[i])
        assert saved[i]["step"] == 4 and ("__bnb_optimizer_quant_state__" in saved[i]) is nested
        for k, (at, quantity) in {"1": (0, "grad"), "2": (1, "grad2")}.items():
            expected = mapped(plan, plan.growth.tensors[n], {m: v[at] for m, v in values.items()}, quantity).float()
            codes = found[f"state{k}"]
            assert codes.shape == expected.shape
            if codes.dtype == torch.uint8:
                scale = found[f"absmax{k}"].repeat_interleave(256)[: codes.numel()].view(codes.shape)
                largest = torch.stack([b.abs().max() for b in expected.reshape(-1).split(256)])
                torch.testing.assert_close(found[f"absmax{k}"], largest, rtol=1e-6, atol=0)
                assert bool(((LEVELS[codes.long()] * scale - expected).abs() <= gap * scale * 1.001).all())
            else:
                torch.testing.assert_close(codes, expected, rtol=1e-6, atol=0)


def test_a_single_moment_of_bitsandbytes_is_refused(tmp_path: Path) -> None:
    model = make(BY_NAME["llama"], num_hidden_layers=2)
    state = {i: {"step": 1, "__bnb_optimizer_quant_state__": {"state1": torch.zeros(p.shape)}} for i, p in enumerate(model.parameters())}
    torch.save({"state": state, "param_groups": [{"params": [*state]}]}, tmp_path / "optimizer.pt")
    (tmp_path / "out").mkdir()
    with pytest.raises(SourceError, match="Lion's or RMSprop's"):
        grow_trainer_state(tmp_path, tmp_path / "out", api.plan(model, "stack"))
    grow_trainer_state(tmp_path, tmp_path / "out", api.plan(model, "stack"), "reset")
    assert not torch.load(tmp_path / "out" / "optimizer.pt", weights_only=True)["state"]


def library_optimizer(kind: str, model: PreTrainedModel) -> Any:
    if kind == "bitsandbytes":
        return pytest.importorskip("bitsandbytes").optim.AdamW8bit(model.parameters(), lr=1e-3, min_8bit_size=1024)
    created = getattr(pytest.importorskip("torchao.optim"), kind)
    return created(model.parameters(), lr=1e-3, block_size=64)


def as_values(value: Any, state: dict[str, Any], key: str) -> Tensor:
    """Dequantized by the library itself."""
    if hasattr(value, "dequantize") and hasattr(value, "__tensor_flatten__"):
        found: Tensor = value.dequantize()
        return found
    if value.dtype == torch.uint8:
        from bitsandbytes.functional import dequantize_blockwise

        return dequantize_blockwise(value, absmax=state[f"absmax{key[-1]}"], code=state[f"qmap{key[-1]}"], blocksize=256)  # type: ignore[no-any-return]
    return value  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["bitsandbytes", "AdamW8bit", "AdamW4bit"])
def test_the_libraries_go_on_with_the_grown_state(kind: str, tmp_path: Path) -> None:
    """Where the library is installed: its own optimizer, in memory and on disk, and its own dequantization."""
    model = make(BY_NAME["llama"], num_hidden_layers=2, intermediate_size=96)
    optimizer = library_optimizer(kind, model)
    train(model, optimizer, 2)
    save(model, tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    (tmp_path / "out").mkdir()
    plan = api.plan(tmp_path, **TILE)
    grown = grow_model(model, plan)
    after = grow_optimizer(optimizer, plan, grown)
    assert type(after) is type(optimizer)
    grow_trainer_state(tmp_path, tmp_path / "out", plan)
    loaded = type(optimizer)(grown.parameters(), lr=1e-3)
    loaded.load_state_dict(torch.load(tmp_path / "out" / "optimizer.pt", weights_only=True))
    keys = {"state1": "grad", "state2": "grad2"} if kind == "bitsandbytes" else {"exp_avg": "grad", "exp_avg_sq": "grad2"}
    for o in (optimizer, after, loaded):
        assert any(
            hasattr(v, "__tensor_flatten__") or getattr(v, "dtype", None) == torch.uint8 for s in o.state.values() for v in s.values()
        )
    for key, quantity in keys.items():

        def values(held: PreTrainedModel, o: Any, key: str = key) -> dict[str, Tensor]:
            return by_disk(held, {n: as_values(o.state[p][key], o.state[p], key) for n, p in held.named_parameters()})

        old = values(model, optimizer)
        for o in (after, loaded):
            for n, value in values(grown, o).items():
                expected = mapped(plan, plan.growth.tensors[n], old, quantity).float()
                error = (value - expected).abs().max() / expected.abs().max()
                assert float(error) < (0.15 if kind == "AdamW4bit" else 0.02), n
    for o in (after, loaded):
        train(grown, o, 1)


def test_exact_steps_are_adamws(tmp_path: Path) -> None:
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    train(model, optimizer, 1)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="AdamW alone"):
        grow_trainer_state(tmp_path, tmp_path / "out", api.plan(model, **TILE), exact_steps=True)


def test_projected_and_other_state_is_refused(tmp_path: Path) -> None:
    model = small()
    optimizer = adamw(model)
    train(model, optimizer, 1)
    plan = api.plan(model, **GROWTHS["stack"])
    for change in ({"ema": torch.zeros(1)}, {"exp_avg": torch.zeros(3, 3)}):
        saved = optimizer.state_dict()
        saved["state"] = {i: {**s, **change} for i, s in saved["state"].items()}
        torch.save(saved, tmp_path / "optimizer.pt")
        (tmp_path / "out").mkdir(exist_ok=True)
        with pytest.raises(SourceError, match=r"no exact map|not those of the model"):
            grow_trainer_state(tmp_path, tmp_path / "out", plan)


def test_state_that_cannot_be_grown_is_refused_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make(BY_NAME["llama"], num_hidden_layers=2)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=1e-3)
    train(model, optimizer, 1)
    save(model, tmp_path / "source")
    torch.save(optimizer.state_dict(), tmp_path / "source" / "optimizer.pt")
    words = [
        "depth",
        str(tmp_path / "source"),
        "--method",
        "stack",
        "-o",
        str(tmp_path / "out"),
        "--with-optimizer",
        str(tmp_path / "source"),
    ]
    assert main(words) == 2
    assert "no exact map" in capsys.readouterr().err and {p.name for p in tmp_path.iterdir()} == {"source"}
    (tmp_path / "source" / "trainer_state.json").write_text('{"global_step": 1}')
    assert main([*words, "--optimizer-policy", "reset"]) == 0
