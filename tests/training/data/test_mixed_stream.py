"""Streamed text: the packed sequences, and where a resumed stream continues."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packed_texts import DOCS, LENGTH, data_options, packed_reference, rows, stream_of, write_texts

from hf_grow.errors import InputError
from hf_grow.training.data import build


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a state lies in the middle of several of them."""
    from hf_grow.training.data import stream

    monkeypatch.setattr(stream, "BATCH", 3)


def test_stream_equals_packed_sequences(tokenizer, folder: Path, tmp_path: Path, small_batches) -> None:
    stream = stream_of(tokenizer, tmp_path, train=str(folder))
    full = [r for r in packed_reference(tokenizer) if len(r) == LENGTH]
    assert rows(islice(stream, len(full))) == full
    # Read to its end it begins again, and what was left over goes before.
    twice = packed_reference(tokenizer, DOCS + DOCS)
    assert rows(islice(stream, 2 * len(full))) == twice[: 2 * len(full)]
    assert not (tmp_path / "cache").exists()


def test_mixed_stream_equals_packed_mix(tokenizer, tmp_path: Path, small_batches) -> None:
    paths = [str(write_texts(tmp_path / str(n), part)) for n, part in enumerate([DOCS[:8], DOCS[8:14], DOCS[14:]])]
    mix = {
        "train": [{"path": paths[0], "weight": 2}, {"path": paths[1], "weight": 1}],
        "replay": {"path": paths[2], "share": 0.2},
        "seed": 4,
    }
    packed = build(data_options(**mix), tokenizer, cache=tmp_path / "cache", sequences=120)
    assert all(p.passes < 1 for p in packed.parts)
    assert rows(islice(stream_of(tokenizer, tmp_path, **mix), 120)) == rows(packed.train)


def test_stream_resumes_after_any_sequence(tokenizer, tmp_path: Path, small_batches) -> None:
    paths = [str(write_texts(tmp_path / str(n), part)) for n, part in enumerate([DOCS[:8], DOCS[8:10]])]
    mix = {"train": paths[0], "replay": {"path": paths[1], "share": 0.3}}
    whole = rows(islice(stream_of(tokenizer, tmp_path, **mix), 700))  # more than one pass of each
    reading = stream_of(tokenizer, tmp_path, **mix)
    iterator = iter(reading)
    states = []
    for place in range(600):
        next(iterator)
        if place % 37 == 0 or place < 3:
            states.append((place + 1, json.dumps(reading.state_dict())))
    for place, state in states:
        resumed = stream_of(tokenizer, tmp_path, **mix)
        resumed.load_state_dict(json.loads(state))
        assert rows(islice(resumed, 60)) == whole[place : place + 60], place
        assert rows(islice(resumed, 5)) == whole[:5]  # a second iteration begins anew


def loaded(stream: Any, workers: int) -> Any:
    return iter(torch.utils.data.DataLoader(stream, batch_size=1, num_workers=workers, collate_fn=lambda r: r[0]["input_ids"]))


def test_stream_allows_at_most_one_dataloader_worker(tokenizer, folder: Path, tmp_path: Path) -> None:
    stream = stream_of(tokenizer, tmp_path, train=str(folder))
    assert list(islice(loaded(stream, 1), 40)) == rows(islice(stream, 40))
    two = loaded(stream, 2)
    with pytest.raises(InputError, match="cannot be read by 2 DataLoader workers"):
        next(two)


# ---- shuffled ------------------------------------------------------------------------------------------------------------------------------


def shuffled_reference(sequences: list[list[int]], size: int, key: list[int]) -> list[list[int]]:
    """Whole windows of the sequences, each in its own order."""
    found = []
    for window in range(len(sequences) // size):
        order = np.random.default_rng([*key, window]).permutation(size)
        found += [sequences[window * size + i] for i in order]
    return found


def test_a_buffer_shuffles_windows_of_each_source_and_keeps_the_shares(tokenizer, tmp_path: Path, small_batches) -> None:
    paths = [str(write_texts(tmp_path / str(n), part)) for n, part in enumerate([DOCS[:8], DOCS[8:]])]
    mix = {"train": paths[0], "replay": {"path": paths[1], "share": 0.3}, "seed": 4}
    plain = [rows(islice(stream_of(tokenizer, tmp_path, train=p), 400)) for p in paths]
    sources = [iter(shuffled_reference(plain[1], 7, [4, 0])), iter(shuffled_reference(plain[0], 7, [4, 1]))]  # old text is the first
    turns, _ = stream_of(tokenizer, tmp_path, **mix).interleaving.assign(0, 300)
    expected = [next(sources[turn]) for turn in turns]
    assert rows(islice(stream_of(tokenizer, tmp_path, **mix, shuffle=True, shuffle_buffer=7), 300)) == expected
    assert expected != rows(islice(stream_of(tokenizer, tmp_path, **mix), 300))


@pytest.mark.parametrize("masking", [False, True])
def test_a_shuffled_stream_goes_on_after_any_sequence(masking: bool, tokenizer, tmp_path: Path, small_batches) -> None:
    paths = [str(write_texts(tmp_path / str(n), part)) for n, part in enumerate([DOCS[:8], DOCS[8:10]])]
    mix = {"train": paths[0], "replay": {"path": paths[1], "share": 0.3}, "shuffle": True, "intra_document_masking": masking}
    whole = list(islice(stream_of(tokenizer, tmp_path, **mix, shuffle_buffer=10), 300))
    reading = stream_of(tokenizer, tmp_path, **mix, shuffle_buffer=10)
    iterator = iter(reading)
    for place in range(1, 240):
        next(iterator)
        if place % 19 == 0 or place < 3:
            resumed = stream_of(tokenizer, tmp_path, **mix, shuffle_buffer=10)
            resumed.load_state_dict(json.loads(json.dumps(reading.state_dict())))
            assert list(islice(resumed, 45)) == whole[place : place + 45], place
            assert list(islice(resumed, 5)) == whole[:5]
    assert len({stream_of(tokenizer, tmp_path, **mix, shuffle_buffer=n).identity for n in (10, 11, None)}) == 3


def test_a_buffer_needs_a_stream_to_shuffle(folder: Path) -> None:
    for more in ({"shuffle": True}, {"streaming": True, "shuffle": False}):
        with pytest.raises(InputError, match="shuffle_buffer: shuffles streamed text"):
            data_options(train=str(folder), shuffle_buffer=8, **more)
