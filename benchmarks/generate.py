"""Writes a checkpoint of random weights, fast and in little memory: `python benchmarks/generate.py 1b FOLDER`.

The shapes are those of real models. One buffer of N(0, 0.02) in bfloat16 is drawn once and written repeatedly from different offsets, so that
neighbouring tensors differ and no file system can compress the file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hf_grow.checkpoint.reader import INDEX
from hf_grow.checkpoint.transfer import write_all
from hf_grow.checkpoint.writer import Shard, build_index, check_disk_space, layout
from hf_grow.growth.source_info import TensorInfo
from hf_grow.model.architecture import Architecture

STD = 0.02
VALUES = 1 << 23  # 16 MiB of bfloat16
WRITE = 1 << 20
STRIDE = 1_000_003  # prime, so that each tensor starts at another offset of the buffer

_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "max_position_embeddings": 2048,
          "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
          "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip

CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": {**_LLAMA, "vocab_size": 8000, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "num_attention_heads": 8,
             "num_key_value_heads": 4},
    "small": {**_LLAMA, "vocab_size": 16000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12,
              "num_attention_heads": 16, "num_key_value_heads": 4},
    # TinyLlama-1.1B
    "1b": {**_LLAMA, "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
           "num_attention_heads": 32, "num_key_value_heads": 4},
    # Mistral-7B-v0.1, its config.json unchanged
    "7b": {"architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096,
           "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
           "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
           "sliding_window": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0",
           "use_cache": True, "vocab_size": 32000},
}  # fmt: skip
SHARD_SIZES = {"tiny": 20 * 10**6, "small": 10**8, "1b": 10**9, "7b": 5 * 10**9}


def shards_of(config: Mapping[str, Any], shard_size: int) -> list[Shard]:
    return layout({e.name: TensorInfo("BF16", e.shape) for e in Architecture(config).tensors.values()}, shard_size)


def generate(folder: Path, config: Mapping[str, Any], shard_size: int, seed: int = 0) -> int:
    """Writes the checkpoint and returns its size in bytes. Matrices are N(0, 0.02), norm weights 1. The folder must not exist."""
    shards = shards_of(config, shard_size)
    total = sum(s.size for s in shards)
    check_disk_space(folder, total)
    folder.mkdir(parents=True)
    values = _bfloat16(np.random.default_rng(seed).standard_normal(VALUES, dtype=np.float32) * np.float32(STD))
    ones = _bfloat16(np.ones(VALUES >> 7, np.float32))
    offset = 0
    for shard in shards:
        with (folder / shard.file).open("wb", buffering=0) as file:
            write_all(file.fileno(), shard.header, 0)
            for slot in shard.slots:
                gain = slot.name.endswith("norm.weight")
                _fill(file.fileno(), slot.start, slot.stop, ones if gain else values, 0 if gain else offset)
                offset = (offset + STRIDE) % VALUES
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if index := build_index(shards):
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return total


def _bfloat16(values: np.ndarray[Any, np.dtype[np.float32]]) -> memoryview:
    """The bytes of finite fp32 values rounded to bfloat16 (round half to even)."""
    bits = values.view(np.uint32)
    return memoryview(((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)).cast("B")


def _fill(target: int, at: int, stop: int, values: memoryview, first: int) -> None:
    """Fills bytes [at, stop) with the values from index ``first`` on, starting over at their end."""
    begin = 2 * first
    while at < stop:
        piece = values[begin : begin + min(WRITE, stop - at)]
        write_all(target, piece, at)
        at += len(piece)
        begin = (begin + len(piece)) % len(values)


def main() -> int:
    parser = argparse.ArgumentParser(description="Write a checkpoint of random weights.")
    parser.add_argument("size", choices=list(CONFIGS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="number of layers, if not the default")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    config = CONFIGS[arguments.size]
    if arguments.layers:
        config = {**config, "num_hidden_layers": arguments.layers}
    total = generate(arguments.folder, config, SHARD_SIZES[arguments.size], arguments.seed)
    print(f"wrote {arguments.folder}: {total / 1e9:.2f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
