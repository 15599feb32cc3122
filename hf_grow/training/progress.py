"""What people see of a training: a bar on a terminal, one line a log elsewhere. Loss, tokens a second, FLOPs spent, forgetting so far."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback


def scientific(flops: float) -> str:
    """6.1e+15 -> '6.1 PFLOP'."""
    for unit, scale in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if flops >= scale:
            return f"{flops / scale:.3g} {unit}"
    return f"{flops / 1e6:.3g} MFLOP"


class Progress(TrainerCallback):  # type: ignore[misc]
    """Shows what the trainer tells; `tokens_a_step` over all processes, `show` prints a line where there is no terminal."""

    def __init__(self, tokens_a_step: int, show: Callable[[str], None]) -> None:
        self.tokens_a_step, self.show = tokens_a_step, show
        self.facts: dict[str, str] = {}
        self.began, self.first = time.perf_counter(), 0
        self.bar: Any = None
        self.task: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began, self.first = time.perf_counter(), state.global_step
        if not (sys.stderr.isatty() and state.is_world_process_zero) or self.bar is not None:
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[facts]}"))
        self.bar = Bar(*columns, console=Console(stderr=True), transient=True)
        self.task = self.bar.add_task("training", total=state.max_steps, completed=state.global_step, facts="")
        self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not logs or not state.is_world_process_zero or "loss" not in logs:
            return
        done = (state.global_step - self.first) * self.tokens_a_step
        speed = done / max(time.perf_counter() - self.began, 1e-9)
        self.facts |= {"loss": f"{logs['loss']:.4g}", "tok/s": f"{speed:,.0f}", "spent": scientific(state.total_flos)}
        self._tell(state)

    def evaluated(self, state: Any, metrics: dict[str, float]) -> None:
        """After all named sets; called by the trainer, because callbacks hear of one set at a time."""
        self.facts |= {k.removeprefix("eval_").removesuffix("_loss"): f"{v:.4g}" for k, v in metrics.items() if k.endswith("_loss")}
        if "eval_forgetting" in metrics:
            self.facts["forgetting"] = f"{metrics['eval_forgetting']:+.4f}"
        if "eval_kl" in metrics:
            self.facts["KL"] = f"{metrics['eval_kl']:.4f}"
        if state.is_world_process_zero:
            self._tell(state)

    def _tell(self, state: Any) -> None:
        line = "  ".join(f"{k} {v}" for k, v in self.facts.items())
        if self.bar is not None:
            self.bar.update(self.task, facts=line)
        else:
            self.show(f"step {state.global_step}/{state.max_steps}  {line}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
