"""State files of a checkpoint: without tensors, truncated, of another form; an error of one process of several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import BY_NAME, make, save
from torch import distributed

from hf_grow import api
from hf_grow.checkpoint.torch_files import SubclassTensor
from hf_grow.errors import ExecutionError, SourceError
from hf_grow.training.growth_state.grow_optimizer import grow_trainer_state
from hf_grow.training.growth_state.optimizer_state import MemoryTensor, OptimizerState
from hf_grow.training.growth_state.resume import load_named, load_optimizer, load_optimizer_and_scheduler
from hf_grow.training.growth_state.sharded_state import sharded_state
from hf_grow.training.growth_state.state_files import read_torch_state
from hf_grow.training.sharding.collective import on_every_process
from hf_grow.training.trainer.checkpointing import write_json


def sgd(model: Any, **options: Any) -> torch.optim.SGD:
    """After one step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, **options)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("folder", ["missing", "empty"])
def test_optimizer_without_tensors_is_resumed_and_reset(folder: str, tmp_path: Path) -> None:
    model = make(BY_NAME["llama"])
    save(model, tmp_path)
    tensors, record = sharded_state(model, sgd(model))
    assert not tensors
    write_json(tmp_path / "optimizer.json", record)
    if folder == "empty":
        (tmp_path / "optimizer").mkdir()
    fresh = torch.optim.SGD(model.parameters(), lr=0.5)
    load_optimizer(tmp_path / "optimizer.json", model, fresh)
    assert fresh.param_groups[0]["lr"] == 0.1
    (tmp_path / "out").mkdir()
    grow_trainer_state(tmp_path, tmp_path / "out", api.plan(model, "stack"), "reset")
    grown = torch.load(tmp_path / "out" / "optimizer.bin", weights_only=True)
    assert grown["state"] == {} and grown["param_groups"][0]["lr"] == 0.1
    with pytest.raises(SourceError, match="empty"):
        grow_trainer_state(tmp_path, tmp_path / "out", api.plan(model, "stack"), "map")


def test_lost_tensors_of_a_sharded_optimizer_fail(tmp_path: Path) -> None:
    model = make(BY_NAME["llama"])
    optimizer = sgd(model, momentum=0.9)
    tensors, record = sharded_state(model, optimizer)
    assert tensors
    write_json(tmp_path / "optimizer.json", record)
    with pytest.raises(SourceError, match=f"holds 0 of the {len(tensors)} tensors"):
        load_optimizer(tmp_path / "optimizer.json", model, optimizer)


def test_quantized_state_of_a_sharded_parameter_fails() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.ones(4, 2))

    model = Model()
    model.w.placements = ()  # type: ignore[assignment]
    quantized = SubclassTensor(torch.Tensor, {"codes": MemoryTensor(torch.ones(8))}, None, (4, 2), torch.float32)
    optimizer = torch.optim.AdamW(model.parameters())
    groups = [{**optimizer.param_groups[0], "params": ["w"]}]
    with pytest.raises(SourceError, match="exp_avg of w is a Tensor, which cannot be sharded"):
        load_named(OptimizerState(groups, {"w": {"exp_avg": quantized}}), model, optimizer, Path("optimizer.json"))


@pytest.mark.parametrize("content", ["truncated", "empty", "garbage", "list"])
def test_damaged_torch_file_fails(content: str, tmp_path: Path) -> None:
    path = tmp_path / "scheduler.pt"
    torch.save([1] if content == "list" else {"last_epoch": 3, "t": torch.ones(100)}, path)
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "garbage": b"garbage", "list": whole}[content])
    for mmap in (False, True):
        with pytest.raises(SourceError, match=r"scheduler\.pt is damaged") as raised:
            read_torch_state(path, mmap=mmap)
        assert "earlier" in raised.value.hint
    model = make(BY_NAME["llama"])
    with pytest.raises(SourceError, match="is damaged"):
        load_optimizer_and_scheduler(tmp_path, model, torch.optim.SGD(model.parameters(), lr=1), None, frozenset())


def test_any_error_reaches_the_other_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sent: list[Any] = []

    def gather(found: list[Any], own: Any) -> None:
        sent.append(own)
        found[:] = [own, others]

    others: Any = None
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_gather_object", gather)
    with pytest.raises(KeyError, match="lost"), on_every_process(tmp_path):
        raise KeyError("lost")
    others = sent[0]
    assert "KeyError" in json.dumps(others)
    with pytest.raises(ExecutionError, match="Another process failed: KeyError: 'lost'"), on_every_process(tmp_path):
        pass
