"""The event log of a training run: OUT/events.jsonl, one JSON object per line, append-only.

Every line has `event`, `step` (optimizer steps done) and `time` (seconds since 1970); EVENTS lists the other keys of each kind. After a resumed run
repeated steps appear twice: lines before the `resume` line belong to the interrupted run.
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
"""Most events of one run that are also shown to the user."""
EVENTS: dict[str, dict[str, str]] = {
    "start": {"model": "checkpoint that is trained", "steps": "optimizer steps to do", "grown_at": "step of the last growth"},
    "resume": {"checkpoint": "checkpoint that is resumed", "steps": "optimizer steps to do", "grown_at": "step of the last growth"},
    "settings": {"checkpoint": "checkpoint that is resumed", "...": "argument -> [value, 'recipe' or 'checkpoint']"},
    "log": {"loss": "training loss since the last log line", "...": "other values that Trainer and hf-grow log"},
    "evaluation": {"losses": "loss of each named set, nats per token", "forgetting": "old-domain loss minus that of the baseline (if there is an old set)",
                   "kl": "KL(source || model), nats per token (if measured)"},
    "baseline": {"losses": "loss of each set that later ones are compared with", "of": "model that was measured"},
    "regression": {"set": "named set", "loss": "its loss", "baseline": "the loss it is compared with"},
    "phase": {"train": "parts that train from this step on"},
    "settled": {"lr_factor": "multiple of the schedule's learning rate from this step on"},
    "blended": {"alpha": "share of the new blocks' output: 1 from this step on"},
    "consolidated": {"steps": "steps since the growth; from this step on the model may be grown again"},
    "transition_shock": {"loss": "loss after the growth", "before": "loss before it", "nats": "difference"},
    "recovered": {"loss": "smoothed loss, back at its level before the growth", "steps": "steps since the growth"},
    "instability": {"signal": "loss, grad_norm, variance or nonfinite", "value": "observed value", "score": "robust z-score"},
    "reaction": {"action": "lower_lr, longer_warmup, rollback or none", "lr_factor": "factor on learning rates from this step on (after a rollback it rises again)",
                 "extra_warmup": "steps added to the warm-up of new parameters", "checkpoint": "checkpoint of a rollback, or empty",
                 "skipped": "steps whose batches a rollback skips"},
    "contribution": {"set": "named set", "loss": "loss with all blocks", "blocks": "block -> loss without it minus loss"},
    "teacher": {"model": "teacher", "cache": "folder of its logits, or empty", "covered": "mean probability of the tokens in the cache"},
    "overflow": {"reason": "why the result is not saved in the configured dtype"},
    "checkpoint": {"folder": "name of the checkpoint"},
    "stop": {"reason": "why training ended before its last step"},
    "stage": {"stage": "number of the stage that begins", "name": "its name", "grow": "how its model grows from that of the stage before, or null"},
    "stage_end": {"stage": "number of the stage", "reason": "what ended it", "tokens": "tokens of the run so far", "flops": "FLOPs of the run so far"},
    "end": {"output": "folder of the model", "loss": "mean training loss"},
}  # fmt: skip
"""Kind of event -> its keys besides event, step and time."""


class EventLog:
    """Appends events to a file; without a path (in processes that do not write) it does nothing.

    ``notify`` receives a line for each of the first MAX_NOTIFIED events that the user should see.
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
    """The line shown to the user; empty for most events."""
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
    """The events of a log; an incomplete line (after a crash) is skipped."""
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and "event" in entry:
            yield entry
