"""Teachers and the source as baseline in shards: the numbers of one process, and less memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch.multiprocessing as mp
from models import BY_NAME, make, save
from sharded import free_port
from sharded_teacher import measure
from trained import logged, recipe, run, tokenizer
from two_processes import assert_same_weights, model, together

from hf_grow.training.trainer.events import read_events

LARGE_EPSILON = {"adam_epsilon": 1e-2}


def measured(out: Path) -> list[float]:
    """All losses, of the training and of the sets, forgetting and KL."""
    events = list(read_events(out / "events.jsonl"))
    numbers = [
        [*e["losses"].values(), e.get("kl", 0.0), e.get("forgetting", 0.0)] for e in events if e["event"] in ("evaluation", "baseline")
    ]
    return [*logged(out).values(), *(n for row in numbers for n in row)]


@pytest.mark.slow
@pytest.mark.parametrize(("how", "shard"), [("fsdp2", None), ("fsdp2", False), ("ddp", True)])
def test_sharded_teachers_give_the_losses_of_one_process(
    how: str, shard: bool | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grown = model(tmp_path)
    other = save(make(BY_NAME["llama-tied"], num_hidden_layers=3, seed=4).double(), tmp_path / "other")
    teachers = {"teachers": [{"model": "source"}, {"model": str(other), "weight": 2.0}], "temperature": 2.0}
    settings = {"monitor": {"baseline": "source"}, "kl_rows": 2, "gradient_accumulation_steps": 2, **LARGE_EPSILON}
    together(how, recipe(tmp_path, grown, distill={**teachers, "shard": shard}, **settings), tmp_path / "together")
    run(capsys, "train", recipe(tmp_path, grown, distill=teachers, **settings))
    assert measured(tmp_path / "together") == pytest.approx(measured(tmp_path / "out"), abs=2e-6)  # Trainer adds losses up in fp32
    assert_same_weights(tmp_path / "out", tmp_path / "together", 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
@pytest.mark.parametrize("case", ["llama", "llama-tied"])
def test_chunked_loss_on_two_processes(case: str, how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Gradients of the head, tied or not, are reduced as always: the weights of one process, and of the loss over all logits."""
    old = save(make(BY_NAME[case], num_hidden_layers=2).double(), tmp_path / "source")
    tokenizer().save_pretrained(old)
    settings = {
        "gradient_accumulation_steps": 2,
        "distill": {"teachers": [{"model": str(old)}]},
        "gradient_checkpointing": True,
        **LARGE_EPSILON,
    }
    path = recipe(tmp_path, old, **settings)
    together(how, path, tmp_path / "together")
    run(capsys, "train", path)
    assert_same_weights(tmp_path / "out", tmp_path / "together", 1e-9)
    run(capsys, "train", recipe(tmp_path, old, **settings, chunked_loss=False), "-o", tmp_path / "whole")
    assert_same_weights(tmp_path / "out", tmp_path / "whole", 1e-5)  # transformers computes cross entropy in fp32


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="peak memory is told by /proc")
def test_sharded_teacher_holds_its_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes; logits bit for bit those of a whole teacher, at less memory: half of the weights and the largest unit."""
    folder = save(make(BY_NAME["llama"], hidden_size=768, intermediate_size=1024, num_hidden_layers=8, vocab_size=4096), tmp_path / "t")
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "200000")  # else glibc keeps what is freed
    small = save(make(BY_NAME["llama"], num_hidden_layers=2), tmp_path / "small")
    found: dict[bool, list[dict[str, Any]]] = {}
    for sharded in (False, True):
        mp.spawn(measure, args=(2, free_port(), str(small), str(folder), sharded, str(tmp_path)), nprocs=2)
        found[sharded] = [measured_by(tmp_path, rank) for rank in range(2)]
    whole = found[False][0]
    for facts in found[True]:
        assert facts["logits"] == whole["logits"]
        assert facts["held"] <= 0.51 * whole["held"]
        assert facts["peak"] < 0.75 * whole["peak"]


def measured_by(folder: Path, rank: int) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((folder / f"teacher-{rank}.json").read_text())
    return facts


def test_sharding_teachers_needs_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = run(capsys, "train", recipe(tmp_path, model(tmp_path), distill={"shard": True}), status=2)["error"]
    assert "distill.shard: needs several processes" in said
