"""`hf-grow merge ADAPTER -o OUT`: merges a LoRA adapter, with or without replicated layers, into a plain checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from hf_grow.cli import render
from hf_grow.cli.commands import add_json, existing_folder, print_json, show_next


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", help="folder that peft saved, or a checkpoint of a training with `lora`")
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

    out = Path(arguments.output)
    merged = merge_adapter(
        existing_folder(arguments.adapter), out, base=arguments.base, revision=arguments.revision, overwrite=arguments.overwrite,
        dtype=arguments.dtype, notify=render.note,
    )  # fmt: skip
    if arguments.json:
        print_json({"output": str(out), "base": merged.base, "layers": merged.layers, "grown": merged.plan is not None})
    else:
        how = "with replicated layers" if merged.plan else "into its own layers"
        render.console.print(f"merged     {out}: {arguments.adapter} and {merged.base}, {how} ({merged.layers} layers)", markup=False)
        show_next("inspect", out)
    return 0
