"""Depth growth: every method against a plain reading of its paper, as lists of layers, as tensor maps, and as models that compute."""

from __future__ import annotations

import copy
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import pytest
import torch
from exact import logits
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from models import ALTERNATING, BY_NAME, CASES, SIZES, WINDOW, WINDOWED, Case, each_case, from_disk, make, on_disk, real_config, tokens
from transformers import AutoModelForCausalLM

from hf_grow.errors import InputError, PlanError, SourceError
from hf_grow.growth.growth import Growth, LayerOrigin, compose
from hf_grow.growth.plan import GrowthPlan, make_plan
from hf_grow.growth.source_info import SourceInfo, TensorInfo
from hf_grow.growth.tensormap import Expr, Fill, Noise, Source, Sum
from hf_grow.methods import METHODS, depth
from hf_grow.model.architecture import Architecture
from hf_grow.model.families import FAMILIES
from hf_grow.model.param_count import count_parameters
from hf_grow.options import parse

MISTRAL_7B = {
    "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip


def grow(config: Mapping[str, Any], method: str, **options: Any) -> Growth:
    """Options as a recipe gives them."""
    return METHODS[method].build(Architecture(config), parse(METHODS[method].options, options, where="test", strict=False))


def tiny(layers: int, **changes: Any) -> dict[str, Any]:
    return {"model_type": "llama", **SIZES, **changes, "num_hidden_layers": layers}


def test_a_method_that_lists_indices_is_told_so() -> None:
    identity = depth.Guarantee("lossless", "the same layers")
    with pytest.raises(TypeError, match=r"depth method mine lists 0 as a layer.*from_indices"):
        depth._build(Architecture(tiny(2)), "mine", depth.DepthOptions(), [0, 1], identity)  # type: ignore[list-item]


def order(growth: Growth) -> list[int]:
    """The source layer of each target layer."""
    assert all(len(o.sources) == 1 for o in growth.layers)
    return [o.sources[0] for o in growth.layers]


def marked(growth: Growth) -> str:
    """LLaMA-Pro's figure in a line: 0 1 1* for layers 0 and 1 and a new block copied from 1."""
    return " ".join(f"{o.sources[0]}{'*' * o.identity}" for o in growth.layers)


# ---- references: each method from its paper, the slow and plain way --------------------------------------------------------------------


def solar(n: int, m: int) -> list[int]:
    """SOLAR, section 2: drop the last m layers from the model and the first m from its copy, and concatenate; s = 2(n - m)."""
    layers = list(range(n))
    return layers[: n - m] + layers[m:]


def g_stack(n: int, g: int) -> list[int]:
    """G_stack: the whole model, g times."""
    return list(range(n)) * g


def interpolation(n: int, g: int) -> list[int]:
    """AquilaMoE: each layer followed by its copies."""
    return [i for i in range(n) for _ in range(g)]


def llama_pro(n: int, new: int) -> str:
    """LLaMA-Pro, section 3: N groups of M = L / N blocks; after each group a copy of its top block with zero output projections."""
    size = n // new
    out = []
    for i in range(n):
        out.append(f"{i}")
        if (i + 1) % size == 0:
            out.append(f"{i}*")
    return " ".join(out)


# ---- lists of layers -----------------------------------------------------------------------------------------------------------------


def test_solar_is_48_layers_and_10_7_billion_parameters():
    """The paper's own numbers: n = 32, m = 8, s = 48, 10.7B."""
    for options in ({"to": "10.7B"}, {"drop": 8}, {"layers_to": 48}, {}):
        growth = grow(MISTRAL_7B, "dus", **options)
        assert order(growth) == [*range(24), *range(8, 32)] == solar(32, 8)
        assert count_parameters(Architecture(growth.config)).total == 10_731_524_096


@pytest.mark.parametrize("n", range(1, 13))
def test_dus_is_the_papers_formula_for_every_drop(n: int):
    for m in range((n + 1) // 2):
        assert order(grow(tiny(n), "dus", drop=m)) == solar(n, m)


@pytest.mark.parametrize("n", range(1, 13))
def test_dus_drops_a_quarter_of_the_layers_unless_told(n: int):
    assert order(grow(tiny(n), "dus")) == solar(n, n // 4)


@pytest.mark.parametrize("n", [1, 3, 4])
@pytest.mark.parametrize("g", range(2, 9))
def test_stack_repeats_the_whole_model(n: int, g: int):
    assert order(grow(tiny(n), "stack", factor=g)) == order(grow(tiny(n), "stack", layers_to=g * n)) == g_stack(n, g)


def test_stack_doubles_unless_told():
    assert order(grow(tiny(3), "stack")) == g_stack(3, 2)


@pytest.mark.parametrize("n", [1, 3, 4])
@pytest.mark.parametrize("g", range(2, 9))
def test_interleave_repeats_each_layer_in_place(n: int, g: int):
    assert order(grow(tiny(n), "interleave", layers_to=g * n)) == interpolation(n, g)


def test_interleave_doubles_unless_told():
    assert order(grow(tiny(3), "interleave")) == interpolation(3, 2)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.data())
def test_interleave_spreads_any_number_of_repetitions_evenly(n: int, data):
    target = data.draw(st.integers(n + 1, 8 * n))
    layers = order(grow(tiny(n), "interleave", layers_to=target))
    counts = Counter(layers)
    assert layers == sorted(layers)
    assert set(counts) == set(range(n))
    assert max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize(("n", "new"), [(32, 8), (32, 4), (6, 2), (6, 3), (6, 6), (6, 1), (1, 1)])
def test_identity_blocks_stand_where_llama_pro_puts_them(n: int, new: int):
    growth = grow(tiny(n), "identity", layers_to=n + new)
    assert marked(growth) == llama_pro(n, new)


def test_identity_adds_a_quarter_unless_told():
    assert marked(grow(tiny(32), "identity")) == llama_pro(32, 8)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.data())
def test_identity_blocks_are_spread_evenly_and_follow_the_layer_they_copy(n: int, data):
    target = data.draw(st.integers(n + 1, 8 * n))
    growth = grow(tiny(n), "identity", layers_to=target)
    assert [o.sources[0] for o in growth.layers if not o.identity] == list(range(n))
    assert order(growth) == sorted(order(growth))
    new = Counter(o.sources[0] for o in growth.layers if o.identity)
    groups = [new[i] for i in range(n)]
    assert sum(groups) == target - n
    assert max(groups) - min(groups) <= 1
    gaps = [b - a for a, b in zip([-1, *sorted(new)], sorted(new), strict=False)]
    assert target > 2 * n or max(gaps) - min(gaps) <= 1


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.data())
def test_identity_blocks_can_be_put_anywhere(n: int, data):
    at = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=7 * n))
    wanted = " ".join(f"{i}" + f" {i}*" * at.count(i) for i in range(n))
    assert marked(grow(tiny(n), "identity", at=at)) == wanted


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.data())
def test_a_free_list_is_taken_as_it_is(n: int, data):
    layers = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=10))
    growth = grow(tiny(n), "layers", layers=layers)
    assert order(growth) == layers
    assert growth.config["num_hidden_layers"] == len(layers)


def test_layer_ranges_count_both_ends():
    assert order(grow(tiny(4), "layers", layers="0-2,1-3")) == solar(4, 1)


@pytest.mark.parametrize(
    ("method", "options"), [("dus", {"drop": 1}), ("stack", {}), ("interleave", {"layers_to": 7}), ("layers", {"layers": [2, 0, 2, 2]})]
)
def test_every_appearance_of_a_layer_after_the_first_is_new(method: str, options: dict[str, Any]):
    growth = grow(tiny(4), method, **options)
    seen: set[int] = set()
    for origin in growth.layers:
        assert origin.new == (origin.sources[0] in seen)
        assert not origin.identity
        seen.add(origin.sources[0])


@pytest.mark.parametrize("width", [1, 2, 3])
def test_a_cross_faded_seam_goes_evenly_from_the_first_copy_to_the_second(width: int):
    """8 layers, m = 3: the seam is at 5; around it target layer t would be layer t of the first copy and t - 2 of the second."""
    growth = grow(tiny(8), "dus", drop=3, seam_average=width)
    plain = solar(8, 3)
    for t, origin in enumerate(growth.layers):
        step = t - (5 - width)
        if 0 <= step < 2 * width:
            share = (step + 1) / (2 * width + 1)
            assert origin.sources == (t, t - 2)
            assert origin.weights == pytest.approx((1 - share, share))
        else:
            assert (origin.sources, origin.weights) == ((plain[t],), (1.0,))


# ---- tensor maps ---------------------------------------------------------------------------------------------------------------------

VARIANTS = {
    "dus": ("dus", {}),
    "stack": ("stack", {}),
    "interleave": ("interleave", {"layers_to": 7}),
    "identity": ("identity", {"at": [0, 0, 2, 3]}),
    "layers": ("layers", {"layers": [3, 0, 0, 2]}),
}
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def variant_of(case: Case, variant: str) -> Growth:
    method, options = VARIANTS[variant]
    return grow(case.config, method, **options)


WRITERS = re.compile(r"\.(o_proj\.(weight|bias)|down_proj\.(weight|bias)|w2\.weight)$")


@each_case
@each_variant
def test_every_tensor_of_the_target_is_the_one_of_its_source_layer(case: Case, variant: str):
    growth = variant_of(case, variant)
    with torch.device("meta"):
        wanted = on_disk(AutoModelForCausalLM.from_config(real_config(growth.config)))
    assert set(growth.tensors) == set(wanted)
    for name, expr in growth.tensors.items():
        found = re.match(r"model\.layers\.(\d+)\.(.*)", name)
        if not found:
            assert expr == Source(name)
            continue
        origin = growth.layers[int(found[1])]
        if origin.identity and WRITERS.search(name):
            assert expr == Fill(tuple(wanted[name].shape), 0.0)
        else:
            assert expr == Source(f"model.layers.{origin.sources[0]}.{found[2]}")


@each_case
def test_identity_zeroes_something_in_both_branches_of_each_new_block(case: Case):
    growth = variant_of(case, "identity")
    for t, origin in enumerate(growth.layers):
        zero = [n for n, e in growth.tensors.items() if isinstance(e, Fill) and n.startswith(f"model.layers.{t}.")]
        assert bool(zero) == origin.identity
        if origin.identity:
            assert any(".o_proj.weight" in n for n in zero)
            assert any(".down_proj.weight" in n or ".w2.weight" in n for n in zero)


@each_case
@each_variant
def test_a_plan_makes_every_target_tensor_and_loses_no_source_tensor(case: Case, variant: str):
    check_complete(plan_of(case.config, variant_of(case, variant)))


# ---- models that compute -------------------------------------------------------------------------------------------------------------


def valued(expr: Expr, state: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What the three nodes of depth growth say."""
    match expr:
        case Source(name):
            return state[name]
        case Fill(size, value):
            return torch.full(size, value, dtype=torch.float64)
        case Sum(terms, weights):
            return sum(w * valued(t, state) for w, t in zip(weights, terms, strict=True))
    raise AssertionError(expr)


def grown(growth: Growth, state: Mapping[str, torch.Tensor]) -> Any:
    """The target, as transformers loads it."""
    return from_disk(growth.config, {n: valued(e, state).contiguous() for n, e in growth.tensors.items()}, torch.float64)


def running(model: Any, layers: Sequence[torch.nn.Module], types_from: Sequence[int]) -> Any:
    """A model that runs these blocks one after the other."""
    model = copy.deepcopy(model)
    model.model.layers = torch.nn.ModuleList(layers)
    model.config.num_hidden_layers = len(layers)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[i] for i in types_from]
    return model


@each_case
def test_identity_blocks_change_no_logit(case: Case, exact_math):
    model = make(case, dtype=torch.float64)
    ids = tokens(model)
    target = grown(variant_of(case, "identity"), on_disk(model))
    assert len(target.model.layers) == len(model.model.layers) + 4
    assert (logits(target, ids) - logits(model, ids)).abs().max() < 1e-10


@each_case
@pytest.mark.parametrize("variant", ["dus", "stack", "interleave", "layers"])
def test_a_deeper_model_computes_the_listed_layers_one_after_the_other(case: Case, variant: str, exact_math):
    model = make(case, dtype=torch.float64)
    ids = tokens(model)
    growth = variant_of(case, variant)
    wanted = logits(running(model, [model.model.layers[i] for i in order(growth)], order(growth)), ids)
    assert (logits(grown(growth, on_disk(model)), ids) - wanted).abs().max() < 1e-10
    assert (logits(model, ids) - wanted).abs().max() > 1e-3  # these methods do change the function


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name not in ("qwen2_moe-mixed", "qwen3_moe-mixed", "qwen2-window", "qwen3-window")], ids=str
)
def test_a_cross_faded_model_computes_with_averaged_layers(case: Case, exact_math):
    """4 layers, m = 1, one layer on each side of the seam at 3: (3 w3 + w1... ) as the means 2/3, 1/3 and 1/3, 2/3 of both copies."""
    model = make(case, dtype=torch.float64)
    ids = tokens(model)
    blocks = model.model.layers

    def mean(i: int, j: int, share: float) -> torch.nn.Module:
        out = copy.deepcopy(blocks[i])
        with torch.no_grad():
            for p, q in zip(out.parameters(), blocks[j].parameters(), strict=True):
                p.mul_(1 - share).add_(q, alpha=share)
        return out

    listed = [blocks[0], blocks[1], mean(2, 0, 1 / 3), mean(3, 1, 2 / 3), blocks[2], blocks[3]]
    target = grown(grow(case.config, "dus", drop=1, seam_average=1), on_disk(model))
    assert (logits(target, ids) - logits(running(model, listed, [0, 1, 2, 3, 2, 3]), ids)).abs().max() < 1e-10


each_windowed = pytest.mark.parametrize("case", WINDOWED, ids=str)


@each_windowed
@pytest.mark.parametrize("written_by", ["hand", "transformers"])
def test_blocks_keep_their_windows(case: Case, written_by: str, exact_math):
    """With windows shorter than the text, the lossless growths change no logit, and the others run the listed layers, each with its window."""
    model = make(case, dtype=torch.float64)
    ids, state = tokens(model), on_disk(model)
    config = case.config if written_by == "hand" else model.config.to_dict()
    before = logits(model, ids)
    unlimited = make({**case.config, "layer_types": None}, dtype=torch.float64, sliding_window=64)
    assert (logits(unlimited, ids) - before).abs().max() > 1e-3  # the windows matter
    for method, options in (*VARIANTS.values(), ("layers", {"layers": "0-3"}), ("identity", {})):
        growth = grow(config, method, **options)
        wanted = before
        if not growth.guarantee.lossless:
            wanted = logits(running(model, [model.model.layers[i] for i in order(growth)], order(growth)), ids)
        assert (logits(grown(growth, state), ids) - wanted).abs().max() < 1e-10, (method, options)


@each_windowed
def test_windows_of_a_grown_model_are_counted_as_those_of_its_layers(case: Case):
    source = Architecture(case.config)
    assert any(source.window(i) for i in range(source.layers))
    for variant in VARIANTS:
        growth = variant_of(case, variant)
        target = Architecture(growth.config)
        assert [target.window(t) for t in range(target.layers)] == [source.window(i) for i in order(growth)]


def test_layers_with_and_without_a_window_are_not_averaged():
    with pytest.raises(PlanError, match="Layers 2 and 0 cannot be averaged: the attention of one has a sliding window"):
        grow(BY_NAME["qwen2-window"].config, "dus", drop=1, seam_average=1)
    grow({**BY_NAME["qwen2-window"].config, "max_window_layers": 0}, "dus", drop=1, seam_average=1)


# ---- config keys that speak of single layers -------------------------------------------------------------------------------------------

ORDERS = [[0, 1, 2, 3, 2, 3], [0, 1, 2, 1, 2, 3], [0, 0, 1, 1], [3, 2, 1, 0], [2, 3], [0, 1], [0, 1, 2, 3]]


@pytest.mark.parametrize("layers", ORDERS, ids=str)
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen2_moe"])
@pytest.mark.parametrize(
    "window",
    [WINDOW, {**WINDOW, "max_window_layers": 0}, {**WINDOW, "max_window_layers": 4}, {**WINDOW, "max_window_layers": 99},
     {**WINDOW, "use_sliding_window": False}, {"use_sliding_window": True}, {"use_sliding_window": True, "max_window_layers": 1}, {},
     {**WINDOW, "sliding_window": None},
     {**WINDOW, "layer_types": ALTERNATING}, {**WINDOW, "use_sliding_window": False, "layer_types": ALTERNATING}],
    ids=["2", "0", "4", "99", "off", "default-window", "1-default-window", "none", "null-window", "listed", "listed-off"],
)  # fmt: skip
@pytest.mark.parametrize("written_by", ["hand", "transformers"])
def test_every_target_layer_attends_as_its_source_layer_does(family: str, window: dict, layers: list[int], written_by: str):
    """transformers' own reading of both configs."""
    config = {"model_type": family, **SIZES, "head_dim": 8, **window}
    source = real_config(config)
    growth = grow(config if written_by == "hand" else source.to_dict(), "layers", layers=layers)
    target = real_config(growth.config)
    assert target.layer_types == [source.layer_types[i] for i in layers]
    assert target.sliding_window == source.sliding_window


@pytest.mark.parametrize("layers", ORDERS, ids=str)
@pytest.mark.parametrize("case", [c for c in WINDOWED if c.family.startswith("qwen2")], ids=str)
def test_readers_that_know_only_max_window_layers_are_right_or_warned_of(case: Case, layers: list[int]):
    growth = grow(case.config, "layers", layers=layers)
    wanted = real_config(growth.config).layer_types
    old = {k: v for k, v in growth.config.items() if k != "layer_types"}
    assert (real_config(old).layer_types == wanted) != any("alternate" in w for w in growth.warnings)


def test_a_family_without_layer_types_gets_none():
    """qwen3_moe: the cache of a model would follow a list that its attention ignores."""
    config = {**BY_NAME["qwen3_moe"].config, **WINDOW}
    assert "layer_types" not in grow(config, "stack").config


SPARSE = {
    "all": {},
    "second": {"decoder_sparse_step": 2},
    "third": {"decoder_sparse_step": 3},
    "list": {"mlp_only_layers": [0, 2]},
    "both": {"decoder_sparse_step": 2, "mlp_only_layers": [3]},
    "never": {"decoder_sparse_step": 9},
    "null": {"mlp_only_layers": None, "decoder_sparse_step": 2},
}


def sparse_blocks(config: Mapping[str, Any]) -> list[bool]:
    """Which blocks are mixtures in the model that transformers builds."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(real_config(config))
    return [hasattr(block.mlp, "experts") for block in model.model.layers]


@pytest.mark.parametrize("layers", ORDERS, ids=str)
@pytest.mark.parametrize("sparse", SPARSE.values(), ids=list(SPARSE))
def test_every_target_layer_is_as_sparse_as_its_source_layer(layers: list[int], sparse: dict[str, Any]):
    config = {**BY_NAME["qwen3_moe"].config, **sparse}
    growth = grow(config, "layers", layers=layers)
    source = sparse_blocks(config)
    assert [Architecture(config).is_sparse(i) for i in range(4)] == source
    assert sparse_blocks(growth.config) == [source[i] for i in layers]


# ---- sizes ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dus", "stack", "interleave", "identity"])
def test_the_nearest_reachable_size_is_taken(method: str):
    """By brute force over everything the method can reach."""
    config = tiny(6)
    sizes = {}
    for layers in range(7, 49):
        with suppress(PlanError):
            sizes[layers] = count_parameters(Architecture(grow(config, method, layers_to=layers).config)).total
    assert len(sizes) > 2
    for wanted in range(min(sizes.values()), max(sizes.values()), 5_003):
        best = min(sizes.values(), key=lambda s: abs(s - wanted))
        if abs(best - wanted) <= 0.05 * wanted:
            growth = grow(config, method, to=wanted)
            assert abs(count_parameters(Architecture(growth.config)).total - wanted) == abs(best - wanted)
        else:
            with pytest.raises(PlanError):
                grow(config, method, to=wanted)


def test_sizes_count_each_block_of_a_mixed_model_for_itself():
    config = BY_NAME["qwen3_moe-mixed"].config
    for layers in range(7, 20):
        size = count_parameters(Architecture(grow(config, "interleave", layers_to=layers).config)).total
        assert len(grow(config, "interleave", to=size).layers) == layers


@pytest.mark.parametrize("method", ["dus", "stack", "interleave", "identity"])
def test_for_size_offers_options_that_the_method_takes(method: str):
    arch = Architecture(MISTRAL_7B)
    options = METHODS[method].for_size(arch, 14_000_000_000)
    assert options is not None
    growth = METHODS[method].build(arch, options)
    assert count_parameters(Architecture(growth.config)).total == pytest.approx(14e9, rel=0.02)


def test_no_size_can_be_asked_of_a_free_list():
    assert METHODS["layers"].for_size(Architecture(MISTRAL_7B), 10**10) is None


def test_a_large_mixture_is_sized_in_seconds():
    """The search looks at every depth up to 8 times the source; it must not count 36,000 tensors each time."""
    config = {"model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 48,
              "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128, "moe_intermediate_size": 1536}  # fmt: skip
    arch = Architecture(config)
    counted = Counter()

    class Watched(dict):
        def values(self):
            counted["passes"] += 1
            return super().values()

    arch.__dict__["tensors"] = Watched(arch.tensors)
    assert METHODS["interleave"].for_size(arch, 2 * count_parameters(arch).total) is not None
    assert counted["passes"] < 10


# ---- what is refused -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "says"),
    [
        ("dus", {"to": "30B"}, ["30.00B parameters cannot be reached within 5%", "the source has 7.24B", "nearest reachable size is 14.22B",
                                "13.79B (62 layers)", "14.22B (64 layers)"]),
        ("dus", {"to": "7.24B", "layers_to": 48}, ["--to and --layers-to each set the number of layers; give one"]),
        ("dus", {"to": "1B"}, ["already has 7.24B parameters (7,241,732,096)", "1.00B is not larger", "7.68B (34 layers)"]),
        ("dus", {"drop": 16}, ["--drop 16 leaves 2(n-m) = 32 layers of 32: nothing grows", "less than 16"]),
        ("dus", {"drop": 40}, ["nothing grows"]),
        ("dus", {"drop": 8, "layers_to": 48}, ["--layers-to and --drop each set"]),
        ("dus", {"drop": 0, "to": "10.7B"}, ["--to and --drop each set"]),
        ("dus", {"layers_to": 47}, ["47 layers cannot be reached from 32", "44, 46, 48, 50"]),
        ("dus", {"layers_to": 66}, ["66 layers cannot be reached", "58, 60, 62, 64"]),
        ("dus", {"layers_to": 32}, ["32 layers cannot be reached"]),
        ("dus", {"drop": 8, "seam_average": 9}, ["seam_average 9", "at most the 8 dropped ones", "--seam-average 8 or less"]),
        ("dus", {"drop": 0, "seam_average": 1}, ["at most the 0 dropped ones"]),
        ("stack", {"to": "10.7B"}, ["10.70B parameters cannot be reached", "14.22B (64 layers)"]),
        ("stack", {"layers_to": 48}, ["48 layers cannot be reached", "64, 96, 128"]),
        ("stack", {"factor": 2, "layers_to": 64}, ["--layers-to and --factor each set"]),
        ("interleave", {"layers_to": 257}, ["257 layers cannot be reached", "256"]),
        ("interleave", {"layers_to": 16}, ["16 layers cannot be reached"]),
        ("identity", {"at": [32]}, ["The source has layers 0-31; not 32"]),
        ("identity", {"at": [-1, 3, 99]}, ["not -1, 99"]),
        ("identity", {"at": []}, ["empty list"]),
        ("identity", {"at": [3], "layers_to": 33}, ["--layers-to and --at each set"]),
        ("layers", {"layers": "0-32"}, ["The source has layers 0-31; not 32"]),
        ("layers", {"layers": []}, ["empty list"]),
    ],
)  # fmt: skip
def test_a_growth_that_cannot_be_is_refused_with_what_can(method: str, options: dict[str, Any], says: list[str]):
    with pytest.raises(PlanError) as caught:
        grow(MISTRAL_7B, method, **options)
    for part in says:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("method", "options", "says"),
    [
        ("dus", {"factor": 2}, "factor: unknown key. Known: drop, layers_to, noise, seam_average, seed, to"),
        ("dus", {"to": "big"}, "'big' is not a size"),
        ("dus", {"drop": -1}, "drop: should be"),
        ("dus", {"layers_to": 0}, "layers_to: should be"),
        ("stack", {"factor": 1}, "factor: should be"),
        ("stack", {"factor": 9}, "factor: should be"),
        ("layers", {}, "layers: is missing"),
        ("layers", {"layers": "5-3"}, "'5-3' is a decreasing range; write 3-5"),
        ("layers", {"layers": "a"}, "'a' is not a layer range"),
        ("layers", {"layers": "0-3", "noise": 2}, "noise: should be"),
        ("layers", {"layers": "0-3", "seed": -1}, "seed: should be"),
    ],
)
def test_options_that_make_no_sense_are_refused_by_name(method: str, options: dict[str, Any], says: str):
    with pytest.raises(InputError) as caught:
        grow(MISTRAL_7B, method, **options)
    assert says in str(caught.value)


def test_dense_and_sparse_layers_cannot_be_averaged():
    with pytest.raises(PlanError) as caught:
        grow(BY_NAME["qwen3_moe-mixed"].config, "dus", drop=2, seam_average=1)
    assert "cannot be averaged: one is dense, the other has experts" in caught.value.message
    assert "--seam-average 0" in caught.value.hint


def test_a_target_smaller_than_its_source_is_warned_of():
    (warning,) = grow(MISTRAL_7B, "layers", layers="0-15").warnings
    assert "smaller than the source: 16 of 32 layers" in warning
    assert grow(MISTRAL_7B, "dus").warnings == ()


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(0, 5), max_size=6),
    st.just({"a": 1}),
)
LAYER_KEYS = [
    "layer_types",
    "max_window_layers",
    "use_sliding_window",
    "sliding_window",
    "mlp_only_layers",
    "decoder_sparse_step",
    "rope_scaling",
]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(list(FAMILIES)), st.dictionaries(st.sampled_from(LAYER_KEYS), JUNK, max_size=3))
def test_junk_in_a_config_never_becomes_another_error(family: str, junk: dict[str, Any]):
    config = {**BY_NAME[family].config, **junk}
    with suppress(SourceError):
        plan_of(config, grow(config, "interleave"))


# ---- guarantees and noise ------------------------------------------------------------------------------------------------------------


def test_only_what_keeps_the_function_claims_to():
    lossless = {v: variant_of(BY_NAME["llama"], v).guarantee.lossless for v in VARIANTS}
    assert lossless == {"dus": False, "stack": False, "interleave": False, "identity": True, "layers": False}
    assert grow(tiny(4), "layers", layers="0-3").guarantee.lossless


@each_variant
def test_noise_falls_on_the_matrices_of_repeated_layers_only(variant: str):
    method, options = VARIANTS[variant]
    growth = grow(BY_NAME["llama-bias"].config, method, noise=0.1, seed=5, **options)
    quiet = grow(BY_NAME["llama-bias"].config, method, **options)
    arch = Architecture(growth.config)
    assert growth.seed == 5
    for name, expr in growth.tensors.items():
        entry, plain = arch.tensors[name], quiet.tensors[name]
        if entry.layer >= 0 and growth.layers[entry.layer].new and len(entry.shape) == 2 and not isinstance(plain, Fill):
            assert expr == Sum((plain, Noise(entry.shape, 0.1, name, plain)), (1.0, 1.0))
        else:
            assert expr == plain


# ---- plans ---------------------------------------------------------------------------------------------------------------------------


def source_info(config: Mapping[str, Any], dtype: str = "BF16", **extra: TensorInfo) -> SourceInfo:
    tensors = {n: TensorInfo(dtype, e.shape) for n, e in Architecture(config).tensors.items()}
    return SourceInfo("me/model", "abc", dict(config), {**tensors, **extra}, {"model.safetensors": {"size": 1}})


def plan_of(config: Mapping[str, Any], growth: Growth, dtype: str = "BF16") -> GrowthPlan:
    return make_plan(source_info(config, dtype), growth)


def check_complete(plan: GrowthPlan) -> None:
    table = Architecture(plan.growth.config).tensors
    assert {n: t.shape for n, t in plan.targets.items()} == {n: e.shape for n, e in table.items()}
    assert list(plan.targets) == list(table)
    used = {s.key for e in plan.growth.tensors.values() for s in e.sources()}
    assert used | set(plan.growth.dropped) == set(plan.source.tensors)
    assert not used & set(plan.growth.dropped)
    assert all(plan.growth.dropped.values())
    assert plan.nbytes == sum(2 * torch.Size(t.shape).numel() for t in plan.targets.values())


@st.composite
def growths(draw, config: Mapping[str, Any], noise: bool = True) -> Growth:
    """Any depth growth of a config, with any options that it can take."""
    n = config["num_hidden_layers"]
    method = draw(st.sampled_from(["dus", "stack", "interleave", "identity", "layers"]))
    options: dict[str, Any] = {}
    if method == "layers":
        options["layers"] = draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=2 * n + 1))
    elif method == "identity" and draw(st.booleans()):
        options["at"] = draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=4))
    elif method == "stack":
        options["factor"] = draw(st.sampled_from([2, 3]))
    elif method == "dus":
        options["drop"] = draw(st.integers(0, (n - 1) // 2))
        options["seam_average"] = draw(st.integers(0, options["drop"]))
    else:
        options["layers_to"] = draw(st.integers(n + 1, 3 * n))
    if noise and draw(st.booleans()):
        options |= {"noise": 0.01, "seed": draw(st.integers(0, 3))}
    try:
        return grow(config, method, **options)
    except PlanError:  # a dense layer cannot be averaged with a sparse one
        assume(False)
        raise


CONFIGS = st.builds(
    lambda case, n: {**case.config, "num_hidden_layers": n, "use_sliding_window": False},
    st.sampled_from(CASES),
    st.integers(1, 5),
)


@settings(max_examples=100, deadline=None)
@given(CONFIGS, st.data())
def test_any_depth_plan_is_complete_and_survives_json(config: dict[str, Any], data):
    plan = plan_of(config, data.draw(growths(config)))
    check_complete(plan)
    again = GrowthPlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert again.fingerprint == plan.fingerprint
    assert again.sizes == plan.sizes == (count_parameters(Architecture(config)), count_parameters(plan.architecture))


def through(first: Sequence[LayerOrigin], layer: LayerOrigin) -> dict[int, float]:
    """The share of each source layer in a layer of the second step."""
    shares: Counter[int] = Counter()
    for i, weight in zip(layer.sources, layer.weights, strict=True):
        for j, inner in zip(first[i].sources, first[i].weights, strict=True):
            shares[j] += weight * inner
    return shares


@settings(max_examples=60, deadline=None)
@given(CONFIGS, st.data())
def test_two_growths_composed_are_one_after_the_other(config: dict[str, Any], data):
    first = data.draw(growths(config, noise=False))
    second = data.draw(growths(first.config, noise=False))
    both = compose(first, second)
    check_complete(plan_of(config, both))
    assert both.config == second.config
    # One number stands for each tensor: the maps are linear, and shapes are checked by the plan.
    source = {n: float(i) for i, n in enumerate(Architecture(config).tensors, 1)}

    def number(expr: Expr, state: Mapping[str, float]) -> float:
        if isinstance(expr, Sum):
            return sum(w * number(t, state) for w, t in zip(expr.weights, expr.terms, strict=True))
        return state[expr.name] if isinstance(expr, Source) else 0.0

    middle = {n: number(e, source) for n, e in first.tensors.items()}
    for name, expr in both.tensors.items():
        assert math.isclose(number(expr, source), number(second.tensors[name], middle), rel_tol=1e-12)
    for t, layer in enumerate(second.layers):
        shares: Counter[int] = Counter()
        for i, w in zip(both.layers[t].sources, both.layers[t].weights, strict=True):
            shares[i] += w
        assert shares == pytest.approx(through(first.layers, layer))
    assert both.guarantee.lossless == (first.guarantee.lossless and second.guarantee.lossless)


def test_noise_of_a_chain_is_drawn_anew_at_every_step():
    """Three equal steps: no tensor gets the same numbers twice."""
    config = tiny(2)
    chain = grow(config, "interleave", noise=0.1)
    for _ in range(2):
        chain = compose(chain, grow(chain.config, "interleave", noise=0.1))

    def keys(expr: Expr) -> list[str]:
        own = [expr.key] if isinstance(expr, Noise) else []
        return own + [k for child in expr.children() if not isinstance(expr, Noise) for k in keys(child)]

    drawn = {name: keys(expr) for name, expr in chain.tensors.items()}
    assert max(map(len, drawn.values())) == 3
    assert all(len(set(k)) == len(k) for k in drawn.values())


def test_the_fingerprint_tells_plans_apart():
    config = tiny(4)
    plans = [
        plan_of(config, grow(config, "dus")),
        plan_of(config, grow(config, "dus", drop=0)),
        plan_of(config, grow(config, "dus", noise=0.1)),
        plan_of(config, grow(config, "dus", noise=0.1, seed=1)),
        plan_of(config, grow(config, "dus"), "F32"),
        plan_of({**config, "rope_theta": 5e5}, grow({**config, "rope_theta": 5e5}, "dus")),
    ]
    assert len({p.fingerprint for p in plans}) == len(plans)


def test_copies_are_the_plain_sources():
    config = tiny(4)
    plan = plan_of(config, grow(config, "identity"))
    assert plan.copies() == {n: e.name for n, e in plan.growth.tensors.items() if isinstance(e, Source)}
    assert set(plan.targets) - set(plan.copies()) == {n for n in plan.targets if n.startswith("model.layers.4.") and WRITERS.search(n)}


def test_new_tensors_have_the_dtype_of_their_namesakes():
    config = tiny(4)
    info = source_info(config)
    mixed = {n: TensorInfo("F32", t.shape) if ".o_proj." in n else t for n, t in info.tensors.items()}
    plan = make_plan(SourceInfo(info.ref, info.revision, info.config, mixed), grow(config, "identity"))
    assert {n: t.dtype for n, t in plan.targets.items()} == {n: "F32" if ".o_proj." in n else "BF16" for n in plan.targets}


def test_what_only_old_converters_store_is_dropped_with_a_reason():
    config = tiny(4, tie_word_embeddings=True)
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    extra = {"lm_head.weight": TensorInfo("BF16", (64, 48)), buffer: TensorInfo("F32", (4,))}
    plan = make_plan(source_info(config, **extra), grow(config, "dus"))
    check_complete(plan)
    assert "tied" in plan.growth.dropped["lm_head.weight"]
    assert "loaders recompute" in plan.growth.dropped[buffer]
