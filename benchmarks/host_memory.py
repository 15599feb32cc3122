"""Peak host memory of each process of a training sharded by FSDP2, against the formula.

    python benchmarks/host_memory.py [--scratch DIR] [--rows "1b weights, 4" ...]

Processes on the CPU (gloo) train a generated Llama in bf16 with rows of 8 tokens, `hf-grow train` under accelerate's FSDP2. The kernel's high-water
mark of resident memory (VmHWM: ru_maxrss without what a child inherits from its parent) is read when training begins, after the first step, and at
the end, and that of the same training of a model of 2 MB, the interpreter with its libraries, is subtracted. Every measurement is stored in
results/host-memory.jsonl as soon as it is done, so an interrupted run continues; the table is results/host-memory.md.

Formula: (weights + state) / processes + one layer. A layer is the largest of the embedding, the head and the blocks, in the dtype of the training.
glibc is told to return memory of freed blocks of 1 MB and more at once (MALLOC_MMAP_THRESHOLD_); by itself it keeps up to 32 MB blocks for reuse.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

BLOCKS = {"1b": 20, "0.5b": 8}
"""Blocks of TinyLlama's shape: 1.01 and 0.48 billion parameters."""


@dataclass(frozen=True)
class Row:
    """One training, and the moment of its last reading."""

    size: str
    what: str
    processes: int
    regularizer: bool
    until: str
    """begin, step or end."""
    bytes_per_parameter: int
    """Of weights and state that the process shares with the others."""

    @property
    def name(self) -> str:
        return f"{self.size} {self.what}, {self.processes}"


ROWS = [
    Row(size, what, processes, regularizer, until, width)
    for size, what, regularizer, until, width in (
        ("1b", "weights", False, "begin", 2),
        ("1b", "weights, w* and F", True, "begin", 2 + 2 + 2),
        ("0.5b", "and gradients, AdamW, after a step", False, "step", 2 + 2 + 4),
        ("0.5b", "and a checkpoint and the result written", False, "end", 2 + 2 + 4),
        ("0.5b", "w*, F, gradients, AdamW, after a step", True, "step", 2 + 2 + 2 + 2 + 4),
    )
    for processes in (2, 4)
]


def main() -> int:
    from results_file import RESULTS, append_record, read_records

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, help="where 4.5 GB of files are written while it runs")
    parser.add_argument("--rows", nargs="*", help="the rows to measure again; all that are missing otherwise")
    parser.add_argument("--results", type=Path, default=RESULTS / "host-memory.jsonl")
    options = parser.parse_args()
    found = {r["name"]: r for r in read_records(options.results)}
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        for row in ROWS:
            if (row.name in found and row.name not in (options.rows or ())) or (options.rows and row.name not in options.rows):
                continue
            base = measured(Path(scratch), row, "tiny")
            record = {"name": row.name, **measured(Path(scratch), row, row.size), "base": base["peaks"]}
            append_record(options.results, record)
            found[row.name] = record
            print(line(row, record), file=sys.stderr)
    options.results.with_suffix(".md").write_text("\n".join(table(found)) + "\n")
    print("\n".join(table(found)))
    return 0


def config_of(size: str) -> dict[str, Any]:
    from generate import CONFIGS

    if size == "tiny":
        return {**CONFIGS["tiny"], "vocab_size": 64, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    return {**CONFIGS["1b"], "num_hidden_layers": BLOCKS[size]}


def prepared(scratch: Path, size: str) -> Path:
    """A folder with a model, its tokenizer, importances, a text and a recipe."""
    import torch
    from generate import generate
    from trained import text, tokenizer

    from hf_grow.checkpoint.source import open_source
    from hf_grow.training.regularizers.importance_file import checkpoint_fingerprint, write_importance

    folder = scratch / size
    if (folder / "new.jsonl").is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    generate(folder / "model", config_of(size), 10**9)
    tokenizer().save_pretrained(folder / "model")
    checkpoint = open_source(folder / "model", weights=True)
    shapes = {n: tuple(t.shape) for n, t in checkpoint.tensors.items()}

    def importances() -> Iterator[tuple[str, torch.Tensor]]:
        for name, shape in shapes.items():
            yield name, torch.rand(shape)

    write_importance(folder / "fisher.safetensors", shapes, importances(), {"sample": checkpoint_fingerprint(checkpoint)}, storage="bf16")
    text(folder, "new")
    return folder


def measured(scratch: Path, row: Row, size: str) -> dict[str, Any]:
    from launched import start

    folder = prepared(scratch, size)
    regularizer = (
        {"kind": "ewc", "lambda": 10, "fisher": str(folder / "fisher.safetensors"), "storage": "bf16"}
        if row.regularizer
        else {"kind": "none"}
    )
    recipe = {
        "model": str(folder / "model"), "data": {"train": str(folder / "new.jsonl"), "seq_length": 8}, "dtype": "bfloat16", "max_steps": 1,
        "regularizer": regularizer, "per_device_train_batch_size": 1, "learning_rate": 1e-4, "logging_steps": 1, "use_cpu": False,
        "save_strategy": "steps" if row.until == "end" else "no", "save_steps": 1,
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    shutil.rmtree(folder / "out", ignore_errors=True)
    os.environ |= {"HOST_MEMORY_UNTIL": row.until, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    facts = start("fsdp2", ["train", folder / "recipe.yaml", "-o", folder / "out"], [folder] * row.processes, script=__file__)
    shutil.rmtree(folder / "out", ignore_errors=True)
    return {"peaks": [f["peak"] for f in facts], "parameters": facts[0]["parameters"]}


def formula(row: Row, parameters: int) -> tuple[float, float]:
    """(weights + state) / processes, and one layer, in bytes."""
    config = config_of(row.size)
    hidden, inter = config["hidden_size"], config["intermediate_size"]
    kv = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
    block = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inter + 2 * hidden
    return row.bytes_per_parameter * parameters / row.processes, 2.0 * max(block, hidden * config["vocab_size"])


def cells(row: Row, record: dict[str, Any]) -> list[str]:
    shared, layer = formula(row, record["parameters"])
    own = max(p - b for p, b in zip(record["peaks"], record["base"], strict=True))
    numbers = (max(record["peaks"]), max(record["base"]), own, shared + layer)
    over = own - shared - layer
    return [f"{row.size}, {row.what}", str(row.processes), *(f"{n / 1e9:.2f}" for n in numbers), f"{over / 1e9:+.2f}"]


def line(row: Row, record: dict[str, Any]) -> str:
    return " | ".join(cells(row, record))


def table(found: dict[str, Any]) -> list[str]:
    import torch
    from results_file import markdown_table

    columns = ("in memory", "processes", "peak, GB", "of which interpreter", "without it", "formula", "above it")
    rows = [cells(row, found[row.name]) for row in ROWS if row.name in found]
    return [
        "# Host memory of a sharded training",
        "",
        "`python benchmarks/host_memory.py`: the largest of the processes, in GB (10^9 bytes). FSDP2 on the CPU, weights and state in bf16, rows of 8",
        f"tokens. {platform.machine()}, torch {torch.__version__}.",
        "",
        *markdown_table(columns, rows),
        "",
        "Formula: (weights + state) / processes + one layer (the largest of embedding, head and blocks, in bf16).",
    ]


def process() -> int:
    """One process of a training: notes its peak, and leaves at the moment asked for."""
    import torch
    from launched import pretend_accelerator

    from hf_grow.cli import main as hf_grow
    from hf_grow.training.trainer.callbacks import GrowthCallback
    from hf_grow.training.trainer.trainer import BaseGrowTrainer

    torch.set_num_threads(1)
    pretend_accelerator()
    until, target = os.environ["HOST_MEMORY_UNTIL"], Path(f"facts-{os.environ['RANK']}.json").absolute()
    facts: dict[str, Any] = {}

    def note(leave: bool) -> None:
        with open("/proc/self/status") as file:
            facts["peak"] = next(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM"))
        target.write_text(json.dumps(facts))
        if leave:
            torch.distributed.barrier()
            os._exit(0)

    begin, step = GrowthCallback.on_train_begin, BaseGrowTrainer.monitor_step

    def begun(self: GrowthCallback, *args: Any, **more: Any) -> None:
        begin(self, *args, **more)
        facts["parameters"] = sum(p.numel() for p in self.trainer.model.parameters())
        note(until == "begin")

    def stepped(self: BaseGrowTrainer) -> None:
        step(self)
        note(until == "step")

    GrowthCallback.on_train_begin, BaseGrowTrainer.monitor_step = begun, stepped  # type: ignore[method-assign]
    status = hf_grow()
    note(False)
    return status


if __name__ == "__main__":
    sys.exit(process() if "HOST_MEMORY_UNTIL" in os.environ and "RANK" in os.environ else main())
