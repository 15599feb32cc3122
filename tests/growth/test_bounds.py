"""Nothing that a flag or a config says is counted through, or made room for, without bound: every refusal comes at once, with its hint."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path

import pytest
import torch
from models import BY_NAME, make, save

from hf_grow.cli import main
from hf_grow.errors import GrowError
from hf_grow.methods.width.attention_maps import check_heads, divisors, heads_feasible, nearest_heads
from hf_grow.methods.width.width_search import check_widths, widths_of
from hf_grow.model.architecture import Architecture


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make(BY_NAME["mistral"], dtype=torch.bfloat16), tmp_path_factory.mktemp("bounds") / "small")


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one message of a command that must be refused within seconds and without much memory."""
    began, before = time.process_time(), peak()
    try:
        status = main([str(w) for w in words])
    except SystemExit as stop:
        status = int(stop.code or 0)
    said = capsys.readouterr().err
    assert status == 2, said
    assert time.process_time() - began < 10
    assert peak() - before < 300 << 20
    assert 0 < len(said) < 4_000
    return said


def test_the_nearest_pairs_of_heads_are_those_of_a_search_through_all() -> None:
    for heads, kv in ((6, 2), (8, 8), (4, 1), (9, 3)):
        for new_heads in range(1, 28, 3):
            for new_kv in range(1, 20, 2):
                every = [(h, g) for g in range(1, 90) for h in range(1, 140) if heads_feasible(heads, kv, h, g)]

                def off(pair: tuple[int, int], new_heads: int = new_heads, new_kv: int = new_kv) -> float:
                    return abs(pair[0] - new_heads) / new_heads + abs(pair[1] - new_kv) / new_kv

                found = nearest_heads(heads, kv, new_heads, new_kv)
                assert all(heads_feasible(heads, kv, *p) for p in found)
                assert list(map(off, found)) == pytest.approx(sorted(map(off, every))[:5]), (heads, kv, new_heads, new_kv)
    with pytest.raises(GrowError, match="40000/40000") as told:
        check_heads(6, 2, 40_001, 40_000)
    assert "Nearest pairs that work" in told.value.hint


def test_divisors() -> None:
    for n in (1, 2, 36, 97, 1024, 2**20, 999_983):
        assert divisors(n) == [d for d in range(1, n + 1) if n % d == 0] if n < 2_000 else all(n % d == 0 for d in divisors(n))
    assert len(divisors(2**20)) == 21


def test_the_hint_for_heads_that_do_not_divide_is_bounded() -> None:
    """Families whose hidden size divides by the heads."""
    arch = Architecture({**BY_NAME["llama"].config})
    shape = widths_of(arch).changed(hidden=2**20).changed(heads=65_535, kv=3)
    began = time.process_time()
    with pytest.raises(GrowError) as told:
        check_widths(arch, shape)
    assert time.process_time() - began < 2
    assert "--heads 65536" in told.value.hint


MANY = ",".join(["0-99999"] * 200)
HUGE = "9" * 400
WRONG = {
    "heads": (["width", "{source}", "--heads", 40_001, "--kv-heads", 40_000], "Nearest pairs"),
    "heads without end": (["width", "{source}", "--heads", 10**12, "--kv-heads", 10**12], "less than or equal"),
    "width without end": (["width", "{source}", "--hidden", 10**15], "less than or equal"),
    "factor": (["width", "{source}", "--factor", "1e300"], "less than or equal"),
    "factor that is none": (["width", "{source}", "--factor", "nan"], "factor"),
    "depths": (["hybrid", "{source}", "--to", "100K", "--max-depth", 10**12], "less than or equal"),
    "layers": (["dus", "{source}", "--layers-to", 10**12], "cannot be reached"),
    "list of layers": (["depth", "{source}", "--layers", MANY], "more than 100,000"),
    "places": (["depth", "{source}", "--method", "identity", "--at", MANY], "more than 100,000"),
    "experts": (["experts", "{source}", "--experts", 10**9], "less than or equal"),
    "shards": (["experts", "{source}", "--experts", 4, "--init", "fine-grained", "--shards", 10**12], "less than or equal"),
    "size": (["dus", "{source}", "--to", HUGE], "is not a size"),
    "size in words": (["plan", "{source}", "--to", HUGE + "T"], "is not a size"),
    "no size": (["hybrid", "{source}", "--to", 0], "greater than or equal"),
    "active": (["plan", "{source}", "--to", "70K", "--active", HUGE], "is not a size"),
    "context": (["plan", "{source}", "--to", "70K", "--context", "9" * 5_000], "context"),
    "bytes": (["dus", "{source}", "--max-shard-size", HUGE + "GB"], "is not a number of bytes"),
    "no bytes": (["dus", "{source}", "--max-shard-size", 0], "max_shard_size"),
    "memory": (["dus", "{source}", "--memory-budget", 1], "memory_budget"),
    "a word of 200,000 characters": (["depth", "{source}", "--method", "x" * 200_000], "x"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_flag_without_bound_is_refused_at_once(
    case: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words, expected = WRONG[case]
    assert expected in refused(capsys, *[str(w).format(source=source) for w in words])


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 9_999}, {"num_hidden_layers": 62_500}, {"num_hidden_layers": 10**11}, {"hidden_size": 2**39}, {"vocab_size": 10**11},
        {"model_type": "mixtral", "num_local_experts": 15_000}, {"model_type": "mixtral", "num_local_experts": 10**10},
        {"num_attention_heads": 2**38, "num_key_value_heads": 2**37}, {"intermediate_size": 2**39}, {"head_dim": 2**39},
        {"layer_types": ["full_attention"] * 200_000},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize(
    "command", [["inspect"], ["plan", "--to", "70K"], ["dus"], ["experts", "--experts", "4"], ["hybrid", "--to", "80K"]], ids=str
)
def test_absurd_sizes_in_a_config_take_no_room(
    change: dict[str, object], command: list[str], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    refused(capsys, command[0], tmp_path, *command[1:])
