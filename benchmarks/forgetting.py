"""What continued pretraining forgets, and what helps: `python benchmarks/forgetting.py`; README.md in this folder explains it.

Every run is stored in results/forgetting.jsonl as soon as it is done, so an interrupted benchmark continues where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

# Threads that spin while they wait make training many times slower as soon as another program wants the cores. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from arms import ARMS, Arm
from results_file import RESULTS, append_record, command_line, read_records
from stage import FULL, QUICK, Settings, Stage, prepare
from tradeoff import BASELINES
from tradeoff_table import write

from hf_grow.training.config.train_config import read_recipe
from hf_grow.training.data import cache
from hf_grow.training.dry_run.dry_run import dry_run
from hf_grow.training.train import train
from hf_grow.training.trainer.events import read_events

NAME = "forgetting"
TIMED = 6
"""Steps that are timed together."""


def key_of(arm: Arm, stage: Stage) -> str:
    """A digest of everything that a run depends on, wherever the cache is."""
    return cache.key(json.loads(json.dumps([arm.recipe(stage), stage.folder.name]).replace(str(stage.folder), "")))


def run(arm: Arm, stage: Stage) -> dict[str, Any]:
    """One training, as `hf-grow train` does it: its trajectory and its memory."""
    read = read_recipe(arm.recipe(stage), arm.name)
    with tempfile.TemporaryDirectory(prefix="hf-grow-forgetting-") as folder:
        out = Path(folder) / "out"
        memory = dry_run(read, output=str(out), notify=lambda message: None)["memory"]
        found = train(read, output=str(out))
        trajectory = [{"step": e["step"], **e["losses"]} for e in read_events(out / "events.jsonl") if e["event"] == "evaluation"]
    return {
        "arm": arm.name,
        "seed": stage.seed,
        "key": key_of(arm, stage),
        "trajectory": trajectory,
        "steps": found.steps,
        "memory": memory,
    }


def kind_of(arm: Arm, settings: Settings) -> str:
    """A digest of what the time of a step depends on; strengths, shares and learning rates are not part of it."""
    given = arm.recipe(Stage(settings, 0, Path("stage")))
    penalty = {k: v for k, v in given.get("regularizer", {}).items() if k not in ("lambda", "fisher")}
    return cache.key([arm.growth, penalty, "distill" in given, given.get("lora"), given.get("train"), asdict(settings)])


def step_seconds(arm: Arm, stage: Stage) -> float:
    """CPU seconds per step, the fastest of several measurements in a short training: other load affects these far less than wall time."""
    given = arm.recipe(stage)
    given |= {"data": {**given["data"], "eval": {}}, "max_steps": 6 * TIMED, "logging_steps": TIMED, "warmup_steps": 1}
    del given["eval_steps"]
    ticks: list[float] = []
    with (
        tempfile.TemporaryDirectory(prefix="hf-grow-forgetting-") as folder,
        contextlib.redirect_stderr(io.StringIO()),
    ):  # not a terminal: no progress bar
        train(read_recipe(given, arm.name), output=str(Path(folder) / "out"), show=lambda line: ticks.append(time.process_time()))
    return min(b - a for a, b in pairwise(ticks)) / TIMED


def timings(chosen: list[Arm], settings: Settings, store: Path, rounds: int) -> dict[str, float]:
    """The time of a step by kind; each kind is timed ``rounds`` times, with the others in between."""
    kinds = {kind_of(arm, settings): arm for arm in reversed(chosen)}
    found: dict[str, list[float]] = {}
    for record in read_records(store):
        if "timing" in record:
            found.setdefault(record["timing"], []).append(record["seconds"])
    stage = None
    for number in range(1, rounds + 1):
        for kind, arm in kinds.items():
            if len(found.get(kind, ())) < number:
                stage = stage or prepare(settings, 0)
                seconds = step_seconds(arm, stage)
                found.setdefault(kind, []).append(seconds)
                append_record(store, {"timing": kind, "arm": arm.name, "seconds": round(seconds, 6)})
    return {kind: min(seconds) for kind, seconds in found.items()}


def benchmark(arguments: argparse.Namespace) -> list[Path]:
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    settings: Settings = QUICK if arguments.quick else FULL
    chosen = chosen_arms(arguments.arms)
    arguments.results.mkdir(parents=True, exist_ok=True)
    store = arguments.results / f"{NAME}{'-quick' if arguments.quick else ''}.jsonl"
    done = {r["key"]: r for r in read_records(store) if "key" in r}
    found = []
    for seed in range(arguments.seeds):
        if arguments.stored:
            found += [r for r in done.values() if r["seed"] == seed and r["arm"] in {a.name for a in chosen}]
            continue
        stage = prepare(settings, seed)
        for arm in chosen:
            key = key_of(arm, stage)
            if key not in done or arguments.fresh:
                began = time.perf_counter()
                done[key] = run(arm, stage)
                append_record(store, done[key])
                first, last = done[key]["trajectory"][0], done[key]["trajectory"][-1]
                print(
                    f"seed {seed}  {arm.name:<66} old {last['old']:.3f} ({last['old'] - first['old']:+.3f})  new {last['new']:.3f}  "
                    f"{time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True,
                )  # fmt: skip
            found.append(done[key])
    times = timings([ARMS[n] for n in {r["arm"] for r in found}], settings, store, 1 if arguments.stored else 2)
    for record in found:
        record["step_seconds"] = times[kind_of(ARMS[record["arm"]], settings)]
    return write(
        found,
        [a.name for a in chosen],
        settings,
        arguments.results / store.stem,
        command_line(NAME, arguments, ("seeds", "threads", "quick", "arms")),
    )


def chosen_arms(words: list[str] | None) -> list[Arm]:
    """Arms whose names contain one of the words, and always BASELINES. Exits with a message if a word fits no arm."""
    for word in words or ():
        if not any(word.lower() in name.lower() for name in ARMS):
            sys.exit(f"There is no arm {word!r}. Arms:\n" + "\n".join(f"  {name}" for name in ARMS))
    return [a for n, a in ARMS.items() if not words or n in BASELINES or any(w.lower() in n.lower() for w in words)]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure what continued pretraining forgets, and what helps.")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0")
    parser.add_argument("--quick", action="store_true", help="everything tiny: runs the same code, but is not a measurement")
    parser.add_argument("--arms", nargs="+", metavar="WORD", help="only arms whose names contain one of these, and plain fine-tuning")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--stored", action="store_true", help="only write the table and plot again, from stored runs")
    parser.add_argument("--fresh", action="store_true", help="repeat stored runs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    for path in benchmark(parse(argv)):
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
