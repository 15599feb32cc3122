"""Progress of a training: a bar on a terminal, one line per log elsewhere, with loss, tokens per second, FLOPs and forgetting."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import has_length

from hf_grow.common.progress_bars import LOG_INTERVAL, progress_bar


def format_flops(flops: float) -> str:
    """6.1e+15 -> '6.1 PFLOP'."""
    for unit, scale in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if flops >= scale:
            return f"{flops / scale:.3g} {unit}"
    return f"{flops / 1e6:.3g} MFLOP"


def _format_pairs(facts: dict[str, str]) -> str:
    return "  ".join(f"{name} {value}" for name, value in facts.items())


class Progress(TrainerCallback):  # type: ignore[misc]
    """Shows progress. `tokens_per_step`: over all processes; `show`: prints a line if there is no terminal."""

    def __init__(self, tokens_per_step: int, show: Callable[[str], None]) -> None:
        self.tokens_per_step, self.show = tokens_per_step, show
        self.facts: dict[str, str] = {}
        self.eval_results: dict[str, str] = {}
        """Results of the last evaluation, at step `self.evaluated_at`."""
        self.evaluated_at = 0
        self.train_seconds, self.started, self.first_step = 0.0, time.perf_counter(), 0
        """Seconds of training so far, start of the interval being timed, and first step that is timed."""
        self.bar: Any = None
        self.task: Any = None
        self.evaluation: Any = None
        self.batches, self.last_shown, self.ended = 0, time.monotonic(), False

    def _begin(self, state: Any) -> None:
        """Starts the bar, if there is a terminal: when training starts, or at an evaluation before it."""
        if self.bar is None and sys.stderr.isatty() and state.is_world_process_zero:
            from rich.console import Console
            from rich.progress import MofNCompleteColumn

            self.bar = progress_bar(Console(stderr=True), MofNCompleteColumn, details=True)
            self.task = self.bar.add_task("training", total=state.max_steps or None, completed=state.global_step, details="")
            self.bar.start()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.train_seconds, self.started, self.first_step = 0.0, time.perf_counter(), state.global_step
        self._begin(state)

    def on_prediction_step(self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any) -> None:
        """Shows the batch of an evaluation: large sets take minutes, and the first evaluation comes before any training."""
        if not state.is_world_process_zero:
            return
        self._begin(state)
        self.batches += 1
        total = len(eval_dataloader) if has_length(eval_dataloader) else None
        if self.bar is not None:
            if self.evaluation is None:
                self.evaluation = self.bar.add_task("evaluating", total=total, details="")
            self.bar.update(self.evaluation, completed=self.batches, total=total)
        elif time.monotonic() - self.last_shown >= LOG_INTERVAL:
            self.last_shown = time.monotonic()
            self.show(f"evaluating: batch {self.batches}" + (f" of {total}" if total else ""))

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.batches = 0
        if self.bar is not None and self.evaluation is not None:
            self.bar.remove_task(self.evaluation)
        self.evaluation, self.started = None, time.perf_counter()
        if self.ended:  # the final evaluation comes after the training
            self._close()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.train_seconds, self.started = self.train_seconds + time.perf_counter() - self.started, time.perf_counter()
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step, total=state.max_steps)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()  # checkpoints and evaluations do not count as training time

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not logs or not state.is_world_process_zero or "loss" not in logs:
            return
        done = (state.global_step - self.first_step) * self.tokens_per_step
        speed = done / max(self.train_seconds, 1e-9)
        self.facts = {"loss": f"{logs['loss']:.4g}", "tok/s": f"{speed:,.0f}", "spent": format_flops(state.total_flos)}
        if self.bar is None:
            self.show(self._line(state, self.facts))
        else:
            self._draw(state)

    def show_evaluation(self, state: Any, metrics: Mapping[str, float]) -> None:
        """Shows the results of all named sets; called by the trainer, because callbacks get one set at a time."""
        results = {k.removeprefix("eval_").removesuffix("_loss"): f"{v:.4g}" for k, v in metrics.items() if k.endswith("_loss")}
        if "eval_forgetting" in metrics:
            results["forgetting"] = f"{metrics['eval_forgetting']:+.4f}"
        if "eval_kl" in metrics:
            results["KL"] = f"{metrics['eval_kl']:.4f}"
        self.eval_results, self.evaluated_at, self.started = results, state.global_step, time.perf_counter()
        if state.is_world_process_zero and results:
            if self.bar is None:
                self.show(self._line(state, results))
            else:
                self._draw(state)
                self.bar.console.print(self._line(state, results), markup=False, highlight=False)  # stays above the bar

    def _line(self, state: Any, facts: dict[str, str]) -> str:
        return f"step {state.global_step}/{state.max_steps}  {_format_pairs(facts)}"

    def _draw(self, state: Any) -> None:
        """Updates the bar, with the results and the step of the last evaluation."""
        old = f"at step {self.evaluated_at}: " if self.eval_results and self.evaluated_at != state.global_step else ""
        self.bar.update(self.task, details="  ".join(filter(None, [_format_pairs(self.facts), old + _format_pairs(self.eval_results)])))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ended = True
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
