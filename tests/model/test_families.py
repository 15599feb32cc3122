"""The table of families against the installed transformers: same tensors, same defaults, same configs accepted and refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import BY_NAME, LLAMA3, SIZES, WINDOW, Case, each_case, make, on_disk, real_config, save, tokens
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from hf_grow.errors import SourceError
from hf_grow.model.architecture import Architecture
from hf_grow.model.config_compat import portable_config
from hf_grow.model.families import FAMILIES
from hf_grow.model.family import PREDICATES
from hf_grow.model.param_count import block_parameters, count_parameters, format_count
from hf_grow.model.unsupported import UNSUPPORTED

each_family = pytest.mark.parametrize("family", FAMILIES)
Shapes = dict[str, tuple[int, ...]]


def table(config: Mapping[str, Any]) -> Shapes:
    return {name: entry.shape for name, entry in Architecture(config).tensors.items()}


# ---- tensors -------------------------------------------------------------------------------------------------------------------------


@each_case
@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
def test_the_table_lists_what_save_pretrained_writes(case: Case, sharded: bool, tmp_path):
    save(make(case), tmp_path, sharded=sharded)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == sharded
    stored: Shapes = {}
    for path in files:
        with safe_open(path, "pt") as f:
            stored |= {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}  # noqa: SIM118
    assert table(case.config) == stored


@each_case
def test_the_config_that_save_pretrained_writes_gives_the_same_table(case: Case):
    assert table(real_config(case).to_dict()) == table(case.config)


@each_case
def test_tensors_come_as_embedding_then_blocks_then_norm_and_head(case: Case):
    arch = Architecture(case.config)
    names = list(arch.tensors)
    assert names[0] == "model.embed_tokens.weight"
    assert names[-2 + arch.tied :] == ["model.norm.weight", "lm_head.weight"][: 2 - arch.tied]
    layers = [e.layer for e in arch.tensors.values() if e.layer >= 0]
    assert layers == sorted(layers)
    assert set(layers) == set(range(arch.layers))


@each_case
def test_what_writes_the_residual_stream_is_what_silences_a_block_when_zero(case: Case):
    """Zero exactly those tensors of one block: the model computes what it computes without that block."""
    arch = Architecture(case.config)
    model = make(case)
    ids = tokens(model)
    silent = {n for n, e in arch.tensors.items() if e.layer == 1 and e.writes_residual}
    assert silent < set(on_disk(model))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.startswith("model.layers.1.") and any(part in name for part in ("o_proj", "down_proj")):
                p.zero_()
        zeroed = model(ids, use_cache=False).logits
        model.model.layers[1].forward = lambda hidden_states, **_: hidden_states
        assert torch.equal(zeroed, model(ids, use_cache=False).logits)
    assert silent == {n for n, p in on_disk(model).items() if ".layers.1." in n and not p.any()}


def test_counterparts_in_other_layers_and_experts_are_named():
    entry = Architecture(BY_NAME["mixtral"].config).tensors["model.layers.1.block_sparse_moe.experts.2.w1.weight"]
    assert entry.at(layer=3) == "model.layers.3.block_sparse_moe.experts.2.w1.weight"
    assert entry.at(layer=3, expert=0) == "model.layers.3.block_sparse_moe.experts.0.w1.weight"
    assert entry.at() == entry.name


# ---- configs -------------------------------------------------------------------------------------------------------------------------


@each_family
def test_defaults_are_those_of_the_config_class(family: str):
    real = AutoConfig.for_model(family)
    for key, default in FAMILIES[family].defaults.items():
        if key == "rope_theta":
            assert real.rope_parameters["rope_theta"] == default
        elif key == "sliding_window" and "use_sliding_window" in FAMILIES[family].defaults:
            assert AutoConfig.for_model(family, use_sliding_window=True).sliding_window == default
        elif default is not None:  # None: derived, see the next tests
            assert getattr(real, key) == default, key


@each_family
def test_a_config_with_every_optional_key_left_out_has_the_sizes_transformers_gives_it(family: str):
    bare = {
        "model_type": family,
        "vocab_size": 8,
        "hidden_size": 128,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 32,
    }
    assert table(bare) == built(bare)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])  # the others refuse null
def test_null_key_value_heads_are_as_many_as_query_heads_and_not_the_default(family: str):
    config = {"model_type": family, **SIZES, "num_key_value_heads": None}
    assert table(config) == built(config)
    assert Architecture(config).size("kv") == SIZES["num_attention_heads"]


@pytest.mark.parametrize("family", ["llama", "mistral", "mixtral"])  # the others refuse null
def test_null_head_dim_is_derived_from_hidden_size(family: str):
    config = {"model_type": family, **SIZES, "head_dim": None}
    assert table(config) == built(config)


def test_a_null_sliding_window_is_none_and_not_the_default():
    config = {"model_type": "mistral", **SIZES, "sliding_window": None}
    assert real_config(config).sliding_window is None
    assert Architecture(config).get("sliding_window") is None


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts"])
def test_both_spellings_of_the_number_of_experts_are_read(key: str):
    config = {k: v for k, v in BY_NAME["qwen3_moe"].config.items() if k != "num_experts"} | {key: 3, "num_experts_per_tok": 2}
    assert Architecture(config).size("experts") == 3


def test_keys_that_a_family_does_not_know_change_nothing():
    stray = {"mlp_only_layers": [0], "decoder_sparse_step": 2, "attention_bias": True, "mlp_bias": True}
    config = BY_NAME["mixtral"].config
    assert table({**config, **stray}) == table(config)
    assert not built({**config, **stray}).keys() ^ built(config).keys()


def built(config: Mapping[str, Any], *, run: bool = False) -> Shapes:
    """The tensors of the model that transformers builds, by their names on disk; with `run`, only if it also runs."""
    with torch.device("cpu" if run else "meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**config), attn_implementation="eager", experts_implementation="eager"
        )
    if run:
        ids = torch.zeros(1, 2, dtype=torch.long)
        assert model(ids, use_cache=False).logits.shape == (1, 2, config["vocab_size"])
    return {name: tuple(p.shape) for name, p in on_disk(model).items()}


@st.composite
def configs(draw) -> dict[str, Any]:
    """Small configs of every family: most are sound, some have one wrong value."""
    family = draw(st.sampled_from(list(FAMILIES)))
    small = st.integers(1, 5)
    kv = draw(small)
    heads = kv * draw(small)
    head_dim = 2 * draw(small)
    config = {
        "model_type": family,
        "vocab_size": draw(small),
        "hidden_size": heads * head_dim if draw(st.booleans()) else draw(st.integers(2, 40)),
        "intermediate_size": draw(small),
        "num_hidden_layers": draw(small),
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": head_dim,
        "tie_word_embeddings": draw(st.booleans()),
    }
    if family in ("llama", "qwen3", "qwen3_moe"):
        config["attention_bias"] = draw(st.booleans())
    if family == "llama":
        config["mlp_bias"] = draw(st.booleans())
    if family == "mixtral":
        config |= {"num_local_experts": draw(small), "num_experts_per_tok": 1}
    if family == "qwen3_moe":
        config |= {
            "num_experts": draw(small),
            "num_experts_per_tok": 1,
            "moe_intermediate_size": draw(small),
            "decoder_sparse_step": draw(st.integers(1, 3)),
            "mlp_only_layers": draw(st.lists(st.integers(-1, 5), max_size=3)),
        }
    if draw(st.booleans()):
        key = draw(st.sampled_from([k for k in config if k != "model_type"]))
        config[key] = draw(st.sampled_from([0, -1, 1, 3, 7, "8", 2.0, True, None, [], {}, [1.5]]))
    return config


def lenient(config: Mapping[str, Any]) -> bool:
    """Where the table accepts more than transformers 5: older releases derive these, and the target's config says them out loud."""
    return config["head_dim"] is None or config["num_key_value_heads"] is None


def strict(config: Mapping[str, Any]) -> bool:
    """Where the table accepts less: sizes that torch builds, but that are no model of this kind."""
    empty = any(isinstance(v, int) and v <= 0 for k, v in config.items())
    true = any(v is True for k, v in config.items() if not k.startswith(("tie_", "attention_", "mlp_")))
    return empty or true or (isinstance(config["head_dim"], int) and config["head_dim"] % 2 == 1)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@settings(max_examples=300, deadline=None)
@given(configs())
def test_exactly_the_configs_that_transformers_builds_and_runs_are_accepted(config: dict[str, Any]):
    try:
        theirs: Shapes | None = built(config, run=True)
    except Exception:
        theirs = None
    try:
        ours: Shapes | None = table(config)
    except SourceError:
        ours = None
    if ours is None:
        assert theirs is None or strict(config)
    elif theirs is None:
        assert lenient(config)
    else:
        assert ours == theirs


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.lists(st.integers(), max_size=2), st.just({"a": 1})
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(list(BY_NAME.values())), st.data())
def test_junk_in_a_config_is_a_source_error_or_understood(case: Case, data):
    keys = [*case.config, *FAMILIES[case.family].defaults, "layer_types", "max_window_layers", "rope_scaling", "rope_parameters", "dtype"]
    config = {**case.config, data.draw(st.sampled_from(keys)): data.draw(JUNK)}
    with suppress(SourceError):
        count_parameters(Architecture(config))
        portable_config(config)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "gpt2"}, "'gpt2' is not supported"),
        ({"model_type": None}, "None is not supported"),
        ({"model_type": ["llama"]}, "is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"hidden_size": 50}, "hidden_size 50 is not a multiple of num_attention_heads 6"),
        ({"num_key_value_heads": 4}, "num_attention_heads 6 is not a multiple of num_key_value_heads 4"),
        ({"hidden_size": "48"}, "hidden_size must be a positive integer, got '48'"),
        ({"vocab_size": 2**70}, "vocab_size must be a positive integer"),
        ({"num_hidden_layers": 10**9}, "1000000000 layers"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false, got yes"),
        ({"layer_types": ["full_attention"]}, "layer_types must be a list of 4 names"),
        ({"model_type": "mistral", "sliding_window": "4096"}, "sliding_window must be a number of positions, got 4096"),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": None}, "max_window_layers must be a number of layers"),
        ({"rope_scaling": "linear"}, "rotary settings must be an object"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_a_refused_config_is_told_which_key_is_wrong(change: dict[str, Any], says: str):
    with pytest.raises(SourceError) as caught:
        portable_config({**BY_NAME["llama"].config, **change})
    assert says in caught.value.message


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_experts_per_tok": 5}, "num_experts_per_tok must be at most the number of experts, 4, got 5"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step must be a positive integer"),
        ({"mlp_only_layers": 3}, "mlp_only_layers must be a list of layers"),
        ({"num_experts": 10**6}, "more than any real model"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_a_refused_mixture_is_told_which_key_is_wrong(change: dict[str, Any], says: str):
    with pytest.raises(SourceError) as caught:
        Architecture({**BY_NAME["qwen3_moe"].config, **change})
    assert says in caught.value.message


# ---- portable_config -----------------------------------------------------------------------------------------------------------------

OLD_KEYS = ("rope_theta", "rope_scaling", "torch_dtype")
NEW_KEYS = ("rope_parameters", "dtype")
SCALING = {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
ROTARY = {
    "old": {"rope_theta": 5e5, "torch_dtype": "bfloat16"},
    "old-null-scaling": {"rope_theta": 5e5, "rope_scaling": None, "torch_dtype": "bfloat16"},
    "old-llama3": {"rope_theta": 5e5, "rope_scaling": SCALING, "torch_dtype": "bfloat16"},
    "old-type": {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "old-yarn": {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
    "old-scaling-without-theta": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "new": {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "dtype": "float16"},
    "new-llama3": {"rope_parameters": LLAMA3, "dtype": "bfloat16"},
    "new-without-theta": {"rope_parameters": SCALING},
    "new-with-theta-outside": {"rope_parameters": SCALING, "rope_theta": 5e5},
    "neither": {},
}
each_rotary = pytest.mark.parametrize("rotary", ROTARY.values(), ids=list(ROTARY))


def meaning(config: Mapping[str, Any]) -> dict[str, Any]:
    """All that transformers makes of a config.json."""
    out = AutoConfig.for_model(**config).to_dict()
    out["rope_parameters"].pop("type", None)  # rope_type says it too
    return {**out, "head_dim": out.get("head_dim") or out["hidden_size"] // out["num_attention_heads"], "architectures": None}


@each_rotary
@each_family
def test_a_portable_config_means_the_same_to_transformers(family: str, rotary: dict[str, Any]):
    config = {"model_type": family, **SIZES, "head_dim": 8, **rotary}
    if "experts" in str(FAMILIES[family].defaults):
        config |= {"num_experts_per_tok": 2}
    portable = portable_config(config)
    extra = {"num_experts"} if family == "qwen3_moe" else set()
    got, wanted = meaning(portable), meaning(config)
    assert {k: v for k, v in got.items() if k in wanted} == wanted
    assert got.keys() - wanted.keys() <= extra | {"num_local_experts"}


@each_rotary
def test_readers_old_and_new_find_the_same_in_a_portable_config(rotary: dict[str, Any]):
    """The keys that only one of the two generations reads say the same as the other's."""
    portable = portable_config({**BY_NAME["llama"].config, **rotary})
    old = {k: v for k, v in portable.items() if k not in NEW_KEYS}
    new = {k: v for k, v in portable.items() if k not in OLD_KEYS}
    assert meaning(old) == meaning(new) == meaning(portable)
    assert {"rope_theta", "rope_parameters"} < portable.keys()
    assert ("rope_scaling" in portable) == (portable["rope_parameters"]["rope_type"] != "default")
    assert portable.get("torch_dtype") == portable.get("dtype") == (rotary.get("dtype") or rotary.get("torch_dtype"))


@each_case
def test_a_portable_config_is_its_own_portable_config(case: Case):
    once = portable_config(real_config(case).to_dict())
    assert portable_config(once) == once


@each_case
def test_a_portable_config_says_out_loud_what_readers_derive_or_default(case: Case):
    portable = portable_config(case.config)
    arch = Architecture(case.config)
    assert portable["architectures"] == [arch.family.architecture]
    assert (portable["head_dim"], portable["num_key_value_heads"]) == (arch.size("head_dim"), arch.size("kv"))
    assert portable["tie_word_embeddings"] is arch.tied
    assert table(portable) == table(case.config)


def test_a_portable_qwen3_moe_config_has_both_names_of_the_number_of_experts():
    for key in ("num_experts", "num_local_experts"):
        config = {k: v for k, v in BY_NAME["qwen3_moe"].config.items() if k != "num_experts"} | {key: 4}
        portable = portable_config(config)
        assert portable["num_experts"] == portable["num_local_experts"] == 4


def test_a_portable_config_forgets_where_it_was_loaded_from():
    portable = portable_config({**BY_NAME["llama"].config, "_name_or_path": "/home/me", "transformers_version": "4.1"})
    assert not {"_name_or_path", "transformers_version"} & portable.keys()


def test_a_model_loads_from_the_portable_config_with_the_same_logits(tmp_path):
    model = make(BY_NAME["llama-attention-bias"])
    save(model, tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(portable_config(json.loads(file.read_text()))))
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    ids = tokens(model)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


# ---- sizes ---------------------------------------------------------------------------------------------------------------------------


@each_case
def test_the_number_of_parameters_is_that_of_the_real_model(case: Case):
    assert count_parameters(Architecture(case.config)).total == sum(p.numel() for p in make(case).parameters())


@each_case
def test_active_parameters_are_those_that_one_token_meets(case: Case):
    """Counted in memory: top_k slices of each fused expert tensor, no embedding table unless it is the head."""
    model = make(case)
    count = 0
    for name, p in model.named_parameters():
        if ".experts." in name:
            count += p.numel() // p.shape[0] * model.config.num_experts_per_tok
        elif "embed_tokens" not in name or model.config.tie_word_embeddings:
            count += p.numel()
    size = count_parameters(Architecture(case.config))
    assert (size.active, size.flops) == (count, 2 * count)


@each_case
def test_the_kv_cache_is_as_large_as_the_one_transformers_keeps(case: Case):
    model = make(case)
    with torch.no_grad():
        cache = model(tokens(model)[:1, :1], use_cache=True).past_key_values
    values = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert count_parameters(Architecture(case.config)).kv_values == values


@each_case
def test_block_parameters_are_those_of_each_real_block(case: Case):
    real = [sum(p.numel() for p in block.parameters()) for block in make(case).model.layers]
    assert block_parameters(Architecture(case.config)) == real


@pytest.mark.parametrize(
    ("config", "total"),
    [
        ({"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
          "num_hidden_layers": 32, "num_attention_heads": 32}, 6_738_415_616),  # Llama-2-7b
        ({"model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
          "num_hidden_layers": 32, "num_attention_heads": 32}, 7_241_732_096),  # Mistral-7B-v0.1
        ({"model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
          "num_hidden_layers": 32, "num_attention_heads": 32}, 46_702_792_704),  # Mixtral-8x7B
    ],
    ids=["llama-2-7b", "mistral-7b", "mixtral-8x7b"],
)  # fmt: skip
def test_published_models_have_their_published_sizes(config: dict[str, Any], total: int):
    assert count_parameters(Architecture(config)).total == total


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"), (999, "999"), (1_000, "1.00K"), (12_345, "12.35K"), (1_500_000, "1.50M"), (123_400_000, "123M"),
        (10_731_524_096, "10.73B"), (7_241_732_096, "7.24B"), (405_000_000_000, "405B"), (2.5e12, "2.50T"),
        (999_999, "1.00M"), (999_999_999, "1.00B"), (99_999_000_000, "100B"), (999.7, "1.00K"),
    ],
)  # fmt: skip
def test_short_numbers_have_three_digits_or_more_and_the_right_unit(count: float, text: str):
    assert format_count(count) == text


# ---- the table itself ----------------------------------------------------------------------------------------------------------------


def test_window_keys_are_read_from_the_family_that_has_them():
    arch = Architecture({"model_type": "qwen2", **SIZES, "use_sliding_window": True})
    assert (arch.get("sliding_window"), arch.get("max_window_layers")) == (4096, 28)
    assert WINDOW["sliding_window"] == Architecture({"model_type": "qwen2", **SIZES, **WINDOW}).get("sliding_window")


def test_every_predicate_is_used_by_a_family_and_known():
    used = {spec.when for family in FAMILIES.values() for spec in family.tensors} | {f.sliding for f in FAMILIES.values() if f.sliding}
    assert used == set(PREDICATES)


def test_an_unknown_family_is_told_why_and_what_is_nearest() -> None:
    cases = [
        ({"model_type": "gemma2"}, "norms multiply by 1 + weight", "llama"),
        ({"model_type": "gpt_neox"}, "LayerNorm", "llama"),
        ({"model_type": "deepseek_v3"}, "latent attention", "qwen3_moe"),
        ({"model_type": "qwen2_vl", "text_config": {"model_type": "qwen2"}}, "save its language model on its own", "qwen2"),
        (
            {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}},
            "its language model is not supported either: its norms multiply",
            "llama",
        ),
        ({"model_type": "mistral9"}, "no tensor table", "mistral"),
        ({}, "no valid model_type", "llama"),
        ({"model_type": "x" * 500}, "no tensor table", ""),
    ]
    for config, why, nearest in cases:
        with pytest.raises(SourceError) as caught:
            Architecture(config)
        assert why in caught.value.message
        assert caught.value.hint.startswith(f"The nearest supported family is {nearest}")


def test_families_that_are_kept_out_are_transformers_own() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    assert not UNSUPPORTED.keys() & FAMILIES.keys()
    assert {nearest for _, nearest in UNSUPPORTED.values()} <= FAMILIES.keys()
    remote = {"internlm2", "baichuan", "chatglm"}  # code of their own, on the Hub
    assert UNSUPPORTED.keys() - CONFIG_MAPPING_NAMES.keys() == remote
