"""What continued pretraining forgets, and what helps: `python benchmarks/forgetting.py`; see README.md beside this file.

Every run goes into results/forgetting.jsonl as soon as it is done, so an interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

# Threads that spin while they wait make training many times slower as soon as another program wants the cores. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import tradeoff
from arms import ARMS, Arm
from stage import FULL, QUICK, Settings, Stage, prepare

from hf_grow.training.config import train_config as recipe
from hf_grow.training.data import cache
from hf_grow.training.dry_run.dry_run import dry_run
from hf_grow.training.train import train
from hf_grow.training.trainer.events import read_events

HERE = Path(__file__).parent
NAME = "forgetting"
TIMED = 6
"""Steps of a stretch whose time is taken."""


def records(path: Path) -> Iterator[dict[str, Any]]:
    """The runs that are done; a line torn by a crash is left out."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def key_of(arm: Arm, stage: Stage) -> str:
    """Names what a run follows from, wherever the cache lies."""
    return cache.key(json.loads(json.dumps([arm.recipe(stage), stage.folder.name]).replace(str(stage.folder), "")))


def run(arm: Arm, stage: Stage) -> dict[str, Any]:
    """One training, as `hf-grow train` does it; its trajectory and its memory."""
    read = recipe.read_recipe(arm.recipe(stage), arm.name)
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
    """Names what decides the time of a step: strengths, shares and rates do not."""
    given = arm.recipe(Stage(settings, 0, Path("stage")))
    penalty = {k: v for k, v in given.get("regularizer", {}).items() if k not in ("lambda", "fisher")}
    return cache.key([arm.growth, penalty, "distill" in given, given.get("lora"), given.get("train"), asdict(settings)])


def step_seconds(arm: Arm, stage: Stage) -> float:
    """Processor seconds of a step, in the fastest of several stretches of a short training: other load slows these far less than wall time."""
    given = arm.recipe(stage)
    given |= {"data": {**given["data"], "eval": {}}, "max_steps": 6 * TIMED, "logging_steps": TIMED, "warmup_steps": 1}
    del given["eval_steps"]
    ticks: list[float] = []
    with (
        tempfile.TemporaryDirectory(prefix="hf-grow-forgetting-") as folder,
        contextlib.redirect_stderr(io.StringIO()),
    ):  # no terminal: no bar
        train(recipe.read_recipe(given, arm.name), output=str(Path(folder) / "out"), show=lambda line: ticks.append(time.process_time()))
    return min(b - a for a, b in pairwise(ticks)) / TIMED


def timings(chosen: list[Arm], settings: Settings, store: Path, rounds: int) -> dict[str, float]:
    """The time of a step by kind; each kind is run `rounds` times, not at once."""
    kinds = {kind_of(arm, settings): arm for arm in reversed(chosen)}
    found: dict[str, list[float]] = {}
    for record in records(store):
        if "timing" in record:
            found.setdefault(record["timing"], []).append(record["seconds"])
    stage = None
    for number in range(1, rounds + 1):
        for kind, arm in kinds.items():
            if len(found.get(kind, ())) < number:
                stage = stage or prepare(settings, 0)
                seconds = step_seconds(arm, stage)
                found.setdefault(kind, []).append(seconds)
                append(store, {"timing": kind, "arm": arm.name, "seconds": round(seconds, 6)})
    return {kind: min(seconds) for kind, seconds in found.items()}


def append(store: Path, record: dict[str, Any]) -> None:
    """On a line of its own, also after one that a crash tore."""
    torn = store.is_file() and not store.read_bytes().endswith(b"\n")
    with store.open("a", encoding="utf-8") as file:
        file.write("\n" * torn + json.dumps(record) + "\n")


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
    done = {r["key"]: r for r in records(store) if "key" in r}
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
                append(store, done[key])
                first, last = done[key]["trajectory"][0], done[key]["trajectory"][-1]
                print(
                    f"seed {seed}  {arm.name:<66} old {last['old']:.3f} ({last['old'] - first['old']:+.3f})  new {last['new']:.3f}  "
                    f"{time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True,
                )  # fmt: skip
            found.append(done[key])
    times = timings([ARMS[n] for n in {r["arm"] for r in found}], settings, store, 1 if arguments.stored else 2)
    for record in found:
        record["step_seconds"] = times[kind_of(ARMS[record["arm"]], settings)]
    return tradeoff.write(found, [a.name for a in chosen], settings, arguments.results / store.stem, command_of(arguments))


def chosen_arms(words: list[str] | None) -> list[Arm]:
    """Arms whose names contain one of the words; the plain ones are always among them, as the yardstick. Exits with a message if none fits."""
    for word in words or ():
        if not any(word.lower() in name.lower() for name in ARMS):
            sys.exit(f"There is no arm {word!r}. Arms:\n" + "\n".join(f"  {name}" for name in ARMS))
    return [a for n, a in ARMS.items() if not words or n in tradeoff.YARDSTICK or any(w.lower() in n.lower() for w in words)]


def command_of(arguments: argparse.Namespace) -> str:
    """The command line again, without what only says where things lie on this machine."""
    words = ["python", f"benchmarks/{NAME}.py", "--seeds", str(arguments.seeds), "--threads", str(arguments.threads)]
    words += ["--quick"] * arguments.quick + (["--arms", *arguments.arms] if arguments.arms else [])
    return shlex.join(words)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure what continued pretraining forgets, and what helps.")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    parser.add_argument("--quick", action="store_true", help="everything tiny: the same path through the code, and no measurement")
    parser.add_argument("--arms", nargs="+", metavar="WORD", help="only arms whose names contain one of these, and plain fine-tuning")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--stored", action="store_true", help="only write table and plot again, from the runs that are stored")
    parser.add_argument("--fresh", action="store_true", help="run again what was stored")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    for path in benchmark(parse(argv)):
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
