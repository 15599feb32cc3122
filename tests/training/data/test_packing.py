"""Packed sequences against a plain reference, and their cache."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from models import BY_NAME, make
from packed_texts import DOCS, LENGTH, data_options, json_lines, packed_reference, rows

from hf_grow.demo.small_model import build_tokenizer
from hf_grow.errors import InputError
from hf_grow.training.data import build, cache, packing, survey


@pytest.mark.parametrize("length", [2, 48, 1000])
def test_sequences_split_concatenated_token_ids(tokenizer, folder: Path, tmp_path: Path, length: int) -> None:
    data = build(data_options(train=str(folder), seq_length=length), tokenizer, cache=tmp_path / "cache")
    reference = packed_reference(tokenizer, length=length)
    assert rows(data.train) == [r for r in reference if len(r) == length]
    assert data.tokens == len(data.train) * length
    assert data.describe()[0]["tokens"] == sum(map(len, reference))
    assert data.describe()[0]["documents"] == len(DOCS)


def test_remainder_keep_pads_with_ignored_labels(tokenizer, folder: Path, tmp_path: Path) -> None:
    data = build(data_options(train=str(folder), remainder="keep"), tokenizer, cache=tmp_path / "cache")
    *full, last = packed_reference(tokenizer)
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


def test_bos_modes(tokenizer, folder: Path, tmp_path: Path) -> None:
    from copy import deepcopy

    from tokenizers.processors import TemplateProcessing

    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    own = deepcopy(tokenizer)  # puts BOS and EOS around a text by itself
    own.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", bos), ("</s>", eos)])
    assert own.encode("a") == [bos, *tokenizer.encode("a"), eos]
    for used, mode, head in [(own, "tokenizer", (bos,)), (own, "never", ()), (own, "always", (bos,)), (tokenizer, "tokenizer", ()),
                             (tokenizer, "always", (bos,))]:  # fmt: skip
        data = build(data_options(train=str(folder), bos=mode), used, cache=tmp_path / "cache")
        assert rows(data.train) == packed_reference(tokenizer, head=head)[:-1], mode


@pytest.mark.slow
def test_num_proc_does_not_change_sequences(tokenizer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "BATCH", 3)
    data = build(data_options(train=str(folder), num_proc=2), tokenizer, cache=tmp_path / "cache")
    assert rows(data.train) == packed_reference(tokenizer)[:-1]


@pytest.mark.parametrize("streaming", [False, True])
def test_token_ids_beyond_vocab_size_fail(tokenizer, folder: Path, tmp_path: Path, streaming: bool) -> None:
    for _ in range(2):  # the second time the text is in the cache
        with pytest.raises(InputError, match=r"do not match.*vocabulary ends at 199"):
            next(
                iter(build(data_options(train=str(folder), streaming=streaming), tokenizer, cache=tmp_path / "cache", vocab_size=200).train)
            )
        build(data_options(train=str(folder)), tokenizer, cache=tmp_path / "cache", vocab_size=300)
    with pytest.raises(InputError, match="do not match"):
        survey(data_options(train=str(folder)), tokenizer, vocab_size=200)


def test_tokenizer_without_eos_fails(folder: Path, tmp_path: Path) -> None:
    bare = build_tokenizer(DOCS, 300)
    bare.eos_token = None
    with pytest.raises(InputError, match="no EOS token"):
        build(data_options(train=str(folder)), bare, cache=tmp_path / "cache")


def survey_of(tokenizer: Any, **data: Any) -> list[dict[str, Any]]:
    return survey(data_options(**data), tokenizer)


def test_survey_estimates_tokens_without_cache(tokenizer, folder: Path, tmp_path: Path) -> None:
    replay = {"path": str(folder), "share": 0.5, "limit": 3}
    found = survey_of(tokenizer, train=str(folder), replay=replay, eval={"new": str(folder)}, cache=str(tmp_path / "cache"))
    assert [f["use"] for f in found] == ["train", "replay", "eval new"]
    true = sum(map(len, packed_reference(tokenizer)))
    assert found[0]["bytes"] == sum(len(d.encode()) for d in DOCS)
    assert abs(found[0]["tokens"] / true - 1) < 0.15
    assert not (tmp_path / "cache").exists()


def test_survey_counts_only_used_sequences_of_eval_sets(tokenizer, folder: Path) -> None:
    path, length = str(folder), data_options(train=str(folder)).seq_length
    found = survey_of(tokenizer, train=path, eval={"few": {"path": path, "sequences": 2}, "all": {"path": path, "sequences": None}})
    few, every = (f["tokens"] for f in found[1:])
    assert few == 2 * length < every == found[0]["tokens"]


# ---- the cache ----------------------------------------------------------------------------------------------------------------------------


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


def test_cache_is_reused_until_text_changes(tokenizer, folder: Path, tmp_path: Path, tokenised: list[int]) -> None:
    def again(used: Any = tokenizer, **more: Any) -> int:
        before = tokenised[0]
        data = build(data_options(train=str(folder), **more), used, cache=tmp_path / "cache")
        assert rows(data.train)[0] == packed_reference(used, length=more.get("seq_length", LENGTH))[0]
        return tokenised[0] - before

    assert again() == len(DOCS)
    assert again() == 0
    assert again(seed=5) == again(num_proc=1) == 0  # decide nothing of it
    assert again(seq_length=32) == len(DOCS)
    assert again(build_tokenizer(DOCS, 290)) == len(DOCS)
    assert again() == 0
    (folder / "000.txt").write_text("Something else. " + DOCS[0])
    before = tokenised[0]
    build(data_options(train=str(folder)), tokenizer, cache=tmp_path / "cache")
    assert tokenised[0] - before == len(DOCS)


def test_partial_cache_folder_is_not_used(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    (tmp_path / "made.partial").mkdir()
    (tmp_path / "made.partial" / "rubbish").write_text("half")

    def make(partial: Path) -> None:
        (partial / "whole").write_text("all")

    assert cache.get_or_create(folder, make) is False
    assert [p.name for p in folder.iterdir()] == ["whole"]
    assert cache.get_or_create(folder, lambda partial: pytest.fail("made twice")) is True


def test_concurrent_processes_create_cache_once(tmp_path: Path) -> None:
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


def test_failed_creation_leaves_no_cache_folder(tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json_lines(DOCS) + "{broken\n")
    for _ in range(2):
        with pytest.raises(InputError, match=f"line {len(DOCS) + 1} is not valid JSON"):
            build(data_options(train=str(tmp_path / "a.jsonl")), tokenizer, cache=tmp_path / "cache")
    assert not [p for p in (tmp_path / "cache" / "packed").iterdir() if p.is_dir()]


KILLED = """
import sys, time
sys.path[:0] = [{support!r}]
from pathlib import Path
from packed_texts import DOCS, data_options
from hf_grow.demo.small_model import build_tokenizer
from hf_grow.training.data import build, packing
packing.BATCH = 1
true = packing.split_sequences
packing.split_sequences = lambda *a: (print("at work", flush=True), time.sleep(0.05), true(*a))[2]
build(data_options(train={folder!r}), build_tokenizer(DOCS, 300), cache=Path({cache!r}))
print("whole", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("batches", [1, 7])
def test_killed_tokenisation_restarts(tokenizer, folder: Path, tmp_path: Path, batches: int) -> None:
    code = KILLED.format(support=str(Path(__file__).parents[2] / "support"), folder=str(folder), cache=str(tmp_path / "cache"))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(batches):
            assert process.stdout.readline() == "at work\n"
        process.kill()
    left = [p.suffix for p in (tmp_path / "cache" / "packed").iterdir() if p.is_dir()]
    assert left == [".partial"]
    data = build(data_options(train=str(folder)), tokenizer, cache=tmp_path / "cache")
    assert rows(data.train) == packed_reference(tokenizer)[:-1]
    assert [p.suffix for p in (tmp_path / "cache" / "packed").iterdir() if p.is_dir()] == [""]
