"""The ledger: exact sums by purpose, of several processes, in checkpoints, through a rollback; batches as the attention kernels see them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import BY_NAME
from trained import ROLLBACK_OPTIONS, grown, recipe, run, with_spike
from two_processes import model as grown_in_fp64
from two_processes import together

from hf_grow.model.flops import causal_pairs, count_flops, six_nd
from hf_grow.training.trainer.events import EVENTS_FILE, read_events
from hf_grow.training.trainer.ledger import Ledger, TrainerFlops, batch_of


def spent(ledger: Ledger, processes: int = 1) -> dict[str, int]:
    ledger.collect(lambda counts: [processes * n for n in counts])
    return ledger.by_purpose()


def test_sums_are_exact_and_go_through_json() -> None:
    ledger, large = Ledger(), 2**70 + 1
    for _ in range(3):
        ledger.add("train", large, tokens=7)
    assert ledger.total == 0, "nothing is known of other processes before"
    assert spent(ledger, 2) == {"train": 6 * large}
    assert spent(ledger, 2) == {"train": 6 * large}, "added once"
    ledger.add("teacher", 5)
    ledger.add("evaluation", 3)
    spent(ledger)
    assert (ledger.training, ledger.total) == (6 * large + 5, 6 * large + 8)
    assert ledger.by_purpose("tokens") == {"train": 42}
    again = Ledger()
    again.load(json.loads(json.dumps(ledger.to_json())))
    assert again.to_json() == ledger.to_json()
    older = Ledger()
    older.load({"flops": {"train": 2, "growth": 0}, "bytes": {"growth": 20}, "milliseconds": {"growth": 8}})
    assert older.to_json() == {"flops": {"train": 2}}, "states of earlier versions"


def test_loading_keeps_what_this_process_added_since() -> None:
    ledger = Ledger()
    ledger.add("evaluation", 3)
    ledger.load({"flops": {"train": 10}})
    assert spent(ledger) == {"train": 10, "evaluation": 3}


def test_a_rollback_discards_what_was_spent() -> None:
    ledger = Ledger()
    ledger.add("train", 10, tokens=2)
    spent(ledger)
    saved = ledger.to_json()
    ledger.add("train", 5, tokens=1)
    ledger.add("recompute", 1)
    spent(ledger)
    ledger.roll_back(saved)
    assert (ledger.by_purpose(), ledger.by_purpose("tokens")) == ({"train": 10, "discarded": 6}, {"train": 2, "discarded": 1})
    assert ledger.total == 16
    ledger.roll_back(saved)
    assert ledger.by_purpose() == {"train": 10, "discarded": 6}, "nothing since"


@pytest.mark.parametrize("window", [None, 3])
def test_kernels_that_skip_masked_scores(window: int | None) -> None:
    """Each position of a document attends to those before it and to itself, in the window; a mask is made and counted here."""
    lengths = [[5, 2, 1], [8]]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    documents = torch.stack([torch.cat([torch.full((n,), i) for i, n in enumerate(row)]) for row in lengths])
    q, k = torch.arange(8)[:, None], torch.arange(8)[None]
    allowed = (documents[:, :, None] == documents[:, None]) & (k <= q) & (q - k < (window or 8))
    inputs: dict[str, Any] = {"input_ids": torch.zeros(2, 8, dtype=torch.int64), "position_ids": positions}
    found = batch_of(inputs, "flash_attention_2", frozenset({window}))
    assert (found.tokens, int(found.pairs[window])) == (16, int(allowed.sum()))
    assert int(allowed.sum()) == sum(causal_pairs(n, window) for row in lengths for n in row)
    for attention in ("sdpa", "eager"):
        assert batch_of(inputs, attention, frozenset({window})).pairs == {window: 2 * 8 * 8}
    del inputs["position_ids"]
    assert batch_of(inputs, "flex_attention", frozenset({window})).pairs == {window: 2 * causal_pairs(8, window)}
    inputs["attention_mask"] = torch.tensor([[1] * 5 + [0] * 3, [0] * 4 + [1] * 4])
    padded = batch_of(inputs, "flash_attention_2", frozenset({window}))
    assert (padded.tokens, int(padded.pairs[window])) == (16, causal_pairs(5, window) + causal_pairs(4, window))


def test_teachers_are_booked_beside_the_training() -> None:
    flops = count_flops(BY_NAME["qwen2-window"].config)
    ledger, costs = Ledger(), TrainerFlops(flops, "sdpa", flops.forward * 2)
    batch = costs.batch({"input_ids": torch.zeros(2, 8)})
    costs.spend(ledger, batch, batch)
    forward = flops.forward.rows(2, 8)
    assert spent(ledger) == {"train": 3 * forward, "teacher": 2 * forward, "evaluation": forward}
    assert ledger.training == costs.training(batch) == 5 * forward
    assert ledger.by_purpose("tokens") == {"train": 16, "teacher": 16, "evaluation": 16}


def test_six_nd() -> None:
    """Near the count where the head and attention are small beside the blocks."""
    assert six_nd(1000, 7) == 42_000
    config = BY_NAME["llama"].config | {"hidden_size": 1152, "intermediate_size": 4096, "vocab_size": 8, "head_dim": 192}
    blocks = 4 * (1152 * 192 * (6 + 2 + 2 + 6) + 3 * 1152 * 4096)
    assert count_flops(config).train.rows(1, 16) == pytest.approx(six_nd(16, blocks), rel=0.01)


def test_a_resumed_run_spent_what_an_uninterrupted_one_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = grown(tmp_path)
    path = recipe(tmp_path, model, train="new", distill={})
    whole = run(capsys, "train", path, "-o", tmp_path / "whole")
    saved = json.loads((tmp_path / "whole" / "checkpoint-3" / "growth_state.json").read_text())["ledger"]
    assert saved["flops"]["train"] + saved["flops"]["teacher"] == whole["flops"] // 2
    assert saved["tokens"]["train"] == 3 * 2 * 16
    # The second half alone, from the first one's checkpoint.
    (tmp_path / "half").mkdir()
    run(capsys, "train", path, "-o", tmp_path / "half", "--overwrite", "--resume_from_checkpoint", tmp_path / "whole" / "checkpoint-3")
    assert json.loads((tmp_path / "half" / "training.json").read_text())["result"]["flops"] == whole["flops"]


def test_two_processes_spend_what_one_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, grown_in_fp64(tmp_path), train="new", distill={})
    one = run(capsys, "train", path, "-o", tmp_path / "one")
    together("ddp", path, tmp_path / "two")
    two = json.loads((tmp_path / "two" / "training.json").read_text())["result"]
    assert (two["flops"], two["flops_by_purpose"]) == (one["flops"], one["flops_by_purpose"])
    logs = [[e["flops_by_purpose"] for e in read_events(tmp_path / n / EVENTS_FILE) if e["event"] == "log"] for n in ("one", "two")]
    assert logs[0] == logs[1] and len(logs[0]) == 6


def test_a_rollback_of_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A spike at step 6 goes back to the checkpoint of step 4."""
    with_spike(monkeypatch, at=6)
    path = recipe(tmp_path, grown(tmp_path), max_steps=10, save_steps=4, monitor=ROLLBACK_OPTIONS, learning_rate=1e-3)
    found = run(capsys, "train", path)
    monkeypatch.undo()
    plain = run(capsys, "train", path, "-o", tmp_path / "plain")["flops_by_purpose"]
    assert found["flops"] == plain["train"]
    once = plain["evaluation"] // 5  # at steps 0, 3, 6, 9 and 10; the way from step 4 begins with one more
    wanted = {"evaluation": 6 * once, "discarded": (plain["train"] + plain["recompute"]) // 10 * 2}
    assert found["flops_by_purpose"] == plain | wanted


def test_sampling_is_booked_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second run finds the samples."""
    changes: dict[str, Any] = {
        "data": {"replay": {"self": {"tokens": 400, "max_length": 24, "batch_size": 8, "min_tokens": 4, "max_surprise": 9.0}, "share": 0.5}}
    }
    path = recipe(tmp_path, grown(tmp_path), **changes)
    first = run(capsys, "train", path, "-o", tmp_path / "first")["flops_by_purpose"]
    second = run(capsys, "train", path, "-o", tmp_path / "second")["flops_by_purpose"]
    assert first["sampling"] > 0
    assert second == {k: v for k, v in first.items() if k != "sampling"}
