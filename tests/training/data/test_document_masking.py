"""Intra-document masking: a document in a packed row gives the logits that it gives alone, in every path that runs a model."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from exact import exact
from models import BY_NAME, make, real_config
from packed_texts import DOCS, LENGTH, data_options, packed_reference, stream_of
from torch import Tensor
from trained import grown, logged, recipe, run
from transformers import AttentionInterface, AutoModelForCausalLM, TrainingArguments

from hf_grow.errors import InputError
from hf_grow.training.config.distill_options import DistillOptions
from hf_grow.training.config.train_config import read_recipe
from hf_grow.training.data import Collator, build
from hf_grow.training.data.document_masking import check_attention, forward_arguments, position_ids, split_lengths
from hf_grow.training.distillation.distill import Distiller, ModelTeacher
from hf_grow.training.distillation.logit_cache import write_logit_cache
from hf_grow.training.grow_config import GrowConfig
from hf_grow.training.grow_trainer import PaddingCollator, prepare_dataset
from hf_grow.training.setup.recipe_checks import check_recipe
from hf_grow.training.setup.source_baseline import SourceKL, mean_losses
from hf_grow.training.setup.teachers import Collated

MASKED = {"intra_document_masking": True}
PIECES = [[5, 1, 6], [12], [2, 2, 7, 1]]
"""Documents of three rows of 12 tokens: of one token, and longer than the windows of the models."""


def random_rows(pieces: list[list[int]] = PIECES, seed: int = 3) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, 64, (sum(p),), generator=draw).tolist(), "seq_lengths": p} for p in pieces]


def documents(rows: list[dict[str, Any]]) -> Iterator[tuple[int, int, Tensor]]:
    """Row, start and ids [1, length] of every document."""
    for number, row in enumerate(rows):
        start = 0
        for length in row["seq_lengths"]:
            yield number, start, torch.tensor([row["input_ids"][start : start + length]])
            start += length


def alone(model: Any, rows: list[dict[str, Any]]) -> Tensor:
    """The logits of every document by itself, where it stands in the rows."""
    found: list[list[Tensor]] = [[] for _ in rows]
    for row, _, ids in documents(rows):
        found[row].append(model(ids, use_cache=False).logits[0])
    return torch.stack([torch.cat(f) for f in found])


def model_for(case: str, attention: str) -> Any:
    model = make(BY_NAME[case]).double()
    if attention == "eager":
        return model
    made = AutoModelForCausalLM.from_config(real_config(BY_NAME[case]), attn_implementation=attention, experts_implementation="eager")
    made.double().eval().load_state_dict(model.state_dict())
    return made


# ---- rows ----------------------------------------------------------------------------------------------------------------------------------


def test_lengths_are_those_of_the_pieces_of_each_row() -> None:
    draw = np.random.default_rng(0)
    for _ in range(50):
        length, lengths = int(draw.integers(2, 9)), draw.integers(0, 20, size=int(draw.integers(1, 30))).tolist()
        owner = [n for n, count in enumerate(lengths) for _ in range(count)]
        carry, rows = list[int](), list[list[int]]()
        for start in range(0, len(lengths), 4):  # in batches, as packing does
            more, carry = split_lengths(carry, lengths[start : start + 4], length)
            rows += more
        cut = [owner[i : i + length] for i in range(0, len(owner), length)]
        expected = [[sum(1 for o in row if o == n) for n in dict.fromkeys(row)] for row in cut]
        assert rows == [e for e, row in zip(expected, cut, strict=True) if len(row) == length]
        assert carry == (expected[-1] if cut and len(cut[-1]) < length else [])


@pytest.mark.parametrize("streaming", [False, True])
def test_packed_rows_tell_their_documents(streaming: bool, tokenizer: Any, folder: Path, tmp_path: Path) -> None:
    """The ids are as without masking, and the positions start again where a document does."""
    starts, at = {0}, 0
    for doc in DOCS:
        at += len(tokenizer.encode(doc, add_special_tokens=False)) + 1
        starts.add(at)
    plain = [row for row in packed_reference(tokenizer) if len(row) == LENGTH]
    options = data_options(train=str(folder), **MASKED, streaming=streaming)
    data = build(options, tokenizer, cache=tmp_path / "cache")
    rows = list(islice(data.train, len(plain)))
    assert [row["input_ids"] for row in rows] == plain
    for number, row in enumerate(rows):
        expected, position = [], 0
        for place in range(number * LENGTH, (number + 1) * LENGTH):
            position = 0 if place in starts or place % LENGTH == 0 else position + 1
            expected.append(position)
        batch = data.collator([row])
        assert batch["position_ids"].tolist() == [expected]
        labels = [-100 if p == 0 else i for p, i in zip(expected, row["input_ids"], strict=True)]
        assert batch["labels"].tolist() == [labels] and batch["input_ids"].tolist() == [row["input_ids"]]
    off = build(data_options(train=str(folder), streaming=streaming), tokenizer, cache=tmp_path / "cache")
    assert next(iter(off.train)).keys() == {"input_ids"} and off.collator([rows[0] | {}]).keys() == batch.keys()


def test_padding_is_no_part_of_a_document(tokenizer: Any, folder: Path, tmp_path: Path) -> None:
    data = build(data_options(train=str(folder), **MASKED, remainder="keep"), tokenizer, cache=tmp_path / "cache")
    last = data.train[len(data.train) - 1]
    padding = sum(i == -100 for i in last["input_ids"])
    assert last["seq_lengths"][-1] == padding > 0 and sum(last["seq_lengths"]) == LENGTH
    batch = data.collator([last])
    assert batch["position_ids"][0, -padding:].tolist() == list(range(padding))
    assert (batch["labels"][0, -padding:] == -100).all()


def test_a_stream_goes_on_with_the_documents_that_were_cut(tokenizer: Any, folder: Path, tmp_path: Path) -> None:
    whole = list(islice(stream_of(tokenizer, tmp_path, train=str(folder), **MASKED), 90))
    for place in (1, 13, 50):
        reading = stream_of(tokenizer, tmp_path, train=str(folder), **MASKED)
        list(islice(iter(reading), place))
        resumed = stream_of(tokenizer, tmp_path, train=str(folder), **MASKED)
        resumed.load_state_dict(reading.state_dict())
        assert list(islice(resumed, 40)) == whole[place : place + 40]
    assert resumed.identity != stream_of(tokenizer, tmp_path, train=str(folder)).identity


# ---- logits and losses -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", ["llama", "mixtral", "qwen2-window", "mistral-tied"])
def test_a_packed_document_has_the_logits_that_it_has_alone(case: str, attention: str) -> None:
    rows = random_rows()
    with exact(), torch.no_grad():
        model = model_for(case, attention)
        model.config.use_cache = True  # a cache would hide the documents from the mask
        batch = Collator(0)(rows)
        found = model(input_ids=batch["input_ids"], **forward_arguments(model.config, batch["position_ids"])).logits
        expected = alone(model, rows)
        assert (found - expected).abs().max() < 1e-10
        assert (model(batch["input_ids"], use_cache=False).logits - expected).abs().max() > 1e-3  # what is compared does differ without


@pytest.mark.slow
def test_flex_attention_keeps_to_documents() -> None:
    """In fp32: it is compiled, and computes in what it is given."""
    rows = random_rows()
    with torch.no_grad():
        model, plain = make(BY_NAME["llama"], head_dim=16), make(BY_NAME["llama"], head_dim=16)
        model.set_attn_implementation("flex_attention")
        batch = Collator(0)(rows)
        found = model(input_ids=batch["input_ids"], **forward_arguments(model.config, batch["position_ids"])).logits
        expected = alone(plain, rows)
    assert (found - expected).abs().max() < 1e-4 < (plain(batch["input_ids"], use_cache=False).logits - expected).abs().max()


def test_flash_attention_is_told_every_document_of_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernel is replaced by a loop here; transformers' own detection works for batches of one row only."""
    from transformers import modeling_flash_attention_utils as flash

    def variable_length(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **options: Any) -> Tensor:
        assert cu_seqlens_q.tolist() == cu_seqlens_k.tolist() and int(options["max_seqlen_q"]) == cu_seqlens_q.diff().max()
        ends = cu_seqlens_q.tolist()
        groups = q.shape[1] // k.shape[1]
        parts = []
        for start, end in pairwise(ends):
            one = [t[start:end].transpose(0, 1) for t in (q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))]
            parts.append(torch.nn.functional.scaled_dot_product_attention(*one, is_causal=True).transpose(0, 1))
        return torch.cat(parts)

    def process(max_seqlen_q: Any = None, **_: Any) -> dict[str, Any]:
        return {"max_seqlen_q": max_seqlen_q}

    monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda name: ((None, variable_length, None, None, None), (process, None)))
    rows = random_rows()
    with exact(), torch.no_grad():
        model = make(BY_NAME["llama"]).double()
        expected = alone(model, rows)
        model.config._attn_implementation = "flash_attention_2"
        batch = Collator(0)(rows)
        found = model(input_ids=batch["input_ids"], **forward_arguments(model.config, batch["position_ids"])).logits
    assert (found - expected).abs().max() < 1e-10


def test_attention_that_gets_no_mask_is_refused(tmp_path: Path) -> None:
    for name in (None, "sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3"):
        check_attention(name)
    AttentionInterface.register("of_mine", lambda *args, **options: None)
    for name in ("of_mine", "paged|eager", "paged|flash_attention_2"):
        with pytest.raises(InputError, match="would attend to other documents"):
            check_attention(name)
    with pytest.raises(InputError, match="other documents"):
        forward_arguments(SimpleNamespace(_attn_implementation="of_mine"), torch.zeros(1, 2))
    path = recipe(tmp_path, grown(tmp_path))
    from hf_grow.training.config.recipe_files import load_recipe

    read = load_recipe(path, {"attn_implementation": "of_mine", "data.intra_document_masking": True})
    with pytest.raises(InputError, match="attn_implementation: of_mine would attend to other documents"):
        check_recipe(read, output=None, resume=False, overwrite=False, notify=print)
    assert read_recipe({**read.given, "data": {**read.given["data"], "intra_document_masking": "yes"}}).mistakes


def test_teachers_baselines_and_caches_see_documents_alone(tmp_path: Path) -> None:
    rows, collate = random_rows(), Collator(0)
    with exact(), torch.no_grad():
        student, teacher = model_for("llama", "sdpa"), make(BY_NAME["llama"], seed=1).double()
        batch = collate(rows)
        plain, expected = alone(teacher, rows), alone(student, rows)
        wanted = torch.zeros(())
        for row, start, ids in documents(rows):
            last = start + ids.shape[1] - 1
            p, q = plain[row, start:last].log_softmax(-1), expected[row, start:last].log_softmax(-1)
            wanted = wanted + (p.exp() * (p - q)).sum()
        labels = int((batch["labels"] != -100).sum())
        assert labels == sum(n - 1 for pieces in PIECES for n in pieces)
        cached = write_logit_cache(teacher, Collated(rows, collate), tmp_path / "cache", top_k=64, dtype="float32", identity="t")
        for source, tolerance in ((ModelTeacher(teacher), 1e-10), (cached, 1e-5)):
            distiller = Distiller(DistillOptions(), [source])
            loss = distiller.loss(expected, batch["input_ids"], batch["labels"], None, batch["position_ids"])
            assert abs(float(loss - wanted / labels)) < tolerance
        kl = SourceKL(teacher, rows, collate, "cpu")(student)
        everywhere = (plain.log_softmax(-1).exp() * (plain.log_softmax(-1) - expected.log_softmax(-1))).sum(-1).mean()
        assert kl == pytest.approx(float(everywhere), abs=1e-10)
        losses = [-expected[row, start : start + ids.shape[1] - 1].log_softmax(-1).gather(-1, ids[0, 1:, None]).sum()
                  for row, start, ids in documents(rows)]  # fmt: skip
        assert mean_losses(student, {"old": rows}, collate, TrainingArguments(per_device_eval_batch_size=3, use_cpu=True))[
            "old"
        ] == pytest.approx(float(sum(losses)) / labels, abs=1e-10)
    # The same ids with other documents in them are another row.
    with pytest.raises(Exception, match="no logits for a training row"):
        cached(batch["input_ids"], None)


def test_a_training_counts_the_labels_within_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The loss of a step with accumulation is the mean over all its labels; evaluations are masked too. By hand, document for document."""
    model = grown(tmp_path)
    path = recipe(tmp_path, model, data=MASKED, max_steps=1, gradient_accumulation_steps=2, kl_rows=2, distill={"top_k": 8})
    result = run(capsys, "train", path)
    read = read_recipe(__import__("yaml").safe_load(path.read_text())).recipe
    assert read is not None
    from hf_grow.training.setup.option_checks import load_tokenizer

    data = build(read.data, load_tokenizer(str(model), None), cache=tmp_path / "cache", sequences=4)
    loaded = AutoModelForCausalLM.from_pretrained(model).eval()
    assert sum(len(row["seq_lengths"]) for row in data.train) > 4, "a document begins within a row"

    def mean(rows: list[Any]) -> float:
        with torch.no_grad():
            losses = [
                (loaded(ids, labels=ids).loss * (ids.shape[1] - 1), ids.shape[1] - 1) for _, _, ids in documents(rows) if ids.shape[1] > 1
            ]
        return float(sum(loss for loss, _ in losses)) / sum(count for _, count in losses)

    old = [data.evals["old"][i] for i in range(4)]
    batches = [mean(old[:2]), mean(old[2:])]
    assert result["start"]["old"] == pytest.approx(sum(batches) / 2, abs=2e-5)
    path = recipe(tmp_path, model, data=MASKED, max_steps=1, gradient_accumulation_steps=2, output=str(tmp_path / "plain"))
    run(capsys, "train", path)
    assert logged(tmp_path / "plain")[1] == pytest.approx(mean(list(data.train)), abs=2e-5)


# ---- in Python -------------------------------------------------------------------------------------------------------------------------------


def test_datasets_in_memory(tokenizer: Any, tmp_path: Path) -> None:
    from datasets import Dataset

    args = GrowConfig(str(tmp_path), seq_length=LENGTH, use_cpu=True, intra_document_masking=True)
    packed = prepare_dataset(Dataset.from_dict({"text": list(DOCS)}), args, tokenizer, 300, remainder="keep")
    assert {len(row["input_ids"]) for row in packed} == {sum(row["seq_lengths"]) for row in packed} == {LENGTH}
    given = Dataset.from_dict({"input_ids": [[3, 4, 5, 6, 7], [8, 9]], "position_ids": [[0, 1, 0, 1, 2], [0, 1]], "note": ["", ""]})
    rows = prepare_dataset(given, args, None, 300, remainder="drop")
    batch = PaddingCollator(2)([rows[0], rows[1]])
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2], [0, 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 4, -100, 6, 7], [-100, 9, -100, -100, -100]]
    with pytest.raises(InputError, match="do not start at 0"):
        position_ids([{"position_ids": [3, 4]}])
    with pytest.raises(InputError, match="attention_mask beside"):
        prepare_dataset(given.add_column("attention_mask", [[1] * 5, [1] * 2]), args, None, 300, remainder="drop")
