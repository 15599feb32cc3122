"""The monitor on plain numbers, and its reactions in the trainer."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trained import ROLLBACK_OPTIONS, grown, logged, override_eval_loss, recipe, run, source, with_spike

from hf_grow.training.config.monitor_options import MonitorOptions
from hf_grow.training.trainer.checkpointing import last_checkpoint
from hf_grow.training.trainer.events import EVENTS, EventLog, read_events
from hf_grow.training.trainer.monitor import Finding, Monitor, detrended, robust_z


def falling_loss(steps: int, seed: int = 0, noise: float = 0.05) -> list[float]:
    """An exponentially falling loss with noise."""
    draw = random.Random(seed)
    return [2 + 3 * math.exp(-t / 200) + draw.gauss(0, noise) for t in range(steps)]


def run_monitor(losses: list[float], norms: list[float] | None = None, **options: Any) -> tuple[Monitor, list[tuple[int, Finding]]]:
    monitor = Monitor(MonitorOptions(**options))
    found = []
    for t, loss in enumerate(losses):
        found += [(t, f) for f in monitor.step(t, loss, norms[t] if norms else None)]
    return monitor, found


@pytest.mark.parametrize("seed", range(8))
def test_normal_run_reports_no_instability(seed: int) -> None:
    draw = random.Random(seed)
    norms = [math.exp(draw.gauss(0, 0.3)) for _ in range(1500)]
    assert run_monitor(falling_loss(1500, seed), norms)[1] == []


@pytest.mark.parametrize(("at", "height"), [(100, 2.0), (700, 1.0)])
def test_loss_spike_is_reported_once_at_its_step(at: int, height: float) -> None:
    losses = falling_loss(1000)
    losses[at] += height
    losses[at + 1] += height / 2
    _, found = run_monitor(losses)
    assert [(t, f.event, f.facts["signal"]) for t, f in found] == [(at, "instability", "loss")]
    past = np.array(losses[at - 64 : at])
    slope = (np.median(past[32:]) - np.median(past[:32])) / 32
    flat = past - slope * np.arange(64)
    level = np.median(flat)
    spread = 1.4826 * np.median(np.abs(flat - level))
    expected = level + 64 * slope
    assert found[0][1].facts["score"] == pytest.approx((losses[at] - expected) / max(spread, 0.01 * expected))


def test_grad_norm_spike_is_reported() -> None:
    norms = [1 + 0.1 * random.Random(t).random() for t in range(200)]
    norms[150] = 40.0
    _, found = run_monitor(falling_loss(200), norms)
    assert [(t, f.facts["signal"]) for t, f in found] == [(150, "grad_norm")]


def test_nonfinite_values_are_an_instability_from_the_first_step() -> None:
    for bad in (math.nan, math.inf):
        assert [f.facts["signal"] for _, f in run_monitor([bad])[1]] == ["nonfinite"]
        assert run_monitor([3.0, 3.0], [1.0, bad])[1][0][1].facts["of"] == "grad_norm"


def test_growing_variance_is_an_instability() -> None:
    losses = [2 + 0.01 * random.Random(t).gauss(0, 1) for t in range(100)]
    losses += [2 + 0.15 * (-1) ** t * min(1, t / 4) for t in range(30)]
    _, found = run_monitor(losses, threshold=1000.0)
    assert found and found[0][1].facts["signal"] == "variance"
    assert 100 < found[0][0] < 120


def test_transition_shock_and_recovery_after_growth() -> None:
    monitor = Monitor(MonitorOptions(shock=0.5), before=2.0)
    events = [(t, f.event, f.facts) for t in range(60) for f in monitor.step(t, 2 + 1.2 * math.exp(-t / 8) - 0.01, None)]
    assert next((t, e) for t, e, _ in events) == (0, "transition_shock")
    assert events[0][2]["nats"] == pytest.approx(1.19)
    (at,) = [t for t, e, _ in events if e == "recovered"]
    curve = [2 + 1.2 * math.exp(-t / 8) - 0.01 for t in range(60)]
    assert sum(curve[at - 7 : at + 1]) / 8 <= 2.0 < sum(curve[at - 8 : at]) / 8


def test_reactions_accumulate_up_to_max_reactions() -> None:
    lower = Monitor(MonitorOptions(on_instability="lower_lr", max_reactions=2))
    assert [lower.react(t, None).facts["lr_factor"] for t in range(3)] == [0.5, 0.25, 0.25]
    assert lower.react(9, None).facts["action"] == "none"
    longer = Monitor(MonitorOptions(on_instability="longer_warmup", extra_warmup=10))
    assert longer.react(4, None).facts["extra_warmup"] == 10
    assert longer.warmup_from == 5
    back = Monitor(MonitorOptions(on_instability="rollback"))
    rolled = {"action": "rollback", "lr_factor": 0.5, "extra_warmup": 0, "checkpoint": "checkpoint-3", "skipped": 2}
    assert back.react(4, "checkpoint-3", 2).facts == rolled
    assert back.react(4, None).facts["action"] == "lower_lr"


def test_monitor_state_round_trips_through_json() -> None:
    losses = falling_loss(300)
    losses[250] += 2
    one = Monitor(MonitorOptions(on_instability="lower_lr"), before=9.0)
    for t in range(200):
        one.step(t, losses[t], losses[t])
    one.react(200, None)
    other = Monitor(one.options)
    other.load(json.loads(json.dumps(one.state())))
    for t in range(200, 300):
        assert one.step(t, losses[t], losses[t]) == other.step(t, losses[t], losses[t])
    assert one.state() == other.state()


def test_robust_z_and_detrended() -> None:
    assert robust_z(2.0, [2.0] * 9) == 0
    assert robust_z(3.0, [2.0] * 9) == pytest.approx(1 / 0.02)
    assert robust_z(10.0, [float(t) for t in range(10)]) == pytest.approx(0, abs=1e-9)
    assert detrended([3.0, 2.0, 1.0, 0.0]) == pytest.approx([0, 0, 0, 0], abs=1e-12)


def test_event_log_has_one_line_per_event_and_skips_torn_lines(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.write("instability", 3, signal="nonfinite", value=math.nan, score=math.inf)
    log.write("phase", 4, train=("new",))
    with (tmp_path / "events.jsonl").open("a") as f:
        f.write('{"event": "lo')
    first, second = read_events(tmp_path / "events.jsonl")
    assert (first["value"], first["score"], second["train"]) == ("nan", "inf", ["new"])
    with pytest.raises(AssertionError):
        log.write("unknown", 1)
    EventLog(None).write("phase", 1, train=[])


def test_important_events_are_notified_up_to_a_limit(tmp_path: Path) -> None:
    notified: list[str] = []
    log = EventLog(tmp_path / "events.jsonl", notified.append)
    log.write("log", 1, loss=2.0)
    log.write("reaction", 1, action="none", lr_factor=1.0)
    log.write("reaction", 2, action="lower_lr", lr_factor=0.5)
    for step in range(3, 30):
        log.write("instability", step, signal="loss", value=9.5, score=20.0)
    assert notified[:2] == ["Step 2: lower_lr, learning rates x 0.5.", "Step 3: loss 9.5 is unstable."]
    assert len(notified) == 10 and "events.jsonl" in notified[-1]
    assert len(list(read_events(tmp_path / "events.jsonl"))) == 30


def test_docs_list_every_event_and_key() -> None:
    text = (Path(__file__).parents[3] / "docs" / "training.md").read_text()
    for kind, keys in EVENTS.items():
        assert f"| `{kind}` |" in text
        line = next(row for row in text.splitlines() if row.startswith(f"| `{kind}` |"))
        assert not [k for k in keys if k != "..." and f"`{k}`" not in line], kind


# ---- in the trainer -------------------------------------------------------------------------------------------------------------------------------


def test_rollback_resumes_from_checkpoint_with_lower_lr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = grown(tmp_path)
    path = recipe(tmp_path, model, max_steps=10, save_steps=4, monitor=ROLLBACK_OPTIONS, learning_rate=1e-3)
    run(capsys, "train", path, "-o", tmp_path / "calm")
    with_spike(monkeypatch, at=7)
    found = run(capsys, "train", path)
    out = tmp_path / "out"
    assert found["steps"] == 10
    events = list(read_events(out / "events.jsonl"))
    kinds = [e["event"] for e in events]
    reaction = events[kinds.index("reaction")]
    assert kinds[kinds.index("instability") + 1] == "reaction"
    assert (reaction["action"], reaction["lr_factor"], reaction["checkpoint"]) == ("rollback", 0.5, str(out / "checkpoint-4"))
    steps = [e["step"] for e in events if e["event"] == "log"]
    assert steps == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8, 9, 10]  # the step of the spike itself was not logged: it was undone at its end
    again = [e for e in events if e["event"] == "log"][6:]
    assert [e["lr_factor"] for e in again] == pytest.approx([0.5 + 0.5 * i / 100 for i in range(6)])
    assert again[0]["loss"] != logged(tmp_path / "calm")[5]  # other batches, see test_data_position.py


def test_rollback_is_recorded_in_its_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe(tmp_path, grown(tmp_path), max_steps=10, save_steps=4, monitor=ROLLBACK_OPTIONS)
    with_spike(monkeypatch, at=7)
    run(capsys, "train", path)
    out = tmp_path / "out"
    state = json.loads((out / "checkpoint-4" / "growth_state.json").read_text())["monitor"]
    assert (state["dip"], state["dipped_at"], state["reactions"]) == (0.5, 4, 1)
    assert last_checkpoint(out) == out / "checkpoint-10"


@pytest.mark.parametrize(("action", "key"), [("lower_lr", "lr_factor"), ("longer_warmup", "lr_factor_new")])
def test_lower_lr_and_longer_warmup_apply_from_the_next_step(
    action: str, key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**ROLLBACK_OPTIONS, "on_instability": action, **({"extra_warmup": 4} if action == "longer_warmup" else {})}
    path = recipe(tmp_path, grown(tmp_path), max_steps=10, monitor=options, learning_rate=1e-3)
    with_spike(monkeypatch, at=6)
    run(capsys, "train", path)
    factors = {e["step"]: e.get(key, 1.0) for e in read_events(tmp_path / "out" / "events.jsonl") if e["event"] == "log"}
    expected = [0.5] * 4 if action == "lower_lr" else [0.25, 0.5, 0.75, 1.0]
    assert [factors[s] for s in range(1, 7)] == [1.0] * 6
    assert [factors[s] for s in range(7, 11)] == expected


def test_regression_event_against_source_baseline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An old-domain loss above the source's is logged."""
    override_eval_loss(monkeypatch, "old", lambda step, loss: loss + {0: 0.0, 3: 0.5, 6: 0.1}[step])
    path = recipe(tmp_path, grown(tmp_path), learning_rate=1e-9, monitor={"baseline": "source", "regression": 0.2})
    run(capsys, "train", path)
    losses = {e["step"]: e["losses"]["old"] for e in read_events(tmp_path / "out" / "events.jsonl") if e["event"] == "evaluation"}
    events = [e for e in read_events(tmp_path / "out" / "events.jsonl") if e["event"] == "regression" and e["set"] == "old"]
    assert [e["step"] for e in events] == [3]
    assert events[-1]["loss"] == losses[events[-1]["step"]]
    assert events[-1]["baseline"] == pytest.approx(losses[0], abs=1e-5)


def test_growing_during_consolidation_warns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, source(tmp_path / "model"), max_steps=3, after_growth={"consolidate_steps": 100})
    run(capsys, "train", path)
    checkpoint = tmp_path / "out" / "checkpoint-3"
    from hf_grow.cli import main

    words = ["depth", str(checkpoint), "--method", "identity", "--layers-to", "4", "--with-optimizer", str(checkpoint)]
    assert main([*words, "-o", str(tmp_path / "soon")]) == 0
    assert "97 more steps" in capsys.readouterr().err
    state = checkpoint / "growth_state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "consolidation_left": 0}))
    assert main([*words, "-o", str(tmp_path / "later")]) == 0
    assert "more steps" not in capsys.readouterr().err
