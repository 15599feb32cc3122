"""`hf-grow merge ADAPTER -o OUT`: merges a LoRA adapter, or the shards of a checkpoint (FSDP2), into a plain checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from hf_grow.cli import render
from hf_grow.cli.commands import add_json, existing_folder, print_json, show_next
from hf_grow.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "adapter", metavar="ADAPTER", help="folder that peft saved, or a checkpoint of a training with `lora` or under FSDP2"
    )
    parser.add_argument("-o", "--output", metavar="DIR", required=True, help="folder to write")
    parser.add_argument("--base", metavar="MODEL", help="base model of the adapter; default: the one that its config names")
    parser.add_argument("--revision", help="branch, tag or commit of the base on the Hub")
    parser.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="dtype to merge in and to write"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    from hf_grow.training.peft.merge import merge_adapter
    from hf_grow.training.sharding.shard_files import sharded_weights

    out, folder = Path(arguments.output), existing_folder(arguments.adapter)
    if sharded_weights(folder) is not None:
        return _merge_shards(arguments, folder, out)
    merged = merge_adapter(
        folder, out, base=arguments.base, revision=arguments.revision, overwrite=arguments.overwrite,
        dtype=arguments.dtype, notify=render.note,
    )  # fmt: skip
    if arguments.json:
        print_json({"output": str(out), "base": merged.base, "layers": merged.layers, "grown": merged.plan is not None})
    else:
        how = "with replicated layers" if merged.plan else "into its own layers"
        render.console.print(f"merged     {out}: {arguments.adapter} and {merged.base}, {how} ({merged.layers} layers)", markup=False)
        show_next("inspect", out)
    return 0


def _merge_shards(arguments: argparse.Namespace, folder: Path, out: Path) -> int:
    from hf_grow.training.sharding.merge_shards import merge_shards

    if arguments.base or arguments.revision:
        raise InputError(f"{folder} holds the shards of a whole model, which has no base.", hint="Remove --base and --revision.")
    layers = merge_shards(folder, out, dtype=arguments.dtype, overwrite=arguments.overwrite)
    if arguments.json:
        print_json({"output": str(out), "base": None, "layers": layers, "grown": False})
    else:
        render.console.print(f"merged     {out}: the shards of {folder} ({layers} layers)", markup=False)
        show_next("inspect", out)
    return 0
