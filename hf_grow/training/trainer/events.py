"""The event log of a training run: OUT/events.jsonl, one JSON object per line, append-only.

Every line has `event`, `step` (optimizer steps done) and `time` (seconds since 1970); EVENTS says what else each kind holds. After a resumed run
repeated steps appear twice: lines before the `resume` line are of the interrupted run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hf_grow.common.safe_files import replace_nonfinite

EVENTS_FILE = "events.jsonl"
MAX_NOTIFIED = 10
"""Events of one run that are also shown at once."""
EVENTS: dict[str, dict[str, str]] = {
    "start": {"model": "checkpoint that is trained", "steps": "optimizer steps to do", "grown_at": "step of the last growth"},
    "resume": {"checkpoint": "where it goes on from", "steps": "optimizer steps to do", "grown_at": "step of the last growth"},
    "settings": {"checkpoint": "what training goes on from", "...": "argument -> [its value, whether it is the recipe's or the checkpoint's]"},
    "log": {"loss": "training loss since the last log line", "...": "whatever else Trainer and hf-grow log"},
    "evaluation": {"losses": "loss of each named set, nats per token", "forgetting": "old-domain loss minus that of the baseline (where there is an old set)",
                   "kl": "KL(source || model), nats per token (where it is asked for)"},
    "baseline": {"losses": "loss of each set that later ones are compared with", "of": "what they were taken from"},
    "regression": {"set": "named set", "loss": "its loss", "baseline": "the loss it is compared with"},
    "phase": {"train": "parts that train from this step on"},
    "settled": {"lr_factor": "multiple of the schedule's learning rate from this step on"},
    "blended": {"alpha": "share of the new blocks' output: 1 from this step on"},
    "consolidated": {"steps": "steps since the growth: the model may be grown again from here on"},
    "transition_shock": {"loss": "loss after the growth", "before": "loss before it", "nats": "difference"},
    "recovered": {"loss": "smoothed loss, back at its level before the growth", "steps": "steps since the growth"},
    "instability": {"signal": "loss, grad_norm, variance or nonfinite", "value": "what was seen", "score": "how far out, in robust deviations"},
    "reaction": {"action": "lower_lr, longer_warmup, rollback or none", "lr_factor": "multiple on learning rates from here on (after a rollback it rises again)",
                 "extra_warmup": "steps added to the warm-up of new parameters", "checkpoint": "where a rollback goes to, or empty",
                 "skipped": "steps whose batches a rollback passes over"},
    "contribution": {"set": "named set", "loss": "loss with all blocks", "blocks": "block -> loss without it minus loss"},
    "teacher": {"model": "teacher", "cache": "folder of its logits, or empty", "covered": "mean probability that the cached logits hold"},
    "overflow": {"reason": "why the result has not the dtype that was meant"},
    "checkpoint": {"folder": "what was saved"},
    "stop": {"reason": "why training ended before its last step"},
    "end": {"output": "where the model is", "loss": "mean training loss"},
}  # fmt: skip
"""Kind of event -> its keys besides event, step and time."""


class EventLog:
    """Appends events to a file; without a path (a process that does not write) it writes none.

    ``notify`` gets a line for each of the first MAX_NOTIFIED events that people should see at once.
    """

    def __init__(self, path: Path | None, notify: Callable[[str], None] = lambda line: None) -> None:
        self.path, self.notify, self._notified = path, notify, 0

    def write(self, event: str, step: int, **facts: Any) -> None:
        assert event in EVENTS, event
        if self.path is None:
            return
        line = {"event": event, "step": step, "time": round(time.time(), 3), **replace_nonfinite(facts, nonfinite=str)}
        with self.path.open("a", encoding="utf-8") as f:
            f.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        message = format_event(event, facts)
        if message and self._notified < MAX_NOTIFIED:
            self._notified += 1
            last = f" Further ones are only in {self.path}." * (self._notified == MAX_NOTIFIED)
            self.notify(f"Step {step}: {message}.{last}")


def format_event(event: str, facts: Mapping[str, Any]) -> str:
    """What people are shown of an event at once; empty for most."""
    if event == "instability":
        return f"{facts.get('of', facts['signal'])} {facts['value']:.4g} is unstable"
    if event == "reaction" and facts["action"] != "none":
        return f"{facts['action']}, learning rates x {facts['lr_factor']:g}"
    if event == "settings":
        settings = [f"{k} {v[0]:g} is the {v[1]}'s" for k, v in facts.items() if k != "checkpoint"]
        return f"{', '.join(settings)}; the rest of {facts['checkpoint']}, the shape of the schedule from the recipe"
    if event == "transition_shock":
        return f"loss {facts['loss']:.4g}, before the growth {facts['before']:.4g}"
    return ""


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a log; a line torn by a crash is left out."""
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and "event" in entry:
            yield entry
