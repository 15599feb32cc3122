"""Interleaved sources in exact shares, and named evaluation sets."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_texts import DOCS, LENGTH, data_options, packed_reference, rows, write_texts

from hf_grow.training.data import build
from hf_grow.training.data.mixing import Interleaving, row_indices


@settings(max_examples=60, deadline=None)
@given(
    shares=st.lists(st.integers(1, 1000), min_size=1, max_size=5),
    seed=st.integers(0, 5),
    start=st.integers(0, 10**9),
    length=st.integers(1, 400),
)
def test_every_interval_has_exact_shares(shares: list[int], seed: int, start: int, length: int) -> None:
    """The first source within one sequence in any stretch, the m-th within m."""
    interleaving = Interleaving(tuple(Fraction(s) for s in shares), seed)
    turn, ordinal = interleaving.assign(start, start + length)
    for index, share in enumerate(shares):
        off = abs(int((turn == index).sum()) - share * length / sum(shares))
        assert off < index + 1 + 1e-6
        mine = ordinal[turn == index]
        assert (np.diff(mine) == 1).all()  # no turn is lost or given twice
    # Found directly, place by place.
    middle = start + length // 2
    one_turn, one_ordinal = interleaving.assign(middle, middle + 1)
    assert (one_turn[0], one_ordinal[0]) == (turn[length // 2], ordinal[length // 2])


def test_ordinals_count_from_zero() -> None:
    turn, ordinal = Interleaving((Fraction(1, 20), Fraction(3), Fraction(2)), 3).assign(0, 1000)
    for index in range(3):
        assert ordinal[turn == index].tolist() == list(range((turn == index).sum()))


@pytest.mark.parametrize("share", [0.01, 0.05, 0.25, 0.9])
def test_replay_share_in_every_interval(tokenizer, tmp_path: Path, share: float) -> None:
    new, old = write_texts(tmp_path / "new", DOCS[:8]), write_texts(tmp_path / "old", DOCS[8:12])
    data = build(data_options(train=str(new), replay={"path": str(old), "share": share}, shuffle=True), tokenizer, cache=tmp_path / "cache")
    old_rows = {tuple(r) for r in packed_reference(tokenizer, DOCS[8:12])}
    new_rows = {tuple(r) for r in packed_reference(tokenizer, DOCS[:8])}
    assert not old_rows & new_rows
    is_old = np.array([tuple(r) in old_rows for r in rows(data.train)])
    seen = np.concatenate([[0], np.cumsum(is_old)])
    for length in (1, 7, 20, 100, len(is_old)):
        counts = seen[length:] - seen[:-length]
        assert set(counts) <= {int(np.floor(share * length)), int(np.ceil(share * length - 1e-9))}, length
    # One pass through the new text, each of its sequences once.
    kept = [tuple(r) for r, o in zip(rows(data.train), is_old, strict=True) if not o]
    assert sorted(kept) == sorted(tuple(r) for r in packed_reference(tokenizer, DOCS[:8]) if len(r) == LENGTH)
    assert kept != [tuple(r) for r in packed_reference(tokenizer, DOCS[:8]) if len(r) == LENGTH]  # shuffled
    assert data.describe()[0] == {**data.describe()[0], "use": "replay", "share": share}


def test_sources_without_weights_are_read_once(tokenizer, tmp_path: Path) -> None:
    parts = [DOCS[:2], DOCS[2:9], DOCS[9:]]
    paths = [str(write_texts(tmp_path / str(n), part)) for n, part in enumerate(parts)]
    data = build(data_options(train=paths, replay={"path": paths[0], "share": 0.1}, shuffle=True), tokenizer, cache=tmp_path / "cache")
    wanted = [tuple(r) for part in parts for r in packed_reference(tokenizer, part) if len(r) == LENGTH]
    old = next(p for p in data.parts if p.use == "replay")
    first = {tuple(r) for r in packed_reference(tokenizer, parts[0])}
    assert sorted(r for r in map(tuple, rows(data.train)) if r not in first) == sorted(r for r in wanted if r not in first)
    assert len(data.train) == len(wanted) + round(old.passes * old.sequences)


def test_weights_set_shares_and_repeat_small_sources(tokenizer, tmp_path: Path) -> None:
    small, large = write_texts(tmp_path / "small", DOCS[:1]), write_texts(tmp_path / "large", DOCS[1:])
    train = [{"path": str(small), "weight": 3}, {"path": str(large), "weight": 1}]
    messages: list[str] = []
    data = build(data_options(train=train), tokenizer, cache=tmp_path / "cache", sequences=400, notify=messages.append)
    own = [tuple(r) for r in packed_reference(tokenizer, DOCS[:1]) if len(r) == LENGTH]
    mine = [tuple(r) for r in rows(data.train) if tuple(r) in set(own)]
    assert len(data.train) == 400 and len(mine) == 300
    assert mine == (own * (300 // len(own) + 1))[:300]  # pass after pass
    assert data.parts[0].passes == 300 / len(own)


def test_each_pass_shuffles_all_rows_differently() -> None:
    ordinals = np.arange(35)
    shuffled = row_indices(ordinals, 10, [0, 1], shuffle=True)
    for start in (0, 10, 20):
        assert sorted(shuffled[start : start + 10]) == list(range(10))
    assert shuffled[:10].tolist() != shuffled[10:20].tolist()
    assert (row_indices(ordinals[17:], 10, [0, 1], shuffle=True) == shuffled[17:]).all()
    assert row_indices(ordinals, 10, [0, 1], shuffle=False).tolist() == (list(range(10)) * 4)[:35]


def test_seed_changes_only_the_order(tokenizer, folder: Path, tmp_path: Path) -> None:
    first, same, other = (
        rows(build(data_options(train=str(folder), shuffle=True, seed=s), tokenizer, cache=tmp_path / "cache").train) for s in (0, 0, 1)
    )
    assert first == same != other
    assert sorted(first) == sorted(other)


def test_eval_sets_keep_all_or_evenly_spaced_sequences(tokenizer, folder: Path, tmp_path: Path) -> None:
    sets = {"all": {"path": str(folder), "sequences": None}, "some": {"path": str(folder), "sequences": 5}, "bare": str(folder)}
    data = build(data_options(train=str(folder), eval=sets), tokenizer, cache=tmp_path / "cache")
    reference = packed_reference(tokenizer)
    reference[-1] += [-100] * (LENGTH - len(reference[-1]))
    assert rows(data.evals["all"]) == reference
    assert rows(data.evals["some"]) == [reference[i] for i in np.linspace(0, len(reference) - 1, 5).astype(int)]
    assert len(data.evals["bare"]) == 256
    assert [p.use for p in data.parts] == ["train", "eval all", "eval some", "eval bare"]
