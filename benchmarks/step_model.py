"""The small Llama that step benchmarks train, and their common arguments."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers
from results_file import RESULTS

VOCAB = 8192
Sizes = Mapping[str, Mapping[str, int]]
"""Name -> keys of a LlamaConfig."""


def parse_arguments(about: str | None, sizes: Sizes, result: str, **defaults: int | str) -> argparse.Namespace:
    """The arguments of a step benchmark. ``defaults``: size and rounds, and whatever else is a number. Sets threads and seed."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sizes, default=defaults.pop("size"))
    for name, default in {"batch": 8, "length": 256, "threads": 1, **defaults}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=RESULTS / result)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    return options


def make_model(sizes: Sizes, options: argparse.Namespace) -> transformers.LlamaForCausalLM:
    """A tied Llama with random weights."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, max_position_embeddings=options.length, tie_word_embeddings=True, **sizes[options.size]
    )
    return transformers.LlamaForCausalLM(config)
