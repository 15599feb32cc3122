"""Cost of each penalty in a training step, compared with the step without one.

    python benchmarks/ewc_overhead.py [--size 12m|43m] [--batch 8] [--length 256] [--rounds 20] [--threads 1]

A step is forward, backward, penalty, clipping, AdamW. In every round each arm does one step, and each round starts with another arm; medians are
over the rounds. CPU time is compared: with one thread it does not include waiting on a shared machine. The penalty's share falls with the tokens
per step, since it touches every weight once whatever the batch. Result: results/ewc-overhead.md.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from results_file import markdown_table
from step_model import VOCAB, make_model, parse_arguments

from hf_grow.convert.in_memory import disk_names
from hf_grow.training.config.fisher_options import FisherOptions
from hf_grow.training.config.regularizer_options import PenaltyOptions
from hf_grow.training.regularizers.build import make_penalty
from hf_grow.training.regularizers.fisher import estimate_fisher
from hf_grow.training.regularizers.importance_file import model_fingerprint, write_importance
from hf_grow.training.regularizers.penalty import Penalty, QuadraticPenalty

SIZES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    "12m": {"hidden_size": 320, "intermediate_size": 896, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4},
    "43m": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 8, "num_key_value_heads": 4},
}
COLUMNS = (
    "penalty", "step, wall, s", "step, CPU, ms: median (min - max)", "over the plain step", "penalty alone, ms", "of the plain step", "memory, MB",
    "x the weights",
)  # fmt: skip


@dataclass
class Arm:
    label: str
    penalty: Penalty | None
    in_loss: bool = False
    """The penalty is a term of the loss, differentiated by autograd."""


def arms(model: Any, fisher: Path) -> list[Arm]:
    """One penalty of each kind, all bound to the same model."""

    def made(**options: Any) -> Penalty:
        penalty = make_penalty(PenaltyOptions.model_validate({"lambda": 1.0, **options}), model)
        assert penalty is not None
        penalty.attach(model)
        return penalty

    return [
        Arm("none", None),
        Arm("EWC", made(kind="ewc", fisher=fisher)),
        Arm("EWC, F and w* in bf16", made(kind="ewc", fisher=fisher, storage="bf16")),
        Arm("EWC, proximal step", made(kind="ewc", fisher=fisher, form="proximal")),
        Arm("EWC, a term of the loss (autograd)", made(kind="ewc", fisher=fisher), in_loss=True),
        Arm("L2-SP", made(kind="l2sp")),
        Arm("SI, importance from a file", made(kind="si", fisher=fisher)),
        Arm("SI, following the path", made(kind="si")),
    ]


def step(model: Any, optimizer: Any, ids: torch.Tensor, arm: Arm) -> tuple[float, float, float]:
    """Wall seconds and CPU seconds of the whole step, and CPU seconds of the penalty where they can be measured separately."""
    wall, begin, part = time.perf_counter(), time.process_time(), 0.0

    def timed(call: Callable[[], Any]) -> None:
        nonlocal part
        at = time.process_time()
        call()
        part += time.process_time() - at

    optimizer.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    if arm.in_loss:
        assert isinstance(arm.penalty, QuadraticPenalty)
        loss = loss + arm.penalty.term()
    loss.backward()
    if arm.penalty is not None and not arm.in_loss:
        timed(arm.penalty.add_gradient)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if arm.penalty is not None:
        timed(arm.penalty.before_step)
    optimizer.step()
    if arm.penalty is not None and not arm.in_loss:
        timed(lambda: arm.penalty.after_step(1e-4))  # type: ignore[union-attr]
    return time.perf_counter() - wall, time.process_time() - begin, part


def main() -> None:
    options = parse_arguments(__doc__, SIZES, "ewc-overhead.md", size="12m", rounds=20)
    model = make_model(SIZES, options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(0, VOCAB, (options.batch, options.length))
    with tempfile.TemporaryDirectory() as folder:
        fisher = Path(folder) / "fisher.safetensors"
        found, _ = estimate_fisher(model, ids[:4], FisherOptions(batch=4))
        tensors = disk_names(model, found)
        write_importance(
            fisher, {n: tuple(t.shape) for n, t in tensors.items()}, iter(tensors.items()), {"sample": model_fingerprint(model)}
        )
        del found, tensors
        chosen = arms(model, fisher)
        for arm in chosen:
            step(model, optimizer, ids, arm)  # warm-up: buffers, caches
        times: dict[str, list[tuple[float, float, float]]] = {a.label: [] for a in chosen}
        before, began = os.getloadavg()[0], time.perf_counter()
        busy = os.times()
        for round_ in range(options.rounds):
            for at in range(len(chosen)):
                arm = chosen[(at + round_) % len(chosen)]
                times[arm.label].append(step(model, optimizer, ids, arm))
            print(f"round {round_ + 1} of {options.rounds}", file=sys.stderr)
        own = (os.times().user - busy.user + os.times().system - busy.system) / (time.perf_counter() - began)
    count = sum(p.numel() for p in model.parameters())
    text = report(
        chosen, times, count, options, f"load average {before:.1f} at the start; this process used {own:.1f} of {os.cpu_count()} cores"
    )
    options.out.write_text(text)
    print(text)


def report(chosen: list[Arm], times: dict[str, list[tuple[float, float, float]]], count: int, options: Namespace, load: str) -> str:
    plain = [t for _, t, _ in times["none"]]
    base = statistics.median(plain)
    flags = f"--size {options.size} --batch {options.batch} --length {options.length} --rounds {options.rounds} --threads {options.threads}"
    command = f"python benchmarks/ewc_overhead.py {flags}"
    lines = [
        "# What a penalty costs a training step",
        "",
        f"`{command}`: a Llama of {count / 1e6:.1f}M parameters in fp32, {options.batch} x {options.length} tokens per step, fused AdamW,",
        f"{options.rounds} rounds. {platform.machine()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}, "
        f"transformers {transformers.__version__}; {load}.",
        "",
    ]
    rows = []
    for arm in chosen:
        walls, steps, parts = zip(*times[arm.label], strict=True)
        part = statistics.median(parts)
        # Compared within a round, so that a slow phase of the machine affects both.
        over = statistics.median(a / b - 1 for a, b in zip(steps, plain, strict=True))
        held = arm.penalty.nbytes() if arm.penalty else 0
        apart = arm.penalty is not None and not arm.in_loss
        cells = [
            arm.label,
            f"{statistics.median(walls):.2f}",
            f"{statistics.median(steps) * 1e3:.0f} ({min(steps) * 1e3:.0f} - {max(steps) * 1e3:.0f})",
            f"{over:+.1%}" if arm.penalty else "",
            f"{part * 1e3:.1f}" if apart else "",
            f"{part / base:.1%}" if apart else "",
            f"{held / 1e6:.0f}" if held else "",
            f"{held / (4 * count):.1f}" if held else "",
        ]
        rows.append(cells)
    lines += markdown_table(COLUMNS, rows)
    lines += [
        "",
        '"Over the plain step": median over the rounds of the ratio to the plain step of the same round. "Penalty alone": its calls, timed',
        "inside the step. A penalty touches every weight once a step, so its share falls with more tokens per step (larger batches,",
        "gradient accumulation).",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
