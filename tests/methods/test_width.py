"""Width growth that says lossless is lossless, to the last bits of fp64; what says that it changes the function does."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product
from typing import Any

import pytest
import torch
from exact import exact, logits
from grown import grown_by, growth_of, plan_of
from hypothesis import given, settings
from hypothesis import strategies as st
from models import BY_NAME, CASES, SIZES, Case, each_case, from_disk, make, on_disk, real_config, tokens
from transformers import PreTrainedModel

from hf_grow.convert.in_memory import grow_model
from hf_grow.errors import InputError, PlanError
from hf_grow.methods import METHODS
from hf_grow.methods.width.attention_maps import heads_feasible
from hf_grow.model.architecture import Architecture

WIDTH = [m for m in METHODS.values() if m.kind == "width"]
TOLERANCE = 1e-10


def difference(model: PreTrainedModel, grown: PreTrainedModel) -> float:
    ids = tokens(model)
    return (logits(model, ids) - logits(grown, ids)).abs().max().item()


@cache
def source(name: str) -> PreTrainedModel:
    """Made in exact arithmetic whichever test asks first: its rotary tables are kept with it."""
    with exact():
        return make(BY_NAME[name], dtype=torch.float64)


# ---- every setting with every other ---------------------------------------------------------------------------------------------------

SETTINGS: dict[str, tuple[Any, ...]] = {
    "hidden": (1, 1.25, 1.5, 2, 3),
    "mode": ("scale", "eps"),
    "method": ("tile", "pad", "lemon"),
    "heads": ("same", "more queries", "more of both", "wider groups", "smaller groups", "twice"),
    "new_heads": ("split", "null"),
    "inter": (1, 1.5, 2, 2.3),
    "ffn": ("null", "copies"),
    "symmetry": ("none", "noise", "split"),
    "head_dim": (1, 1.5, 2),
    "deeper": ("", "before", "after"),
}


@dataclass(frozen=True)
class Setting:
    case: str
    values: tuple[Any, ...]

    def __str__(self) -> str:
        return "-".join([self.case, *(str(v).replace(" ", "_") or "same" for v in self.values)])

    def __getitem__(self, name: str) -> Any:
        return self.values[list(SETTINGS).index(name)]

    @property
    def pairs(self) -> set[Any]:
        """What a covering selection has to cover: every two values together, and every value with every case."""
        named = list(zip(SETTINGS, self.values, strict=True))
        return {*combinations(named, 2), *((self.case, n) for n in named)}

    @property
    def options(self) -> dict[str, Any] | None:
        """The options as a user gives them; None where the family refuses the sizes."""
        arch = Architecture(BY_NAME[self.case].config)
        heads, kv = arch.heads, arch.size("kv")
        heads, kv = {
            "same": (heads, kv),
            "more queries": (heads + kv, kv),
            "more of both": (heads + heads // kv, kv + 1),
            "wider groups": (2 * heads, kv),
            "smaller groups": (math.ceil(heads / kv / 2) * 2 * kv, math.ceil(heads / kv / 2) * kv),
            "twice": (2 * heads, 2 * kv),
        }[self["heads"]]
        hidden = round(arch.size("hidden") * self["hidden"])
        normed = arch.has_norm_over("head_dim")
        if (arch.family.heads_divide_hidden and hidden % heads) or (normed and self["mode"] == "eps"):
            return None
        units = {"intermediate": "inter" if arch.size("inter") else "expert_inter"}
        if arch.size("inter") and arch.size("expert_inter"):
            units["expert_intermediate"] = "expert_inter"
        return {
            "hidden": hidden,
            "rms_mode": self["mode"],
            "heads": heads,
            "kv_heads": kv,
            "new_heads": self["new_heads"],
            **{option: round(arch.size(axis) * self["inter"]) for option, axis in units.items()},
            "ffn": self["ffn"],
            "symmetry": self["symmetry"],
            "head_dim": round(arch.size("head_dim") * self["head_dim"]),
        }


def covering(count: int) -> list[Setting]:
    """``count`` settings for each case, each the one of some random ones that meets the most pairs not met before."""
    draw, met, chosen = random.Random(0), set[Any](), []
    for case in [c.name for c in CASES] * count:
        found = [Setting(case, tuple(draw.choice(v) for v in SETTINGS.values())) for _ in range(60)]
        best = max((s for s in found if s.options), key=lambda s: len(s.pairs - met))
        met |= best.pairs
        chosen.append(best)
    return chosen


def check_lossless(setting: Setting) -> None:
    model, options = source(setting.case), setting.options
    assert options
    plan = plan_of(model, setting["method"], deeper=setting["deeper"], **options)
    assert plan.guarantee.lossless
    assert difference(model, grow_model(model, plan)) < TOLERANCE


@pytest.mark.parametrize("setting", covering(4), ids=str)
def test_growth_computes_the_same_function(setting: Setting, exact_math: None) -> None:
    check_lossless(setting)


def test_the_selection_covers_every_two_values_together() -> None:
    met = set().union(*(s.pairs for s in covering(4)))
    for (a, first), (b, second) in combinations(SETTINGS.items(), 2):
        assert not [(x, y) for x in first for y in second if ((a, x), (b, y)) not in met]


def everything() -> Iterator[Setting]:
    """All sizes of hidden and heads in both modes by all methods on every case, the other settings drawn."""
    draw = random.Random(1)
    for case, hidden, mode, method, heads in product(CASES, *list(SETTINGS.values())[:4]):
        setting = Setting(case.name, (hidden, mode, method, heads, *(draw.choice(v) for v in list(SETTINGS.values())[4:])))
        if setting.options:
            yield setting


@pytest.mark.slow
@each_case
def test_growth_computes_the_same_function_in_every_combination(case: Case, exact_math: None) -> None:
    for setting in everything():
        if setting.case == case.name:
            check_lossless(setting)


# ---- methods and what they say --------------------------------------------------------------------------------------------------------

SAYS_LOSSLESS = [
    ("tile", {"factor": 2}),
    ("tile", {"hidden": 60, "intermediate": 64}),
    ("pad", {"hidden": 60, "intermediate": 64}),
    ("pad", {"factor": 2}),
    ("pad", {"factor": 2, "rms_mode": "eps"}),
    ("lemon", {"factor": 2}),
    ("lemon", {"hidden": 60, "intermediate": 64}),
    ("hypercloning", {"factor": 2}),
    ("hypercloning", {"factor": 3}),
    ("hypercloning", {"factor": 2, "noise_db": 10}),
    ("hypercloning", {"factor": 3, "noise_db": 0}),
    ("fpi", {"factor": 2}),
    ("fpi", {"intermediate": 90}),
    ("fpi", {"hidden": 144, "intermediate": 60, "ffn": "null"}),
    ("net2net", {"intermediate": 90}),
    ("net2net", {"heads": 8, "kv_heads": 2}),
    ("aki", {"hidden": 48}),
    ("aki", {"factor": 2, "lossless": True}),
    ("aki", {"hidden": 60, "intermediate": 64, "lossless": True}),
    ("aki", {"hidden": 144, "intermediate": 80, "heads": 24, "kv_heads": 6, "lossless": True}),
    ("aki", {"heads": 12, "fixed_kv": True, "lossless": True}),
    ("aki", {"heads": 6, "kv_heads": 6, "lossless": True}),
    ("aki", {"heads": 12, "kv_heads": 4, "head_dim": 12, "lossless": True}),
]
SAYS_CHANGES = [
    ("fpi", {"hidden": 60, "intermediate": 64}),
    ("net2net", {"factor": 2}),
    ("net2net", {"hidden": 72}),
    ("aki", {"factor": 2}),
    ("aki", {"intermediate": 80}),
    ("aki", {"heads": 12, "kv_heads": 4}),
    ("aki", {"hidden": 96, "heads": 12, "fixed_kv": True}),
]
PLAIN = ("llama", "llama-tied", "mixtral", "qwen2", "qwen3-bias")
each_plain = pytest.mark.parametrize("name", PLAIN)


def ids_of(ways: list[tuple[str, dict[str, Any]]]) -> list[str]:
    return ["-".join([m, *(f"{k}={v}" for k, v in o.items())]) for m, o in ways]


@each_plain
@pytest.mark.parametrize(("method", "options"), SAYS_LOSSLESS, ids=ids_of(SAYS_LOSSLESS))
def test_a_method_that_says_lossless_is(method: str, options: dict[str, Any], name: str, exact_math: None) -> None:
    model = source(name)
    if name.startswith("qwen3") and (options.get("rms_mode") == "eps" or (method == "lemon" and "hidden" in options)):
        # qwen3's q and k norms share the eps that this mode changes.
        with pytest.raises(PlanError, match="rms_norm_eps") as refused:
            plan_of(model, method, **options)
        assert "scale" in refused.value.hint
        return
    if name.startswith("llama") and options.get("hidden") == 60:
        options = {**options, "heads": 10, "kv_heads": 2}
    plan = plan_of(model, method, **options)
    assert plan.guarantee.lossless, plan.guarantee
    assert difference(model, grow_model(model, plan)) < TOLERANCE


@each_plain
@pytest.mark.parametrize(("method", "options"), SAYS_CHANGES, ids=ids_of(SAYS_CHANGES))
def test_a_method_that_says_it_changes_the_function_does(method: str, options: dict[str, Any], name: str, exact_math: None) -> None:
    model = source(name)
    if name.startswith("llama") and options.get("hidden") == 60:
        options = {**options, "heads": 10, "kv_heads": 2}
    plan = plan_of(model, method, **options)
    assert plan.guarantee.kind == "changes the function"
    assert difference(model, grow_model(model, plan)) > 0.01


def test_every_width_method_is_examined_here() -> None:
    assert {m for m, _ in SAYS_LOSSLESS} == {m.name for m in WIDTH}


def test_growth_without_the_rule_for_the_norms_would_be_seen(exact_math: None) -> None:
    """The tests can fail: eps and gains are such that forgetting either shows at once."""
    model = source("llama")
    plan = plan_of(model, "tile", hidden=60, heads=10, rms_mode="eps")
    grown = grow_model(model, plan)
    for norm in [m for m in grown.modules() if hasattr(m, "variance_epsilon")]:
        norm.variance_epsilon = model.config.rms_norm_eps
    assert difference(model, grown) > 1e-3


# ---- bf16 -----------------------------------------------------------------------------------------------------------------------------


def stored_in_bf16(case: Case, dtype: torch.dtype) -> PreTrainedModel:
    """A model whose weights are bf16 numbers, computing in ``dtype``."""
    return from_disk(case.config, {n: t.bfloat16().to(dtype) for n, t in on_disk(make(case)).items()}, dtype)


def exactly(model: PreTrainedModel) -> PreTrainedModel:
    """The same stored weights, computing in fp64: what growth costs must not hang on how bf16 products round on this machine."""
    return from_disk({**model.config.to_dict(), "dtype": "float64"}, {n: t.double() for n, t in on_disk(model).items()}, torch.float64)


@each_case
def test_doubling_a_bf16_checkpoint_rounds_nothing(case: Case, exact_math: None) -> None:
    """Halves of bf16 numbers are bf16 numbers: the stored weights are exact, whatever computes with them."""
    small = stored_in_bf16(case, torch.bfloat16)
    grown = grown_by(small, "tile", factor=2, symmetry="none")
    assert all(t.dtype == torch.bfloat16 for t in on_disk(grown).values())
    assert difference(stored_in_bf16(case, torch.float64), exactly(grown)) < TOLERANCE


def moved_by_half_an_ulp(model: PreTrainedModel) -> PreTrainedModel:
    """Every weight a little more than half a unit in the last place up or down, then rounded to bf16 again: what storing it may cost."""
    moved, generator = copy.deepcopy(model), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in moved.parameters():
            ulp = torch.exp2(torch.frexp(p.float()).exponent - 8.0)
            p.copy_(p.float() + 0.501 * ulp * (torch.randint(0, 2, p.shape, generator=generator) * 2 - 1))
    return moved


BF16 = [
    {"factor": 3, "symmetry": "none"},
    {"factor": 2, "symmetry": "noise", "strength": 0.5},
    {"factor": 2, "symmetry": "split", "strength": 0.5},
    {"hidden": 60, "heads": 10, "kv_heads": 2, "intermediate": 52},
    {"head_dim": 18, "intermediate": 100},
]


@pytest.mark.parametrize("options", BF16, ids=lambda v: "-".join(map(str, v.values())))
@pytest.mark.parametrize("name", ["llama", "llama-tied", "mistral", "qwen2", "qwen3-tied"])
def test_growth_of_a_bf16_checkpoint_costs_less_than_its_own_rounding(name: str, options: dict[str, Any], exact_math: None) -> None:
    """Dense families only: where a router turns, rounding of any size changes logits."""
    model = stored_in_bf16(BY_NAME[name], torch.bfloat16)
    floor = difference(exactly(model), exactly(moved_by_half_an_ulp(model)))
    cost = difference(exactly(model), exactly(grown_by(model, "tile", **options)))

    assert cost < 0.5 * floor


# ---- rotary embeddings ----------------------------------------------------------------------------------------------------------------

ROPE = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 300},
    "longrope": {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 8,
                 "short_factor": [1.0, 1.1, 1.3, 1.7], "long_factor": [2.0, 2.5, 3.0, 4.0]},
}  # fmt: skip


@pytest.mark.parametrize("head_dim", [8, 12, 16])
@pytest.mark.parametrize("rope", ROPE)
def test_head_dim_under_rotary_scaling_is_lossless_or_refused(rope: str, head_dim: int, exact_math: None) -> None:
    model = make(BY_NAME["llama"], dtype=torch.float64, rope_parameters={"rope_theta": 1000.0, **ROPE[rope]}, max_position_embeddings=16)
    if head_dim > 8 and rope in ("dynamic", "yarn", "longrope"):  # these look at the place of a pair, not only at its frequency
        with pytest.raises(PlanError, match=f"{rope} rotary scaling"):
            plan_of(model, "tile", head_dim=head_dim)
        return
    grown = grown_by(model, "tile", head_dim=head_dim, intermediate=64)
    ids = tokens(model, length=24)  # longer than the context, where dynamic scaling sets in
    assert (logits(model, ids) - logits(grown, ids)).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    "spelling",
    [
        {},
        {"rope_theta": 5e5},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}},
    ],
    ids=lambda s: "+".join(s) or "default",
)
def test_theta_is_raised_however_the_config_spells_it(spelling: dict[str, Any]) -> None:
    config = {**BY_NAME["llama"].config, **spelling}
    old, new = real_config(config).rope_parameters, real_config(growth_of(config, "tile", head_dim=12).config).rope_parameters
    assert new["rope_theta"] == pytest.approx(old["rope_theta"] ** 1.5)
    assert {**new, "rope_theta": 0} == {k: 0 if k == "rope_theta" else v for k, v in old.items() if k != "type"}


# ---- pairs of head counts -------------------------------------------------------------------------------------------------------------

MISTRAL_7B = {
    "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip


@pytest.mark.parametrize(
    ("heads", "kv"), [(40, 10), (48, 8), (40, 8), (48, 16), (64, 16), (48, 12), (32, 16), (40, 20), (32, 32), (36, 9), (32, 8)]
)
def test_feasible_heads_are_accepted_on_the_config_of_mistral_7b(heads: int, kv: int) -> None:
    config = growth_of(MISTRAL_7B, "tile", heads=heads, kv_heads=kv, intermediate=16384).config
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (heads, kv)


@pytest.mark.parametrize(("heads", "kv"), [(36, 12), (33, 11), (40, 4), (40, 12), (24, 8), (48, 32), (31, 31)])
def test_infeasible_heads_are_refused_with_the_nearest_that_work(heads: int, kv: int) -> None:
    with pytest.raises(PlanError, match=f"{heads} on {kv}") as refused:
        growth_of(MISTRAL_7B, "tile", heads=heads, kv_heads=kv)
    pairs = [tuple(map(int, p.split("/"))) for p in refused.value.hint.removeprefix("Nearest pairs that work: ").rstrip(".").split(", ")]
    assert pairs
    for h, g in pairs:
        growth_of(MISTRAL_7B, "tile", heads=h, kv_heads=g, intermediate=16384)


def exact_by_search(heads: int, kv: int, new_heads: int, new_kv: int) -> bool:
    """The rule from its meaning: every old query head needs a slot behind a copy of its own kv head, and no slot serves two kv heads."""
    if new_heads < heads or new_kv < kv or new_heads % new_kv:
        return False
    group, slots = heads // kv, new_heads // new_kv
    copies = 0  # how many new kv heads one old kv head needs to have room for its query heads
    while copies * slots < group:
        copies += 1
    return copies * kv <= new_kv


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 80), st.integers(1, 40))
def test_the_rule_for_heads_says_what_it_means(kv: int, group: int, new_heads: int, new_kv: int) -> None:
    assert heads_feasible(kv * group, kv, new_heads, new_kv) == exact_by_search(kv * group, kv, new_heads, new_kv)


@pytest.mark.parametrize("heads", [(6, 1), (8, 1), (12, 1), (12, 2), (12, 3), (12, 6), (12, 12), (9, 3)])
def test_one_kv_head_grows_to_any_number_of_them(heads: tuple[int, int], exact_math: None) -> None:
    model = make(BY_NAME["mistral"], dtype=torch.float64, num_key_value_heads=1)
    for new_heads in ("split", "null"):
        assert difference(model, grown_by(model, "tile", heads=heads[0], kv_heads=heads[1], hidden=60, new_heads=new_heads)) < TOLERANCE


# ---- what is refused ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("tile", {}, "Nothing to grow"),
        ("tile", {"hidden": 40}, "cannot shrink"),
        ("tile", {"intermediate": 39}, "cannot shrink"),
        ("tile", {"heads": 4}, "4 on 2"),
        ("tile", {"factor": 1.25}, "not an integer"),
        ("tile", {"factor": 2, "hidden": 96}, "one kind"),
        ("tile", {"factor": 2, "to": "1M"}, "one kind"),
        ("tile", {"hidden": 96, "to": "1M"}, "one kind"),
        ("tile", {"head_dim": 9, "factor": 2}, "even"),
        ("tile", {"head_dim": 6, "factor": 2}, "shrink|below"),
        ("tile", {"hidden": 50}, "is not divisible by"),
        ("tile", {"expert_intermediate": 64}, "no experts"),
        ("hypercloning", {"hidden": 60}, "integer factors"),
        ("hypercloning", {"factor": 2, "head_dim": 16}, "head_dim"),
        ("tile", {"to": "1K"}, "is not larger"),
        ("tile", {"to": "90B"}, "nearest reachable size is"),
    ],
)
def test_what_cannot_be_grown_is_refused_with_the_reason(method: str, options: Mapping[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        growth_of(BY_NAME["llama"].config, method, **options)


@pytest.mark.parametrize("options", [{"symmetry": "other"}, {"strength": 0}, {"factor": 0.5}, {"hidden": 0}, {"noise_db": 10}])
def test_options_that_mean_nothing_are_input_errors(options: Mapping[str, Any]) -> None:
    with pytest.raises(InputError):
        growth_of(BY_NAME["llama"].config, "tile", **options)


# ---- any sizes ------------------------------------------------------------------------------------------------------------------------


@cache
def small(family: str, tied: bool) -> PreTrainedModel:
    sizes = {**SIZES, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 24}
    with exact():
        return make({"model_type": family, **sizes, "head_dim": 4, "tie_word_embeddings": tied}, dtype=torch.float64)


options_drawn = st.fixed_dictionaries(
    {
        "hidden": st.integers(12, 56),
        "intermediate": st.integers(10, 50),
        "heads": st.integers(3, 16),
        "kv_heads": st.integers(1, 8),
        "head_dim": st.integers(1, 8).map(lambda n: 2 * n),
        "symmetry": st.sampled_from(["none", "noise", "split"]),
        "strength": st.sampled_from([0.01, 0.1, 1.0]),
        "new_heads": st.sampled_from(["split", "null"]),
        "ffn": st.sampled_from(["auto", "null", "copies"]),
        "rms_mode": st.sampled_from(["scale", "eps"]),
        "seed": st.integers(0, 3),
    }
)


@settings(max_examples=60, deadline=None)
@given(
    family=st.sampled_from(["llama", "qwen3"]),
    tied=st.booleans(),
    method=st.sampled_from(["tile", "pad", "lemon"]),
    options=options_drawn,
)
def test_any_sizes_are_lossless_or_refused_with_words(family: str, tied: bool, method: str, options: dict[str, Any]) -> None:
    model = small(family, tied)
    feasible = (
        options["hidden"] >= 16
        and options["intermediate"] >= 12
        and options["head_dim"] >= 4
        and exact_by_search(4, 2, options["heads"], options["kv_heads"])
        and not (family == "llama" and options["hidden"] % options["heads"])
        and not (family == "qwen3" and options["rms_mode"] == "eps" and (options["hidden"] % 16 or (method == "pad" and options["hidden"] > 16)))
    )  # fmt: skip
    with exact():
        if not feasible:
            with pytest.raises(PlanError) as refused:
                plan_of(model, method, **options)
            assert refused.value.hint or "shrink" in refused.value.message or "even size" in refused.value.message
            return
        plan = plan_of(model, method, **options)
        assert plan.guarantee.lossless
        assert all(axis.is_exact() for axis in plan.growth.axes.values() if axis.dual)
        assert difference(model, grow_model(model, plan)) < TOLERANCE


def test_a_guarantee_tells_what_its_own_method_does() -> None:
    model = source("llama")
    because = {
        way: plan_of(model, *way[:1], factor=2, **dict(way[1:])).guarantee.because
        for way in (("fpi",), ("tile",), ("aki", ("lossless", True)))
    }
    assert ["next layer" in because[way] for way in because] == [False, False, True]
