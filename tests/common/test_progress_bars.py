"""Progress bars on a terminal of 80 columns: how far and how long yet stay readable, in one line."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from rich.progress import DownloadColumn, MofNCompleteColumn, TransferSpeedColumn

from hf_grow.cli import render
from hf_grow.common import progress_bars as bars
from hf_grow.common.progress_bars import progress_bar
from hf_grow.training.trainer import progress as training

LONG = "loss 2.3141  tok/s 123,456  spent 61.2 PFLOP  old 3.2310  new 1.8876  forgetting +0.0123  KL 0.0456"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def console(width: int = 80) -> Console:
    return Console(file=Terminal(), force_terminal=True, width=width, color_system=None, legacy_windows=False)


def lines(found: Any) -> list[str]:
    """What stands on the screen as lines of text."""
    return [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in re.split(r"[\r\n]+", found.file.getvalue()) if line.strip("\r\n ")]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_steps_and_time_left_stay_whatever_the_facts(width: int) -> None:
    terminal = console(width)
    with progress_bar(terminal, MofNCompleteColumn, details=True) as drawn:
        task = drawn.add_task("training", total=123_456, completed=1_234, details=LONG)
        drawn.update(task, completed=123_000, details=LONG)
    drawn_lines = [line for line in lines(terminal) if "training" in line]
    assert drawn_lines
    for line in drawn_lines:
        assert len(line.rstrip()) <= width
        assert re.search(r"\d+/123456 ", line)
        assert re.search(r"-:--:--|\d+:\d\d:\d\d", line)
        assert "loss 2.3" in line


def test_bytes_keep_their_time_left_at_80_columns() -> None:
    terminal = console()
    with progress_bar(terminal, DownloadColumn, TransferSpeedColumn) as drawn:
        drawn.add_task("checking and sending", total=21_500_000_000, completed=10_000_000_000)
    for line in [line for line in lines(terminal) if "checking" in line]:
        assert len(line.rstrip()) <= 80
        assert "checking and sending" in line
        assert "10.0/21.5 GB" in line
        assert "-:--:--" in line


def state(step: int = 0) -> Any:
    return SimpleNamespace(global_step=step, max_steps=2000, is_world_process_zero=True, total_flos=1e15)


def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> Console:
    terminal = console()
    monkeypatch.setattr("sys.stderr", terminal.file)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("rich.console.Console", lambda **options: terminal)
    return terminal


def test_the_first_evaluation_is_seen_while_it_runs_and_its_result_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first step, and after the last one too; nothing of a bar is left running."""
    terminal = on_a_terminal(monkeypatch)
    shown = training.Progress(1024, lambda line: None)
    loader = list(range(40))
    for ended in (False, True):
        if ended:
            shown.on_train_begin(None, state(), None)
            shown.on_train_end(None, state(2000), None)
        for _ in loader:
            shown.on_prediction_step(None, state(), None, eval_dataloader=loader)
        assert shown.bar is not None
        shown.bar.refresh()
        assert any("evaluating" in line and "40/40" in line for line in lines(terminal))
        shown.on_evaluate(None, state(), None)
        if not ended:
            shown.show_evaluation(state(), {"eval_old_loss": 3.25})
            assert any(line.startswith("step 0/2000  old 3.25") for line in lines(terminal))
        terminal.file.truncate(0)
    assert shown.bar is None


def test_without_a_terminal_an_evaluation_says_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "LOG_INTERVAL", 0.0)
    said: list[str] = []
    shown = training.Progress(1024, said.append)
    for _ in range(2):
        shown.on_prediction_step(None, state(), None, eval_dataloader=[1, 2, 3])
    assert said == ["evaluating: batch 1 of 3", "evaluating: batch 2 of 3"]


def test_a_log_repeats_no_evaluation_as_if_it_were_of_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines say what is new; the bar also what the last evaluation found, and at which step."""
    said: list[str] = []
    shown = training.Progress(1024, said.append)
    shown.show_evaluation(state(), {"eval_old_loss": 3.25, "eval_forgetting": 0.0})
    shown.on_log(None, state(10), None, {"loss": 2.5})
    assert said[0] == "step 0/2000  old 3.25  forgetting +0.0000"
    assert said[1].startswith("step 10/2000  loss 2.5  tok/s ")
    assert "old" not in said[1]
    terminal = on_a_terminal(monkeypatch)
    shown = training.Progress(1024, said.append)
    drawn: list[str] = []
    shown.on_train_begin(None, state(), None)
    monkeypatch.setattr(shown.bar, "update", lambda task, details="", **more: drawn.append(details))
    shown.show_evaluation(state(), {"eval_old_loss": 3.25})
    shown.on_log(None, state(10), None, {"loss": 2.5})
    shown.on_train_end(None, state(10), None)
    assert drawn[0] == "old 3.25"
    assert drawn[1].startswith("loss 2.5") and drawn[1].endswith("  at step 0: old 3.25")
    assert not any("step 10/2000" in line for line in lines(terminal))


def test_tokens_a_second_are_of_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither evaluations nor checkpoints, before, between or after steps, count as time."""
    now = [0.0]
    monkeypatch.setattr(training.time, "perf_counter", lambda: now[0])
    said: list[str] = []
    shown = training.Progress(1000, said.append)

    def passes(seconds: float) -> None:
        now[0] += seconds

    shown.on_train_begin(None, state(), None)
    passes(100)
    shown.on_evaluate(None, state(), None)
    passes(5)
    shown.show_evaluation(state(), {})
    for step in (1, 2):
        passes(2)
        shown.on_step_end(None, state(step), None)
        passes(50)
        shown.on_save(None, state(step), None)
    shown.on_log(None, state(2), None, {"loss": 2.5})
    assert "tok/s 500 " in said[-1]


def test_sampling_is_seen_while_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = console()
    monkeypatch.setattr("sys.stderr", terminal.file)
    monkeypatch.setattr(render, "notes", terminal)
    with render.tokens_bar("sampling", 2_000_000, quiet=False) as progress:
        progress(500_000)
    found = [line for line in lines(terminal) if "sampling, tokens" in line]
    assert any("500000/2000000" in line for line in found)
    assert all(len(line.rstrip()) <= 80 for line in found)


def test_a_batch_that_takes_long_is_seen_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the tokens that are kept, until there are more of them."""
    terminal = console()
    monkeypatch.setattr("sys.stderr", terminal.file)
    monkeypatch.setattr(render, "notes", terminal)
    with bars.token_progress("sampling", 2_000_000, console=terminal, note=pytest.fail) as progress:
        progress(0)
        progress.within(300, 1024)
        progress.drawn.refresh()
        assert any("this batch" in line and "300/1024" in line for line in lines(terminal))
        progress(20_000)
        terminal.file.truncate(0)
        progress.drawn.refresh()
        assert not any("this batch" in line for line in lines(terminal))
    said: list[str] = []
    monkeypatch.setattr("sys.stderr", io.StringIO())
    monkeypatch.setattr(bars, "LOG_INTERVAL", 0.0)
    with bars.token_progress("sampling", 2_000_000, note=said.append) as progress:
        progress(500)
        progress.within(300, 1024)
    assert said == ["sampling: 500 of 2,000,000 tokens", "sampling: 500 of 2,000,000 tokens; this batch: token 300 of at most 1,024"]


def test_publishing_is_one_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = console()
    monkeypatch.setattr("sys.stderr", terminal.file)
    monkeypatch.setattr(render, "notes", terminal)
    with render.bytes_bar("checking", 3_000_000, quiet=False, then="sending") as progress:
        for _ in range(30):
            progress(100_000)
    found = lines(terminal)
    assert any(line.startswith("sending") for line in found)
    assert all(len(line.rstrip()) <= 80 for line in found)
    assert "\n" not in terminal.file.getvalue().rstrip("\r\n\x1b[0123456789;?lhAK")  # drawn over itself


def test_uploads_draw_no_bars_of_the_library() -> None:
    import inspect

    from hf_grow.publish import push, stream

    for module in (push, stream):
        code = inspect.getsource(module)
        assert "progress_bars_disabled()" in code
        assert " progress_bars()" not in code
