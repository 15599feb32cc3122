"""The published width methods, tensor by tensor against their formulas, written here the plain way.

Net2Net (arXiv 1511.05641, section 3.2), bert2BERT's FPI and AKI (ACL 2022 long 151, sections 3.2 and 3.3), HyperCloning (arXiv 2409.12903):
a grown matrix takes row g_out(i) and column g_in(j) of the old one, divided by how often that column is taken.

Where hf-grow knowingly differs from a paper:
- Tied heads stay tied. The papers' column division would need a head of its own, so the final norm carries it.
- FPI and the FFN of Net2Net copy in turn, where the papers draw at random: under RMSNorm only even copying preserves the function.
- Query heads are copied beside the heads of their own key/value head (the papers know no groups).
- AKI takes added rows of projections and their biases from the next layer; norms, embeddings, head and routers stay their own.
- AKI with --lossless is ours: of the next layer only what new heads and FFN units read, behind columns of zeros.
- HyperCloning keeps head_dim. With three copies or more its noise adds up to zero over all of them, instead of alternating.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from grown import grown_by, plan_of
from models import BY_NAME, make, on_disk
from torch import Tensor
from transformers import PreTrainedModel

from hf_grow.errors import PlanError

State = Mapping[str, Tensor]
NAMES = ("llama", "llama-tied", "llama-bias", "mistral", "qwen2", "qwen2-tied", "mixtral", "mixtral-tied")
each_name = pytest.mark.parametrize("name", NAMES)


def source(name: str, **changes: Any) -> PreTrainedModel:
    return make(BY_NAME[name], dtype=torch.float64, **changes)


def equal(model: PreTrainedModel, expected: State) -> None:
    found = on_disk(model)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-14, atol=0, msg=lambda text, name=name: f"{name}: {text}")


# ---- copying coordinates: Net2Net, FPI, AKI ---------------------------------------------------------------------------------------------


@dataclass
class Copies:
    """Which old coordinate each new one copies."""

    hidden: Sequence[int]
    ffn: Sequence[int]
    heads: Sequence[int]
    kv: Sequence[int]
    head_dim: int

    def rows(self, heads: Sequence[int]) -> list[int]:
        return [h * self.head_dim + i for h in heads for i in range(self.head_dim)]


def in_turn(model: PreTrainedModel, hidden: int, ffn: int, heads: int, kv: int) -> Copies:
    """Old coordinates in turn; each new kv head repeats an old one, with the query heads of that one in front of it, in turn."""
    config = model.config
    old_kv, group = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    new_kv = [i % old_kv for i in range(kv)]
    new_heads = [owner * group + slot % group for owner in new_kv for slot in range(heads // kv)]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Copies(
        [i % config.hidden_size for i in range(hidden)], [i % config.intermediate_size for i in range(ffn)], new_heads, new_kv, head_dim
    )


def taken(tensor: Tensor, out: Sequence[int] | None, read: Sequence[int] | None) -> Tensor:
    """W'[i, j] = W[out(i), read(j)] / (number of j' with read(j') = read(j))."""
    if out is not None:
        tensor = tensor[list(out)]
    if read is not None:
        count = Counter(read)
        tensor = tensor[:, list(read)] / torch.tensor([count[j] for j in read])
    return tensor


def rows_and_columns(name: str, copies: Copies) -> tuple[Sequence[int] | None, Sequence[int] | None]:
    """What the rows and the columns of a projection (or the entries of its bias) stand for."""
    hidden, ffn, query, stored = copies.hidden, copies.ffn, copies.rows(copies.heads), copies.rows(copies.kv)
    return {
        "q_proj": (query, hidden),
        "k_proj": (stored, hidden),
        "v_proj": (stored, hidden),
        "o_proj": (hidden, query),
        "gate_proj": (ffn, hidden),
        "up_proj": (ffn, hidden),
        "down_proj": (hidden, ffn),
        "w1": (ffn, hidden),
        "w3": (ffn, hidden),
        "w2": (hidden, ffn),
        "gate": (None, hidden),
        "lm_head": (None, hidden),
    }[name.split(".")[-2]]


def fpi(state: State, copies: Copies, *, tied: bool) -> dict[str, Tensor]:
    """bert2BERT, section 3.2, with any choice of copies: rows copied, columns copied and divided by their number."""
    grown = {}
    for name, tensor in state.items():
        if name == "model.embed_tokens.weight":
            grown[name] = tensor[:, list(copies.hidden)]
        elif name == "model.norm.weight" and tied:
            count = Counter(copies.hidden)
            grown[name] = tensor[list(copies.hidden)] / torch.tensor([count[i] for i in copies.hidden])
        elif "norm" in name:
            grown[name] = tensor[list(copies.hidden)]
        else:
            out, read = rows_and_columns(name, copies)
            grown[name] = taken(tensor, out, None if name.endswith("bias") else read)
    return grown


def aki(state: State, copies: Copies, *, tied: bool, layers: int) -> dict[str, Tensor]:
    """bert2BERT, section 3.3: rows that FPI adds come from the next layer, grown as FPI grows it; the top layer has only itself."""
    own = fpi(state, copies, tied=tied)
    grown = dict(own)
    for name, tensor in own.items():
        match = re.search(r"layers\.(\d+)\.", name)
        if match is None or "norm" in name:
            continue
        out, _ = rows_and_columns(name, copies)
        above = own[name.replace(match[0], f"layers.{min(int(match[1]) + 1, layers - 1)}.")]
        if out is not None:
            added = [i for i, row in enumerate(out) if row in out[:i]]
            grown[name] = tensor.clone()
            grown[name][added] = above[added]
    return grown


SIZES = [(96, 100, 12, 2), (72, 60, 9, 3), (144, 120, 18, 6), (48, 90, 8, 2)]
each_size = pytest.mark.parametrize("sizes", SIZES, ids=lambda s: "-".join(map(str, s)))


def options_of(sizes: Sequence[int]) -> dict[str, int]:
    return dict(zip(("hidden", "intermediate", "heads", "kv_heads"), sizes, strict=True))


@each_size
@each_name
def test_fpi_is_the_papers_formula(name: str, sizes: tuple[int, int, int, int]) -> None:
    model = source(name)
    expected = fpi(on_disk(model), in_turn(model, *sizes), tied=model.config.tie_word_embeddings)
    equal(grown_by(model, "fpi", **options_of(sizes)), expected)


@each_size
@each_name
def test_aki_is_the_papers_formula(name: str, sizes: tuple[int, int, int, int]) -> None:
    model = source(name)
    expected = aki(on_disk(model), in_turn(model, *sizes), tied=model.config.tie_word_embeddings, layers=4)
    equal(grown_by(model, "aki", **options_of(sizes)), expected)


@each_name
def test_aki_with_fixed_kv_grows_query_heads_inside_their_groups(name: str) -> None:
    """AquilaMoE's AKI-Pro: the number of kv heads stays."""
    model = source(name)
    expected = aki(on_disk(model), in_turn(model, 96, 80, 12, 2), tied=model.config.tie_word_embeddings, layers=4)
    grown = grown_by(model, "aki", factor=2, fixed_kv=True)
    assert grown.config.num_key_value_heads == 2
    equal(grown, expected)


def silent_aki(state: State, copies: Copies, *, layers: int) -> dict[str, Tensor]:
    """Inside the blocks only: old heads and units as they are, new ones with the rows of the next layer's, and zeros where o and down read them.

    A query head is new at its second appearance, a key/value head where none but new query heads read it.
    """
    group = len(copies.heads) // len(copies.kv)
    fresh_heads = [h in copies.heads[:i] for i, h in enumerate(copies.heads)]
    fresh_kv = [all(fresh_heads[i * group : (i + 1) * group]) for i in range(len(copies.kv))]
    fresh_units = [i in copies.ffn[:at] for at, i in enumerate(copies.ffn)]
    spread = {"query": (copies.rows(copies.heads), fresh_heads), "stored": (copies.rows(copies.kv), fresh_kv)}
    axes = {name: (rows, [f for f in fresh for _ in range(copies.head_dim)]) for name, (rows, fresh) in spread.items()}
    axes["ffn"] = (list(copies.ffn), fresh_units)
    makes = {"q_proj": "query", "k_proj": "stored", "v_proj": "stored", "gate_proj": "ffn", "up_proj": "ffn", "w1": "ffn", "w3": "ffn"}
    reads = {"o_proj": "query", "down_proj": "ffn", "w2": "ffn"}
    grown = {}
    for name, tensor in state.items():
        match = re.search(r"layers\.(\d+)\.", name)
        part = name.split(".")[-2]
        grown[name] = tensor
        if match and part in makes:
            above = state[name.replace(match[0], f"layers.{min(int(match[1]) + 1, layers - 1)}.")]
            rows, fresh = axes[makes[part]]
            grown[name] = torch.stack([(above if new else tensor)[row] for row, new in zip(rows, fresh, strict=True)])
        elif match and part in reads and not name.endswith("bias"):
            columns, fresh = axes[reads[part]]
            grown[name] = torch.stack([tensor[:, c] * (0.0 if new else 1.0) for c, new in zip(columns, fresh, strict=True)], 1)
    return grown


@pytest.mark.parametrize("sizes", [(48, 100, 12, 4), (48, 60, 24, 6), (48, 40, 8, 2), (48, 90, 6, 6)], ids=lambda s: "-".join(map(str, s)))
@each_name
def test_lossless_aki_reads_as_the_next_layer_and_writes_nothing(name: str, sizes: tuple[int, int, int, int]) -> None:
    model = source(name)
    copies = in_turn(model, *sizes)
    if sizes[2] == 6:  # groups of one: the three query heads of an old group are dealt over the three copies of its kv head
        copies.heads = [0, 3, 1, 4, 2, 5]
    expected = silent_aki(on_disk(model), copies, layers=4)
    equal(grown_by(model, "aki", lossless=True, **options_of(sizes)), expected)


@each_name
def test_lossless_aki_of_twice_the_hidden_size_is_the_same_in_sum_over_its_copies(name: str) -> None:
    """The hidden state is tile's: what makes it stands twice, and the two copies of a column that reads it share the column unevenly."""
    model = source(name)
    expected = silent_aki(on_disk(model), in_turn(model, 48, 80, 12, 4), layers=4)
    for key, found in on_disk(grown_by(model, "aki", lossless=True, factor=2)).items():
        part = key.split(".")[-2]
        if part not in ("embed_tokens", "o_proj", "down_proj", "w2") and found.dim() == 2:
            assert not torch.allclose(found[:, :48], found[:, 48:]), key
            found = found[:, :48] + found[:, 48:]
        elif "norm" in key or part in ("embed_tokens", "o_proj", "down_proj", "w2"):
            first, second = found.chunk(2, 1 if part == "embed_tokens" else 0)
            assert torch.equal(first, second), key
            found = first * (2 if key == "model.norm.weight" and model.config.tie_word_embeddings else 1)
        torch.testing.assert_close(found, expected[key], rtol=1e-12, atol=1e-15, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("options", [{"ffn": "copies"}, {"new_heads": "split"}, {"ffn": "null"}], ids=str)
def test_lossless_aki_refuses_what_it_would_ignore(options: dict[str, str]) -> None:
    with pytest.raises(PlanError, match="does not apply with --lossless"):
        plan_of(source("llama"), "aki", factor=2, lossless=True, **options)


def test_aki_of_a_single_layer_is_fpi() -> None:
    model = source("llama", num_hidden_layers=1)
    equal(grown_by(model, "aki", factor=2), on_disk(grown_by(model, "fpi", factor=2)))


def test_aki_takes_from_the_next_block_only_what_that_has() -> None:
    """Dense blocks beside mixtures of experts: a block without a counterpart above grows from itself."""
    model = source("qwen3_moe-mixed")
    grown, plain, old = on_disk(grown_by(model, "aki", factor=2)), on_disk(grown_by(model, "fpi", factor=2)), on_disk(model)
    sparse = {int(re.findall(r"\d+", n)[0]) for n in old if "experts" in n}
    for name, tensor in grown.items():
        match = re.search(r"layers\.(\d+)\.mlp\.", name)
        if match:
            layer = int(match[1])
            same_kind_above = layer + 1 < 6 and (layer in sparse) == (layer + 1 in sparse)
            routed = name.endswith("mlp.gate.weight")
            assert torch.equal(tensor, plain[name]) != (same_kind_above and not routed), name


@each_name
def test_net2net_copies_random_coordinates_and_divides_by_their_number(name: str) -> None:
    model = source(name)
    grown = grown_by(model, "net2net", hidden=96, intermediate=100, heads=12, kv_heads=2, seed=3)
    old, new = on_disk(model)["model.embed_tokens.weight"], on_disk(grown)["model.embed_tokens.weight"]
    drawn = [next(i for i in range(48) if torch.equal(old[:, i], column)) for column in new.T]
    copies = in_turn(model, 96, 100, 12, 2)
    assert drawn[:48] == list(range(48))
    assert len(set(Counter(drawn).values())) > 2  # at random, not in turn
    copies.hidden = drawn
    equal(grown, fpi(on_disk(model), copies, tied=model.config.tie_word_embeddings))


def test_net2net_draws_by_its_seed() -> None:
    model = source("llama")
    one, same, other = (plan_of(model, "net2net", factor=2, seed=s).growth.axes["residual"] for s in (0, 0, 1))
    assert one == same != other


# ---- HyperCloning -----------------------------------------------------------------------------------------------------------------------


def cloned(state: State, n: int, *, kv: int, tied: bool) -> dict[str, Tensor]:
    """Tile every matrix (rows n times, columns m times), divide by the number of times the columns were tiled; tile vectors. ``kv``: of k and v."""
    grown = {}
    for name, tensor in state.items():
        rows = kv if re.search(r"[kv]_proj", name) else n
        if name == "model.embed_tokens.weight":
            grown[name] = tensor.repeat(1, n)
        elif name == "lm_head.weight" or name.endswith("block_sparse_moe.gate.weight"):
            grown[name] = tensor.repeat(1, n) / n
        elif tensor.dim() == 1:
            grown[name] = tensor.repeat(rows) / (n if tied and name == "model.norm.weight" else 1)
        else:
            grown[name] = tensor.repeat(rows, n) / n
    return grown


@pytest.mark.parametrize("n", [2, 3, 4])
@each_name
def test_hypercloning_tiles_and_divides(name: str, n: int) -> None:
    model = source(name)
    equal(grown_by(model, "hypercloning", factor=n), cloned(on_disk(model), n, kv=n, tied=model.config.tie_word_embeddings))


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2-tied", "mixtral"])
def test_hypercloning_keeps_a_single_kv_head(name: str) -> None:
    model = source(name, num_key_value_heads=1)
    grown = grown_by(model, "hypercloning", factor=2)
    assert grown.config.num_key_value_heads == 1
    equal(grown, cloned(on_disk(model), 2, kv=1, tied=model.config.tie_word_embeddings))


def hypercloning_noise(model: PreTrainedModel, n: int, db: float) -> dict[str, Tensor]:
    noisy, plain = on_disk(grown_by(model, "hypercloning", factor=n, noise_db=db)), on_disk(grown_by(model, "hypercloning", factor=n))
    return {name: noisy[name] - plain[name] for name in plain}


@each_name
def test_hypercloning_noise_has_opposite_signs_in_the_two_copies_and_only_where_columns_are_copied(name: str) -> None:
    for tensor, noise in hypercloning_noise(source(name), 2, 10).items():
        if noise.dim() == 1 or "embed" in tensor:
            assert not noise.any(), tensor
        else:
            first, second = noise.chunk(2, 1)
            assert first.abs().min() > 0
            assert (first + second).abs().max() < 1e-15, tensor


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("db", [0, 10, 30])
def test_hypercloning_noise_has_the_ratio_to_the_signal_that_was_asked_for(db: int, n: int) -> None:
    """10 log10 of the power of the tiled, divided weights over that of the noise."""
    model = source("mistral", hidden_size=96, intermediate_size=96)
    noise, signal = hypercloning_noise(model, n, db), on_disk(grown_by(model, "hypercloning", factor=n))
    for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.2.mlp.down_proj.weight", "model.layers.0.self_attn.o_proj.weight"):
        ratio = 10 * torch.log10(signal[name].square().mean() / noise[name].square().mean())
        assert ratio == pytest.approx(db, abs=0.2)
        assert torch.stack(noise[name].chunk(n, 1)).sum(0).abs().max() < 1e-14
