"""GrowTrainer on the texts of `trained.recipe`, in this process or in one of several that a launcher starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from launched import environment
from sharded import free_port
from trained import FAST

from hf_grow import L2SP, GrowConfig, GrowTrainer
from hf_grow.training.distributed.launch import close_process_group


def documents(folder: Path, name: str) -> Dataset:
    return Dataset.from_list([json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()])


def config(out: Path, **settings: Any) -> GrowConfig:
    fixed = {**FAST, "weight_decay": 0.0, "adam_beta2": 0.95, "report_to": "none", "disable_tqdm": True, "eval_strategy": "steps"}
    return GrowConfig(str(out), **{**fixed, "train_sampling_strategy": "sequential", "seq_length": 16, **settings})


def train(folder: Path, out: Path, batch: int, **settings: Any) -> None:
    """Trains folder/grown and saves it, plain, at out/saved. ``batch``: rows of one process.

    Evaluations are means over batches, so that of several processes is the same where all rows are full."""
    texts = {n: documents(folder, n) for n in ("old", "new")}
    sets = {n: Dataset.from_list([{"input_ids": [3 + int(w[1:]) for w in d["text"].split()[:16]]} for d in texts[n]]) for n in texts}
    fixed = {**FAST, "adam_epsilon": 1e-2, "eval_strategy": "steps", "report_to": "none", "disable_tqdm": True, "seq_length": 16}
    sizes = {"per_device_train_batch_size": batch, "per_device_eval_batch_size": batch, "train_sampling_strategy": "sequential"}
    args = GrowConfig(str(out), **{**fixed, **sizes, **settings})
    penalty = None if "lora" in settings else L2SP(strength=0.5)
    trainer = GrowTrainer(folder / "grown", args, train_dataset=texts["new"], eval_dataset=sets, regularizer=penalty)
    trainer.train()
    if "lora" in settings:
        trainer.merge_and_unload()
    trainer.save_model(str(out / "saved"))


def train_in_two_processes(folder: Path, out: Path, **settings: Any) -> None:
    common = os.environ | environment("ddp", 2) | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    ranks = [{"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"} for r in (0, 1)]
    command = [sys.executable, __file__, str(folder), str(out), json.dumps(settings)]
    processes = [
        subprocess.Popen(command, env=common | rank, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for rank in ranks
    ]
    printed = [p.communicate(timeout=600)[0] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], "\n".join(text[-6000:] for text in printed)


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]), Path(sys.argv[2]), 1, **json.loads(sys.argv[3]))
    assert torch.distributed.get_world_size() == 2
    close_process_group()  # joins gloo's threads, which may abort the process at exit otherwise
