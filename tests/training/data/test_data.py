"""The texts of a training against plain references: packing, formats, the cache, exact shares, streams and what they refuse."""

from __future__ import annotations

import bz2
import gzip
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from itertools import islice
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from hub_datasets import HubServer, client_environment
from hypothesis import given, settings
from hypothesis import strategies as st
from models import BY_NAME, make
from pydoc_texts import pydoc_texts

from hf_grow.demo.small_model import build_tokenizer
from hf_grow.errors import InputError
from hf_grow.options import parse
from hf_grow.training.data import DataOptions, build, cache, packing, survey
from hf_grow.training.data.mixing import Interleaving, row_indices

DOCS = tuple(
    text[start : start + 2500] for text in pydoc_texts(120_000) for start in range(0, len(text), 2500) if text[start : start + 2500].strip()
)
LENGTH = 48


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(DOCS, 300)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One text file a document, named in their order."""
    return texts(tmp_path / "texts", DOCS)


def texts(folder: Path, docs: tuple[str, ...]) -> Path:
    folder.mkdir(parents=True)
    for number, doc in enumerate(docs):
        (folder / f"{number:03}.txt").write_text(doc, encoding="utf-8")
    return folder


def options(**data: Any) -> DataOptions:
    return parse(DataOptions, {"seq_length": LENGTH, "shuffle": False, **data}, where="test")


def rows(data: Any) -> list[list[int]]:
    return [row["input_ids"] for row in data]


def plain(tokenizer: Any, docs: tuple[str, ...] = DOCS, *, length: int = LENGTH, head: tuple[int, ...] = ()) -> list[list[int]]:
    """The slow way: one document after another into one list, which is cut."""
    stream: list[int] = []
    for doc in docs:
        stream.extend(head)
        stream.extend(tokenizer.encode(doc, add_special_tokens=False))
        stream.append(tokenizer.eos_token_id)
    return [stream[start : start + length] for start in range(0, len(stream), length)]


# ---- packing -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2, 48, 1000])
def test_sequences_are_the_pieces_of_one_long_list(tokenizer, folder: Path, tmp_path: Path, length: int) -> None:
    data = build(options(train=str(folder), seq_length=length), tokenizer, cache=tmp_path / "cache")
    reference = plain(tokenizer, length=length)
    assert rows(data.train) == [r for r in reference if len(r) == length]
    assert data.tokens == len(data.train) * length
    assert data.describe()[0]["tokens"] == sum(map(len, reference))
    assert data.describe()[0]["documents"] == len(DOCS)


def test_what_is_left_over_is_kept_where_asked_for_and_not_trained_on(tokenizer, folder: Path, tmp_path: Path) -> None:
    data = build(options(train=str(folder), remainder="keep"), tokenizer, cache=tmp_path / "cache")
    *full, last = plain(tokenizer)
    assert 0 < len(last) < LENGTH
    assert rows(data.train)[:-1] == full
    batch = data.collator([data.train[0], data.train[len(data.train) - 1]])
    assert batch["labels"][0].tolist() == batch["input_ids"][0].tolist() == full[0]
    assert batch["labels"][1].tolist() == last + [-100] * (LENGTH - len(last))
    assert batch["input_ids"][1].tolist() == last + [tokenizer.eos_token_id] * (LENGTH - len(last))
    # The loss of the filled row is that of the text alone.
    model = make(BY_NAME["llama"], vocab_size=300)
    alone = torch.tensor([last])
    with torch.no_grad():
        filled = model(**{k: v[1:] for k, v in batch.items()}).loss
        assert torch.allclose(filled, model(alone, labels=alone).loss, atol=1e-6)


def test_bos_as_the_tokenizer_does_it_always_or_never(tokenizer, folder: Path, tmp_path: Path) -> None:
    from copy import deepcopy

    from tokenizers.processors import TemplateProcessing

    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    own = deepcopy(tokenizer)  # puts BOS and EOS around a text by itself
    own.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", bos), ("</s>", eos)])
    assert own.encode("a") == [bos, *tokenizer.encode("a"), eos]
    for used, mode, head in [(own, "tokenizer", (bos,)), (own, "never", ()), (own, "always", (bos,)), (tokenizer, "tokenizer", ()),
                             (tokenizer, "always", (bos,))]:  # fmt: skip
        data = build(options(train=str(folder), bos=mode), used, cache=tmp_path / "cache")
        assert rows(data.train) == plain(tokenizer, head=head)[:-1], mode


@pytest.mark.slow
def test_processes_do_not_change_the_sequences(tokenizer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "BATCH", 3)
    data = build(options(train=str(folder), num_proc=2), tokenizer, cache=tmp_path / "cache")
    assert rows(data.train) == plain(tokenizer)[:-1]


# ---- files ---------------------------------------------------------------------------------------------------------------------------


def as_parquet(path: Path, docs: tuple[str, ...]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"id": list(range(len(docs))), "body": list(docs)}), path, row_group_size=3)


def lines(docs: tuple[str, ...], **more: Any) -> str:
    return "".join(json.dumps({"content": doc, "n": 1, **more}) + "\n" for doc in docs)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "a.jsonl": lambda p: p.write_text(lines(DOCS)),
    "blank-lines.jsonl": lambda p: p.write_text(lines(DOCS).replace("\n", "\n\n")),
    "a.jsonl.gz": lambda p: p.write_bytes(gzip.compress(lines(DOCS).encode())),
    "a.ndjson.bz2": lambda p: p.write_bytes(bz2.compress(lines(DOCS).encode())),
    "a.json": lambda p: p.write_text(json.dumps([{"text": d, "url": "x"} for d in DOCS])),
    "strings.json": lambda p: p.write_text(json.dumps(list(DOCS))),
    "a.parquet": lambda p: as_parquet(p, DOCS),
    "with-nulls.jsonl": lambda p: p.write_text('{"content": null}\n' + lines(DOCS) + '{"content": "  "}\n'),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_sequences(tokenizer, tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    data = build(options(train=str(tmp_path / name)), tokenizer, cache=tmp_path / "cache")
    assert rows(data.train) == plain(tokenizer)[:-1]


def test_ways_to_name_files(tokenizer, folder: Path, tmp_path: Path) -> None:
    """Folders, globs at any depth, lists; a README beside data is no document, among documents it is."""
    deep = tmp_path / "deep"
    (deep / "inner").mkdir(parents=True)
    (deep / "README.md").write_text("# About\n")
    (deep / ".hidden.jsonl").write_text("broken")
    (deep / "dataset_info.json").write_text("{}")
    (deep / "a.jsonl").write_text(lines(DOCS[:3]))
    (deep / "inner" / "b.jsonl").write_text(lines(DOCS[3:]))
    wanted = plain(tokenizer)[:-1]
    for path in (str(deep), f"{deep}/**/*.jsonl", [str(deep / "a.jsonl"), str(deep / "inner")], f"{folder}/*.txt"):
        assert rows(build(options(train={"path": path}), tokenizer, cache=tmp_path / "cache").train) == wanted, path
    (folder / "README.md").write_text("# About\n")
    with_readme = plain(tokenizer, (*DOCS, "# About\n"))
    assert rows(build(options(train=str(folder), remainder="drop"), tokenizer, cache=tmp_path / "c").train) == [
        r for r in with_readme if len(r) == LENGTH
    ]


def test_limit_counts_documents_over_all_files(tokenizer, folder: Path, tmp_path: Path) -> None:
    data = build(options(train={"path": str(folder), "limit": 4}), tokenizer, cache=tmp_path / "cache")
    assert rows(data.train) == plain(tokenizer, DOCS[:4])[:-1]
    assert data.describe()[0]["documents"] == 4


def survey_of(tokenizer: Any, **data: Any) -> list[dict[str, Any]]:
    return survey(options(**data), tokenizer)


def test_a_survey_tells_sizes_and_estimates_tokens_without_a_cache(tokenizer, folder: Path, tmp_path: Path) -> None:
    replay = {"path": str(folder), "share": 0.5, "limit": 3}
    found = survey_of(tokenizer, train=str(folder), replay=replay, eval={"new": str(folder)}, cache=str(tmp_path / "cache"))
    assert [f["use"] for f in found] == ["train", "replay", "eval new"]
    true = sum(map(len, plain(tokenizer)))
    assert found[0]["bytes"] == sum(len(d.encode()) for d in DOCS)
    assert abs(found[0]["tokens"] / true - 1) < 0.15
    assert not (tmp_path / "cache").exists()


def test_a_survey_counts_of_a_named_set_what_is_measured_on(tokenizer, folder: Path) -> None:
    path, length = str(folder), options(train=str(folder)).seq_length
    found = survey_of(tokenizer, train=path, eval={"few": {"path": path, "sequences": 2}, "all": {"path": path, "sequences": None}})
    few, every = (f["tokens"] for f in found[1:])
    assert few == 2 * length < every == found[0]["tokens"]


# ---- the cache -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tokenised(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Documents tokenised so far, without the probe of the fingerprint."""
    seen = [0]
    true = packing.DocumentEncoder.__call__

    def counting(self: Any, given: Any) -> Any:
        seen[0] += 0 if isinstance(given[0], str) else len(given)
        return true(self, given)

    monkeypatch.setattr(packing.DocumentEncoder, "__call__", counting)
    return seen


def test_unchanged_text_is_tokenised_once_and_changed_text_again(tokenizer, folder: Path, tmp_path: Path, tokenised: list[int]) -> None:
    def again(used: Any = tokenizer, **more: Any) -> int:
        before = tokenised[0]
        data = build(options(train=str(folder), **more), used, cache=tmp_path / "cache")
        assert rows(data.train)[0] == plain(used, length=more.get("seq_length", LENGTH))[0]
        return tokenised[0] - before

    assert again() == len(DOCS)
    assert again() == 0
    assert again(seed=5) == again(num_proc=1) == 0  # decide nothing of it
    assert again(seq_length=32) == len(DOCS)
    assert again(build_tokenizer(DOCS, 290)) == len(DOCS)
    assert again() == 0
    (folder / "000.txt").write_text("Something else. " + DOCS[0])
    before = tokenised[0]
    build(options(train=str(folder)), tokenizer, cache=tmp_path / "cache")
    assert tokenised[0] - before == len(DOCS)


def test_a_maker_that_was_killed_leaves_nothing_that_is_taken_for_whole(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    (tmp_path / "made.partial").mkdir()
    (tmp_path / "made.partial" / "rubbish").write_text("half")

    def make(partial: Path) -> None:
        (partial / "whole").write_text("all")

    assert cache.get_or_create(folder, make) is False
    assert [p.name for p in folder.iterdir()] == ["whole"]
    assert cache.get_or_create(folder, lambda partial: pytest.fail("made twice")) is True


def test_processes_that_come_together_make_it_once(tmp_path: Path) -> None:
    made: list[int] = []

    def make(partial: Path) -> None:
        made.append(1)
        time.sleep(0.2)

    threads = [Thread(target=cache.get_or_create, args=(tmp_path / "x", make)) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert made == [1]


def test_an_error_while_making_leaves_no_folder(tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines(DOCS) + "{broken\n")
    for _ in range(2):
        with pytest.raises(InputError, match=f"line {len(DOCS) + 1} is not valid JSON"):
            build(options(train=str(tmp_path / "a.jsonl")), tokenizer, cache=tmp_path / "cache")
    assert not [p for p in (tmp_path / "cache" / "packed").iterdir() if p.is_dir()]


KILLED = """
import sys, time
sys.path[:0] = {tests!r}
from pathlib import Path
import test_data as t
from hf_grow.training.data import packing
packing.BATCH = 1
true = packing.split_sequences
packing.split_sequences = lambda *a: (print("at work", flush=True), time.sleep(0.05), true(*a))[2]
tok = t.build_tokenizer(t.DOCS, 300)
t.build(t.options(train={folder!r}), tok, cache=Path({cache!r}))
print("whole", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("batches", [1, 7])
def test_killed_while_tokenising_and_started_again(tokenizer, folder: Path, tmp_path: Path, batches: int) -> None:
    code = KILLED.format(
        tests=[str(Path(__file__).parent), str(Path(__file__).parents[2] / "support")], folder=str(folder), cache=str(tmp_path / "cache")
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(batches):
            assert process.stdout.readline() == "at work\n"
        process.kill()
    left = [p.suffix for p in (tmp_path / "cache" / "packed").iterdir() if p.is_dir()]
    assert left == [".partial"]
    data = build(options(train=str(folder)), tokenizer, cache=tmp_path / "cache")
    assert rows(data.train) == plain(tokenizer)[:-1]
    assert [p.suffix for p in (tmp_path / "cache" / "packed").iterdir() if p.is_dir()] == [""]


# ---- shares --------------------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    shares=st.lists(st.integers(1, 1000), min_size=1, max_size=5),
    seed=st.integers(0, 5),
    start=st.integers(0, 10**9),
    length=st.integers(1, 400),
)
def test_every_stretch_holds_its_share(shares: list[int], seed: int, start: int, length: int) -> None:
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


def test_the_first_turns_count_from_zero() -> None:
    turn, ordinal = Interleaving((Fraction(1, 20), Fraction(3), Fraction(2)), 3).assign(0, 1000)
    for index in range(3):
        assert ordinal[turn == index].tolist() == list(range((turn == index).sum()))


@pytest.mark.parametrize("share", [0.01, 0.05, 0.25, 0.9])
def test_old_text_has_its_share_in_every_stretch(tokenizer, tmp_path: Path, share: float) -> None:
    new, old = texts(tmp_path / "new", DOCS[:8]), texts(tmp_path / "old", DOCS[8:12])
    data = build(options(train=str(new), replay={"path": str(old), "share": share}, shuffle=True), tokenizer, cache=tmp_path / "cache")
    old_rows = {tuple(r) for r in plain(tokenizer, DOCS[8:12])}
    new_rows = {tuple(r) for r in plain(tokenizer, DOCS[:8])}
    assert not old_rows & new_rows
    is_old = np.array([tuple(r) in old_rows for r in rows(data.train)])
    seen = np.concatenate([[0], np.cumsum(is_old)])
    for length in (1, 7, 20, 100, len(is_old)):
        counts = seen[length:] - seen[:-length]
        assert set(counts) <= {int(np.floor(share * length)), int(np.ceil(share * length - 1e-9))}, length
    # One pass through the new text, each of its sequences once.
    kept = [tuple(r) for r, o in zip(rows(data.train), is_old, strict=True) if not o]
    assert sorted(kept) == sorted(tuple(r) for r in plain(tokenizer, DOCS[:8]) if len(r) == LENGTH)
    assert kept != [tuple(r) for r in plain(tokenizer, DOCS[:8]) if len(r) == LENGTH]  # shuffled
    assert data.describe()[0] == {**data.describe()[0], "use": "replay", "share": share}


def test_sources_without_weights_are_each_used_once(tokenizer, tmp_path: Path) -> None:
    parts = [DOCS[:2], DOCS[2:9], DOCS[9:]]
    paths = [str(texts(tmp_path / str(n), part)) for n, part in enumerate(parts)]
    data = build(options(train=paths, replay={"path": paths[0], "share": 0.1}, shuffle=True), tokenizer, cache=tmp_path / "cache")
    wanted = [tuple(r) for part in parts for r in plain(tokenizer, part) if len(r) == LENGTH]
    old = next(p for p in data.parts if p.use == "replay")
    first = {tuple(r) for r in plain(tokenizer, parts[0])}
    assert sorted(r for r in map(tuple, rows(data.train)) if r not in first) == sorted(r for r in wanted if r not in first)
    assert len(data.train) == len(wanted) + round(old.passes * old.sequences)


def test_weights_set_the_parts_and_small_sources_come_again(tokenizer, tmp_path: Path) -> None:
    small, large = texts(tmp_path / "small", DOCS[:1]), texts(tmp_path / "large", DOCS[1:])
    train = [{"path": str(small), "weight": 3}, {"path": str(large), "weight": 1}]
    told: list[str] = []
    data = build(options(train=train), tokenizer, cache=tmp_path / "cache", sequences=400, notify=told.append)
    own = [tuple(r) for r in plain(tokenizer, DOCS[:1]) if len(r) == LENGTH]
    mine = [tuple(r) for r in rows(data.train) if tuple(r) in set(own)]
    assert len(data.train) == 400 and len(mine) == 300
    assert mine == (own * (300 // len(own) + 1))[:300]  # pass after pass
    assert data.parts[0].passes == 300 / len(own)


def test_each_pass_has_an_order_of_its_own_and_all_rows() -> None:
    ordinals = np.arange(35)
    shuffled = row_indices(ordinals, 10, [0, 1], shuffle=True)
    for start in (0, 10, 20):
        assert sorted(shuffled[start : start + 10]) == list(range(10))
    assert shuffled[:10].tolist() != shuffled[10:20].tolist()
    assert (row_indices(ordinals[17:], 10, [0, 1], shuffle=True) == shuffled[17:]).all()
    assert row_indices(ordinals, 10, [0, 1], shuffle=False).tolist() == (list(range(10)) * 4)[:35]


def test_the_seed_decides_the_order_and_nothing_else(tokenizer, folder: Path, tmp_path: Path) -> None:
    first, same, other = (
        rows(build(options(train=str(folder), shuffle=True, seed=s), tokenizer, cache=tmp_path / "cache").train) for s in (0, 0, 1)
    )
    assert first == same != other
    assert sorted(first) == sorted(other)


# ---- named sets ----------------------------------------------------------------------------------------------------------------------


def test_named_sets_keep_all_text_or_an_even_choice_of_it(tokenizer, folder: Path, tmp_path: Path) -> None:
    sets = {"all": {"path": str(folder), "sequences": None}, "some": {"path": str(folder), "sequences": 5}, "bare": str(folder)}
    data = build(options(train=str(folder), eval=sets), tokenizer, cache=tmp_path / "cache")
    reference = plain(tokenizer)
    reference[-1] += [-100] * (LENGTH - len(reference[-1]))
    assert rows(data.evals["all"]) == reference
    assert rows(data.evals["some"]) == [reference[i] for i in np.linspace(0, len(reference) - 1, 5).astype(int)]
    assert len(data.evals["bare"]) == 256
    assert [p.use for p in data.parts] == ["train", "eval all", "eval some", "eval bare"]


# ---- streams -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a state lies in the middle of several of them."""
    from hf_grow.training.data import stream

    monkeypatch.setattr(stream, "BATCH", 3)


def stream_of(tokenizer: Any, tmp_path: Path, **more: Any) -> Any:
    return build(options(streaming=True, **more), tokenizer, cache=tmp_path / "cache").train


def test_a_stream_gives_the_sequences_of_the_packed_text_in_their_order(tokenizer, folder: Path, tmp_path: Path, small_batches) -> None:
    stream = stream_of(tokenizer, tmp_path, train=str(folder))
    full = [r for r in plain(tokenizer) if len(r) == LENGTH]
    assert rows(islice(stream, len(full))) == full
    # Read to its end it begins again, and what was left over goes before.
    twice = plain(tokenizer, DOCS + DOCS)
    assert rows(islice(stream, 2 * len(full))) == twice[: 2 * len(full)]
    assert not (tmp_path / "cache").exists()


def test_a_mixed_stream_takes_the_turns_of_the_packed_mix(tokenizer, tmp_path: Path, small_batches) -> None:
    paths = [str(texts(tmp_path / str(n), part)) for n, part in enumerate([DOCS[:8], DOCS[8:14], DOCS[14:]])]
    mix = {
        "train": [{"path": paths[0], "weight": 2}, {"path": paths[1], "weight": 1}],
        "replay": {"path": paths[2], "share": 0.2},
        "seed": 4,
    }
    packed = build(options(**mix), tokenizer, cache=tmp_path / "cache", sequences=120)
    assert all(p.passes < 1 for p in packed.parts)
    assert rows(islice(stream_of(tokenizer, tmp_path, **mix), 120)) == rows(packed.train)


def test_a_stream_goes_on_after_any_sequence(tokenizer, tmp_path: Path, small_batches) -> None:
    paths = [str(texts(tmp_path / str(n), part)) for n, part in enumerate([DOCS[:8], DOCS[8:10]])]
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


def test_one_worker_of_a_dataloader_may_read_a_stream(tokenizer, folder: Path, tmp_path: Path) -> None:
    stream = stream_of(tokenizer, tmp_path, train=str(folder))
    assert list(islice(loaded(stream, 1), 40)) == rows(islice(stream, 40))
    two = loaded(stream, 2)
    with pytest.raises(InputError, match="cannot be read by 2 DataLoader workers"):
        next(two)


# ---- what is refused -----------------------------------------------------------------------------------------------------------------


def write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


BAD: dict[str, tuple[dict[str, str | bytes], dict[str, Any], str]] = {
    "missing file": ({}, {"path": "none.jsonl"}, "no file or folder"),
    "missing folder": ({}, {"path": "./none"}, "no file or folder"),
    "no match": ({}, {"path": "*.txt"}, "No file matches"),
    "empty file": ({"a.txt": ""}, {"path": "a.txt"}, "is empty"),
    "blank file": ({"a.txt": " \n\n"}, {"path": "a.txt"}, "is empty: it contains no text"),
    "empty jsonl": ({"a.jsonl": "\n"}, {"path": "a.jsonl"}, "is empty: it contains no text"),
    "empty folder": ({"d/.keep": "x"}, {"path": "d"}, "contains no text files"),
    "unknown format": ({"a.docx": "x"}, {"path": "a.docx"}, "unsupported format.*Supported: .txt"),
    "unknown format in a glob": ({"a.txt": "x", "b.bin": "x"}, {"path": "*"}, "b.bin, which has an unsupported format"),
    "two kinds": ({"d/a.txt": "x", "d/b.jsonl": "{}"}, {"path": "d"}, r"several formats \(1 text, 1 jsonl\)"),
    "unknown field": ({"a.jsonl": lines(DOCS[:1])}, {"path": "a.jsonl", "text_field": "body"}, "no field 'body'.*Its fields: content, n"),
    "field of numbers": ({"a.jsonl": lines(DOCS[:1])}, {"path": "a.jsonl", "text_field": "n"}, "'n' does not hold text"),
    "unclear field": ({"a.jsonl": '{"q": "x", "a": "y"}'}, {"path": "a.jsonl"}, "not clear which field.*q, a.*text_field"),
    "chat": ({"a.jsonl": '{"messages": [{"role": "user"}]}'}, {"path": "a.jsonl"}, "no field that holds text.*messages"),
    "field later gone": ({"a.jsonl": '{"text": "x"}\n{"other": 1}\n'}, {"path": "a.jsonl"}, "line 2 has no field that holds text"),
    "field of plain text": ({"a.txt": "x"}, {"path": "a.txt", "text_field": "text"}, "plain text and has no field"),
    "not JSON": ({"a.jsonl": '{"text": "x"}\n{"text": \n'}, {"path": "a.jsonl"}, "line 2 is not valid JSON"),
    "deep JSON": ({"a.jsonl": "[" * 100_000}, {"path": "a.jsonl"}, "line 1 is not valid JSON"),
    "lines in .json": ({"a.json": lines(DOCS[:2])}, {"path": "a.json"}, "is not valid JSON.*named .jsonl"),
    "a number": ({"a.json": "[1]"}, {"path": "a.json"}, "entry 1 holds int"),
    "not UTF-8": ({"a.txt": b"caf\xe9"}, {"path": "a.txt"}, "not UTF-8"),
    "not gzip": ({"a.txt.gz": b"plain"}, {"path": "a.txt.gz"}, "Cannot read .*a.txt.gz"),
    "cut gzip": ({"a.txt.gz": gzip.compress(b"word " * 9999)[:40]}, {"path": "a.txt.gz"}, "Cannot read .*a.txt.gz"),
    "not Parquet": ({"a.parquet": b"PAR1 nothing"}, {"path": "a.parquet"}, "Cannot read the Parquet file"),
    "a split of files": ({"a.txt": "x"}, {"path": "a.txt", "split": "test"}, "local files have no split"),
    "a revision of files": ({"a.txt": "x"}, {"path": "a.txt", "revision": "v1"}, "`revision` applies to Hub datasets only"),
    "an address": ({}, {"path": "https://example.com/x"}, "no file or folder|is a URL"),
    "no id": ({}, {"path": "wikitext"}, "no file or folder.*OWNER/NAME"),
    "bad id": ({}, {"path": "a b/c d"}, "neither a folder nor a Hub id"),
    "Hub beside files": ({"a.txt": "x"}, {"path": ["a.txt", "owner/name"]}, "a source of its own"),
    "too little": ({"a.txt": "few words"}, {"path": "a.txt"}, f"fewer than one sequence of {LENGTH}"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_message(tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    files, source, message = BAD[name]
    for path, content in files.items():
        write(tmp_path / path, content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        build(options(train=source), tokenizer, cache=tmp_path / ".cache")
    import re

    assert re.search(message, str(error.value), re.DOTALL), str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("name", "message"), [("blank file", "contains no text"), ("not JSON", "line 2 is not valid JSON"), ("not UTF-8", "not UTF-8")]
)
def test_a_stream_refuses_the_same(tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    for path, content in BAD[name][0].items():
        write(tmp_path / path, content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        list(islice(stream_of(tokenizer, tmp_path, train=BAD[name][1]), 3))


def test_mistakes_in_the_options_are_all_told_at_once() -> None:
    bad = {
        "train": [{"path": "a.txt", "wieght": 2}, {"weight": -1, "path": "b.txt"}],
        "replay": {"path": "c.txt", "share": "5e-2"},
        "eval": {"old": {"sequences": 3}},
        "seq_length": 1,
        "sed": 0,
    }
    with pytest.raises(InputError) as error:
        parse(DataOptions, bad, where="recipe.yaml")
    for part in (
        "train.0.wieght",
        "train.1.weight",
        "replay.share: '5e-2' is a string",
        "eval.old.path: is missing",
        "seq_length",
        "sed: unknown key",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"train": []}, "at least 1 item"),
        ({"train": [{"path": "a", "weight": 1.0}, "b"]}, "a weight to every source or to none"),
        ({"train": "a", "replay": {"share": 0.1}}, "either path .* or self"),
        ({"train": "a", "replay": {"path": "b", "self": {}}}, "either path .* or self"),
        ({"train": "a", "replay": {"path": "b", "share": 1.0}}, "less than 1"),
        ({"train": "a", "replay": {"self": {"temperature": 0}}}, "replay.self.temperature"),
        ({"train": 3}, "train"),
    ],
)
def test_options_that_contradict_each_other(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse(DataOptions, bad, where="recipe.yaml")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_tokenizer_that_is_not_the_models(tokenizer, folder: Path, tmp_path: Path, streaming: bool) -> None:
    for _ in range(2):  # the second time the text is in the cache
        with pytest.raises(InputError, match=r"do not match.*vocabulary ends at 199"):
            next(iter(build(options(train=str(folder), streaming=streaming), tokenizer, cache=tmp_path / "cache", vocab_size=200).train))
        build(options(train=str(folder)), tokenizer, cache=tmp_path / "cache", vocab_size=300)
    with pytest.raises(InputError, match="do not match"):
        survey(options(train=str(folder)), tokenizer, vocab_size=200)


def test_a_tokenizer_without_eos(folder: Path, tmp_path: Path) -> None:
    bare = build_tokenizer(DOCS, 300)
    bare.eos_token = None
    with pytest.raises(InputError, match="no EOS token"):
        build(options(train=str(folder)), bare, cache=tmp_path / "cache")


# ---- the Hub -------------------------------------------------------------------------------------------------------------------------

ASK = """
import json, sys
from hf_grow.errors import GrowError
from hf_grow.training.config.data_options import TextOptions
from hf_grow.training.data.sources import find_text
for line in sys.argv[1:]:
    asked = json.loads(line)
    streaming = asked.pop("streaming", False)
    told = []
    try:
        source = find_text(TextOptions(**asked), notify=told.append)
        print(json.dumps({"commit": source.identity["commit"], "texts": [d["text"] for d in source.documents(streaming=streaming)], "told": told}))
    except GrowError as error:
        print(json.dumps({"error": str(error), "status": error.exit_code}))
"""


def ask(hub: HubServer, home: Path, *asked: dict[str, Any], **more: str) -> list[dict[str, Any]]:
    """In a process of its own: the library reads its environment when it is imported."""
    environment = {**os.environ, **client_environment(hub, home), "HF_DATASETS_CACHE": str(home / "datasets"), **more}
    environment = {k: v for k, v in environment.items() if k not in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")}
    done = subprocess.run([sys.executable, "-c", ASK, *map(json.dumps, asked)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_data_sets_on_the_hub(tmp_path: Path) -> None:
    docs = [f"document {n} of the set" for n in range(10)]
    write(tmp_path / "set" / "train.jsonl", "".join(json.dumps({"text": d, "n": 1}) + "\n" for d in [*docs, "", "  "]))
    write(tmp_path / "set" / "README.md", "# A set\n")
    write(tmp_path / "script" / "script.py", "x = 1\n")
    with HubServer() as hub:
        commit = hub.add("datasets/owner/set", tmp_path / "set")
        hub.add("datasets/owner/script", tmp_path / "script")
        hub.add("datasets/owner/gated", tmp_path / "set", gated=True)
        whole, streamed, first, *bad = ask(
            hub,
            tmp_path / "home",
            {"path": ["owner/set"]},
            {"path": ["owner/set"], "streaming": True},
            {"path": ["owner/set"], "limit": 3},
            {"path": ["owner/set"], "split": "test"},
            {"path": ["owner/set"], "text_field": "body"},
            {"path": ["owner/set"], "name": "other"},
            {"path": ["owner/set"], "revision": "v9"},
            {"path": ["owner/set"], "files": "*.parquet", "streaming": True},
            {"path": ["owner/script"]},
            {"path": ["owner/gated"]},
            {"path": ["owner/none"]},
        )
        assert whole == streamed == {"commit": commit, "texts": docs, "told": []}
        assert first["texts"] == docs[:3]
        messages = ["no such split.*train", "no field 'body'.*text, n", "another `name`", "no revision 'v9'", "contains no such files",
                    "scripts are not run.*refs/convert/parquet", "gated or private.*hf auth login", "no repository datasets/owner/none"]  # fmt: skip
        import re

        for found, message in zip(bad, messages, strict=True):
            assert found["status"] == 2
            assert re.search(message, found["error"], re.DOTALL), found
        # Without an answer: what was downloaded is used, what was not is told.
        offline = ask(hub, tmp_path / "home", {"path": ["owner/set"]}, {"path": ["owner/none"]}, HF_HUB_OFFLINE="1")
        assert (offline[0]["commit"], offline[0]["texts"]) == (commit, docs)
        assert "from the cache" in offline[0]["told"][0]
        assert "not in the cache" in offline[1]["error"]


def test_data_md_tells_every_option() -> None:
    from hf_grow.training.config.replay_options import ReplayOptions
    from hf_grow.training.data import EvalSource, ReplaySource, TextOptions, TrainSource

    text = (Path(__file__).parents[3] / "docs" / "data.md").read_text()
    keys = {k for model in (DataOptions, TextOptions, TrainSource, EvalSource) for k in model.model_fields}
    assert not [k for k in keys if f"`{k}`" not in text and f"{k}:" not in text]
    assert not [
        k for k in ReplaySource.model_fields.keys() - TextOptions.model_fields if f"`replay.{k}`" not in text and f"{{{k}:" not in text
    ]
    assert not [k for k in ReplayOptions.model_fields if f"`--{k.replace('_', '-')}`" not in text]
