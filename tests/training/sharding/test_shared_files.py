"""Files that several processes write: shards and plain models, against the whole model; failures; memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import shard_writers
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_grow.checkpoint.reader import open_folder
from hf_grow.errors import SourceError
from hf_grow.model.meta_model import meta_model
from hf_grow.training.sharding import merge_shards
from hf_grow.training.sharding.shard_files import ShardRows, can_write_shards, write_shards
from hf_grow.training.sharding.sharded_model import held_tensors
from hf_grow.training.trainer.weights import load_weights

CASES = ("llama-tied", "mixtral")


def assert_same_model(folder: Path, expected: Any, half: bool = False) -> None:
    loaded, loading = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(loading[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    found = dict(loaded.named_parameters())
    for name, p in expected.named_parameters():
        assert torch.equal(found[name], p.bfloat16().float() if half and "norm" not in name else p), name


def check(tmp_path: Path, processes: int, half: bool) -> None:
    shard_writers.spawn(shard_writers.write, processes, str(tmp_path), CASES, half)
    for case in CASES:
        whole = shard_writers.drawn(case)
        for kind in ("", "column-"):
            folder = tmp_path / f"{kind}{case}"
            assert len(json.loads((folder / "plain" / "model.safetensors.index.json").read_text())["weight_map"]) > 10
            assert_same_model(folder / "plain", whole, half)
            merge_shards.merge_shards(folder / "checkpoint", folder / "merged")
            assert_same_model(folder / "merged", whole)
            again = shard_writers.drawn(case)
            with torch.no_grad():
                for p in again.parameters():
                    p.zero_()
            load_weights(again, folder / "checkpoint")
            assert all(torch.equal(p, q) for p, q in zip(again.parameters(), whole.parameters(), strict=True))


def test_two_processes_write_what_one_model_holds(tmp_path: Path) -> None:
    """Experts that are fused in memory, tied heads, cuts of rows and of columns; in another dtype."""
    check(tmp_path, 2, half=True)


@pytest.mark.slow
def test_four_processes_write_what_one_model_holds(tmp_path: Path) -> None:
    check(tmp_path, 4, half=False)


@pytest.mark.slow
def test_one_process_that_fails_stops_all_and_leaves_no_model(tmp_path: Path) -> None:
    shard_writers.spawn(shard_writers.fail, 2, str(tmp_path))
    assert {p.name for p in tmp_path.iterdir()} == {"said-0", "said-1", "model.safetensors"}
    shard_writers.drawn("llama").config.save_pretrained(tmp_path)
    with pytest.raises(SourceError):
        open_folder(tmp_path)


@pytest.mark.slow
def test_incomplete_shards_fail(tmp_path: Path) -> None:
    shard_writers.spawn(shard_writers.write, 2, str(tmp_path), ("llama-tied",), False)
    checkpoint = tmp_path / "llama-tied" / "checkpoint"
    with pytest.raises(SourceError, match="hf-grow merge"):
        open_folder(checkpoint)
    for rank in (1, 2):
        broken = tmp_path / f"without-{rank}"
        shutil.copytree(checkpoint, broken)
        next((broken / "weights").glob(f"shard-0000{rank}-*")).unlink()
        with pytest.raises(SourceError):
            merge_shards.merge_shards(broken, tmp_path / f"out-{rank}")
        assert not (tmp_path / f"out-{rank}").exists()


@pytest.mark.slow
def test_memory_of_writing_and_reading_shards(tmp_path: Path) -> None:
    """24 tensors of 4 MB on two processes, two MB of each in a process, in files of 8 MB."""
    shard_writers.spawn(shard_writers.measure, 2, str(tmp_path))
    assert len(ShardRows(tmp_path / "shards").names()) == 24
    local_shards = 4 * shard_writers.LARGE // 2
    for rank in range(2):
        assert int((tmp_path / f"grown-{rank}").read_text()) < local_shards


def sharded_checkpoint(folder: Path, model: Any) -> Path:
    """What one process writes of a model."""
    write_shards(folder / "weights", held_tensors(model))
    model.config.save_pretrained(folder)
    return folder


def test_merge_into_a_dtype_that_overflows_fails(tmp_path: Path) -> None:
    model = shard_writers.drawn("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = 1e5
    checkpoint = sharded_checkpoint(tmp_path / "checkpoint", model)
    with pytest.raises(SourceError, match=r"layers\.1\.mlp\.up_proj\.weight has values that float16 cannot hold") as raised:
        merge_shards.merge_shards(checkpoint, tmp_path / "half", dtype="float16")
    assert "bfloat16" in raised.value.hint and not (tmp_path / "half").exists()
    merge_shards.merge_shards(checkpoint, tmp_path / "brain", dtype="bfloat16")
    with torch.no_grad():  # what was infinite already is kept
        model.model.layers[1].mlp.up_proj.weight[3, 5] = torch.inf
    merge_shards.merge_shards(sharded_checkpoint(tmp_path / "infinite", model), tmp_path / "kept", dtype="float16")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "kept")
    assert loaded.dtype == torch.float16 and int(loaded.model.layers[1].mlp.up_proj.weight.isinf().sum()) == 1


def test_merge_casts_parameters_and_no_buffers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_buffer(config: Any) -> Any:
        made = meta_model(config)
        made.model.register_buffer("bias", torch.empty(3, device="meta"))
        return made

    model = shard_writers.drawn("llama")
    model.model.register_buffer("bias", torch.tensor([1e5, 1.0001, 0.0]))
    checkpoint = sharded_checkpoint(tmp_path / "checkpoint", model)
    monkeypatch.setattr(merge_shards, "meta_model", with_buffer)
    merge_shards.merge_shards(checkpoint, tmp_path / "half", dtype="float16")
    merged = load_file(tmp_path / "half" / "model.safetensors")
    assert torch.equal(merged.pop("model.bias"), model.model.bias)
    assert {t.dtype for t in merged.values()} == {torch.float16}


def test_a_torch_without_the_writer_of_shards_is_told_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.checkpoint import hf_storage

    class Older:
        def __init__(self, path: str) -> None: ...

    assert can_write_shards()
    monkeypatch.setattr(hf_storage, "HuggingFaceStorageWriter", Older)
    assert not can_write_shards()
    monkeypatch.delattr(hf_storage, "HuggingFaceStorageWriter")
    assert not can_write_shards()
