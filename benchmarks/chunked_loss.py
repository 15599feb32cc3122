"""Peak memory and CPU time of distillation with the loss in chunks, and with whole logits.

    python benchmarks/chunked_loss.py [--vocabulary 131072] [--hidden 192] [--length 1024] [--steps 3] [--rounds 3]

Each arm trains a tied Llama of two layers with a teacher of the same shape, one sequence a step, in a process of its own; arms take turns. Memory is
VmHWM of the process above what it held before the first step; time is CPU time per step, on one thread. Result: results/chunked-loss.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from results_file import RESULTS, command_line, markdown_table

ARMS = ("whole logits", "in chunks")


def peak_bytes() -> int:
    """VmHWM of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def train(folder: Path, arm: str, length: int, steps: int) -> dict[str, float]:
    """One arm, in this process: bytes and CPU seconds a step."""
    from hf_grow import GrowConfig, GrowTrainer

    torch.set_num_threads(1)
    vocabulary = int(json.loads((folder / "student" / "config.json").read_text())["vocab_size"])
    rows = [{"input_ids": ids} for ids in torch.randint(0, vocabulary, (steps, length), generator=torch.Generator().manual_seed(0))]
    config = GrowConfig(
        str(folder / arm), chunked_loss=arm == ARMS[1], distill={"teachers": [{"model": str(folder / "teacher")}]}, seq_length=length,
        per_device_train_batch_size=1, max_steps=steps, use_cpu=True, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = GrowTrainer(str(folder / "student"), args=config, train_dataset=rows)
    before, begun = peak_bytes(), time.process_time()
    trainer.train()
    return {"bytes": peak_bytes() - before, "seconds": (time.process_time() - begun) / steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"vocabulary": 131072, "hidden": 192, "length": 1024, "steps": 3, "rounds": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=RESULTS / "chunked-loss.md")
    parser.add_argument("--arm", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm is not None:
        print(json.dumps(train(Path(options.arm[0]), options.arm[1], options.length, options.steps)))
        return
    config = transformers.LlamaConfig(
        vocab_size=options.vocabulary, hidden_size=options.hidden, intermediate_size=4 * options.hidden, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=options.length, tie_word_embeddings=True,
    )  # fmt: skip
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory() as folder:
        for seed, name in enumerate(("student", "teacher")):
            torch.manual_seed(seed)
            transformers.LlamaForCausalLM(config).save_pretrained(Path(folder) / name)
        for number in range(options.rounds):
            for arm in ARMS if number % 2 else ARMS[::-1]:
                words = ["--length", str(options.length), "--steps", str(options.steps), "--arm", folder, arm]
                done = subprocess.run([sys.executable, __file__, *words], check=True, capture_output=True, text=True)
                found[arm].append(json.loads(done.stdout.splitlines()[-1]))
                print(f"round {number + 1}, {arm}: {found[arm][-1]}", file=sys.stderr)
    middle = {arm: {k: statistics.median(f[k] for f in runs) for k in runs[0]} for arm, runs in found.items()}
    columns = ("loss", "memory above the start, GB", "CPU seconds a step")
    lines = "\n".join(markdown_table(columns, [(arm, f"{m['bytes'] / 1e9:.2f}", f"{m['seconds']:.2f}") for arm, m in middle.items()]))
    given = command_line("chunked_loss", options, ("vocabulary", "hidden", "length", "steps", "rounds"))
    options.out.write_text(
        f"# Distillation with the loss in chunks\n\n`{given}`: medians of {options.rounds} rounds. "
        f"{platform.machine()}, 1 thread,\ntorch {torch.__version__}, transformers {transformers.__version__}.\n\n{lines}\n"
    )
    print(options.out.read_text())


if __name__ == "__main__":
    main()
