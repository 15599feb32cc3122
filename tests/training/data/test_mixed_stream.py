"""Streamed text: the packed sequences, and where a resumed stream continues."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

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
