"""Cost of EWC and of a warm-up of new rows in a training step of GrowTrainer, compared with transformers' Trainer.

    python benchmarks/trainer_overhead.py [--size 10m|1b] [--batch 8] [--length 256] [--rounds 8] [--steps 6] [--threads 1]

The model is a Llama grown to twice its width, so that three quarters of the entries of every matrix are new: the warm-up copies them in each step. In
every round each arm trains for some steps from the same weights on the same batches, in turn; each round starts with another arm. A step is timed from
its begin to its end as callbacks see them; the first of each training is left out. On a CPU its time is CPU time: with one thread it does
not include waiting on a shared machine. Also printed: bytes held by masks and copies, and what a bool tensor for each mask and a copy of every
tensor with a mask would take. Result: results/trainer-overhead.md.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import transformers
from results_file import markdown_table
from step_model import VOCAB, make_model, parse_arguments
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_grow import api
from hf_grow.convert.in_memory import grow_model
from hf_grow.training.config.regularizer_options import PenaltyOptions
from hf_grow.training.config.schedules import Warmup
from hf_grow.training.param_updates.masks import Mask, RowMask
from hf_grow.training.param_updates.param_provenance import new_masks
from hf_grow.training.param_updates.parameter_map import parameter_map, shapes_on_disk
from hf_grow.training.param_updates.updates import COPY_BYTES, ParamUpdates
from hf_grow.training.regularizers.build import make_penalty
from hf_grow.training.regularizers.importance_file import model_fingerprint, write_importance
from hf_grow.training.trainer.state import GrowthSettings
from hf_grow.training.trainer.trainer import BaseGrowTrainer

SIZES = {
    "tiny": {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    "10m": {"hidden_size": 144, "intermediate_size": 400, "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2},
    "1b": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 18, "num_attention_heads": 8, "num_key_value_heads": 4},
}
"""Of the sources, a quarter as large."""
ARMS = ("plain Trainer", "EWC", "warm-up of new rows", "EWC and warm-up")


class StepClock(TrainerCallback):  # type: ignore[misc]
    """Seconds of every step, CPU seconds on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.begun, self.steps = device, 0.0, []  # type: ignore[var-annotated]

    def now(self) -> float:
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def on_step_begin(self, *args: Any, **options: Any) -> None:
        self.begun = self.now()

    def on_step_end(self, *args: Any, **options: Any) -> None:
        self.steps.append(self.now() - self.begun)


class Copies:
    """The most bytes of copies that a ParamUpdates holds at a time."""

    def __init__(self, updates: ParamUpdates) -> None:
        self.most, hold = 0, updates._hold

        def counted(batch: Any) -> None:
            hold(batch)
            self.most = max(self.most, sum(t.nbytes for _, _, taken, _ in updates._held for t in taken))

        updates._hold = counted  # type: ignore[method-assign]


def main() -> None:
    options = parse_arguments(__doc__, SIZES, "trainer-overhead.md", size="10m", rounds=8, steps=6)
    source = make_model(SIZES, options)
    plan = api.plan(source, "tile", factor=2)
    model = grow_model(source, plan)
    del source
    start = {n: t.clone() for n, t in model.state_dict().items()}
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, VOCAB, (options.batch * options.steps, options.length))]
    masks = new_masks(model, plan)
    with tempfile.TemporaryDirectory() as folder:
        fisher = Path(folder) / "fisher.safetensors"
        shapes = shapes_on_disk(model, parameter_map(model))
        write_importance(fisher, shapes, ((n, torch.rand(s)) for n, s in shapes.items()), {"sample": model_fingerprint(model)})
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=options.batch, max_steps=options.steps, learning_rate=1e-4, report_to=[],
            save_strategy="no", logging_strategy="no", disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=False,
        )  # fmt: skip
        copies: list[Copies] = []

        def train(arm: str) -> float:
            model.load_state_dict(start)
            penalty = make_penalty(PenaltyOptions.model_validate({"kind": "ewc", "lambda": 1.0, "fisher": fisher}), model)
            updates = ParamUpdates(dict.fromkeys(masks, True), masks)
            settings = GrowthSettings(
                penalty=penalty if "EWC" in arm else None, updates=updates if "warm-up" in arm else None,
                warmup=Warmup(steps=10**6) if "warm-up" in arm else Warmup(),
            )  # fmt: skip
            clock, given = StepClock(arguments.device), {"model": model, "args": arguments, "train_dataset": rows}
            trainer = Trainer(**given) if arm == ARMS[0] else BaseGrowTrainer(**given, growth=settings)
            trainer.add_callback(clock)
            if "warm-up" in arm:
                copies.append(Copies(updates))
            trainer.train()
            return statistics.median(clock.steps[1:])

        for arm in ARMS:
            train(arm)
        times: dict[str, list[float]] = {arm: [] for arm in ARMS}
        load = os.getloadavg()[0]
        for round_ in range(options.rounds):
            for at in range(len(ARMS)):
                arm = ARMS[(at + round_) % len(ARMS)]
                times[arm].append(train(arm))
            print(f"round {round_ + 1} of {options.rounds}", file=sys.stderr)
    text = report(times, options, model, arguments.device, load, held_bytes(model, masks, copies[-1].most))
    options.out.write_text(text)
    print(text)


def held_bytes(model: Any, masks: dict[str, Mask], copies: int) -> list[tuple[str, int, int]]:
    """(what, bytes, bytes as whole tensors) of masks and copies."""
    unique = {id(m): m for m in masks.values() if isinstance(m, RowMask)}.values()
    whole = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if isinstance(masks[n], RowMask))
    # Each mask of a process is held once more as the selection that is copied.
    return [
        ("masks, equal layers sharing theirs", sum(m.nbytes() for m in unique), sum(m.kinds.numel() * m.lines.shape[1] for m in unique)),
        ("copies of a step", copies, whole),
    ]


def report(
    times: dict[str, list[float]],
    options: Namespace,
    model: Any,
    device: torch.device,
    load: float,
    held: list[tuple[str, int, int]],
) -> str:
    count = sum(p.numel() for p in model.parameters())
    kind, name = ("CPU ", platform.machine()) if device.type == "cpu" else ("", torch.cuda.get_device_name(device))
    flags = " ".join(f"--{n} {getattr(options, n)}" for n in ("size", "batch", "length", "rounds", "steps", "threads"))
    rows = []
    for arm, found in times.items():
        over = [a / b - 1 for a, b in zip(found, times[ARMS[0]], strict=True)]
        cells = [f"{statistics.median(over):+.1%}", f"{min(over):+.1%} to {max(over):+.1%}"] if arm != ARMS[0] else ["", ""]
        rows.append([arm, f"{statistics.median(found) * 1e3:.1f}", *cells])
    return "\n".join([
        "# What EWC and a warm-up of new rows cost a training step",
        "",
        f"`python benchmarks/trainer_overhead.py {flags}`: a Llama of {count / 1e6:.1f}M parameters in fp32, grown to twice its",
        f"width, {options.batch} x {options.length} tokens per step. {name}, {torch.get_num_threads()} thread(s), torch {torch.__version__},",
        f"transformers {transformers.__version__}; load average {load:.1f} at the start.",
        "",
        *markdown_table(("trainer", f"step, {kind}ms: median over rounds", "over the plain Trainer of the round: median", "range"), rows),
        "",
        *markdown_table(("held", "MB", "as whole tensors, MB"), [[what, f"{a / 1e6:.2f}", f"{b / 1e6:.2f}"] for what, a, b in held]),
        "",
        f"Larger copies are made by batches of parameters, {COPY_BYTES >> 20} MiB at a time.",
    ]) + "\n"  # fmt: skip


if __name__ == "__main__":
    main()
