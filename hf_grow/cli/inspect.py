"""`hf-grow inspect MODEL`: what a checkpoint is, from config and headers alone."""

from __future__ import annotations

import argparse
import math
from collections import Counter
from typing import Any

from rich.table import Table

from hf_grow.architecture import Entry
from hf_grow.checkpoint.source import open_source
from hf_grow.cli import render
from hf_grow.cli.commands import add_json, add_source, print_json
from hf_grow.families import AXES
from hf_grow.methods.sizing import measure, short
from hf_grow.planning import check_source


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    checkpoint = open_source(arguments.source, revision=arguments.revision, weights=False, notify=render.note)
    extra = check_source(checkpoint.info)
    arch = checkpoint.info.architecture
    size = measure(arch)
    parts: Counter[str] = Counter()
    for entry in arch.tensors.values():
        parts[_part(entry)] += math.prod(entry.shape)
    facts: dict[str, Any] = {
        "model": checkpoint.ref,
        "revision": checkpoint.revision,
        "architecture": arch.family.architecture,
        "layers": arch.layers,
        "axes": {axis: arch.size(axis) for axis in AXES if arch.size(axis)},
        "tied": arch.tied,
        "parameters": size.total,
        "active_parameters": size.active,
        "parts": dict(parts),
        "dtypes": dict(Counter(t.dtype for t in checkpoint.tensors.values())),
        "files": {name: facts["size"] for name, facts in checkpoint.files.items()},
        "not_in_the_table": extra,
        "history": [dict(step) for step in checkpoint.info.history],
    }
    if arguments.json:
        print_json(facts)
        return 0
    table = Table(title=f"{checkpoint.ref}: {arch.family.architecture}", title_justify="left", title_style="bold", show_header=False)
    table.add_row("parameters", f"{short(size.total)} ({size.total:,})" + (f", {short(size.active)} active" if arch.is_moe else ""))
    table.add_row("layers", str(arch.layers))
    table.add_row("axes", ", ".join(f"{k} {v}" for k, v in facts["axes"].items()))
    table.add_row("embeddings", "tied" if arch.tied else "untied")
    for part, count in parts.most_common():
        table.add_row(part, f"{short(count)} ({count / size.total:.1%})")
    table.add_row("dtypes", ", ".join(f"{n} tensors {d}" for d, n in facts["dtypes"].items()))
    table.add_row("files", f"{len(checkpoint.files)}, {render.gigabytes(sum(facts['files'].values()))}")
    for step in checkpoint.info.history:
        depth = " -> ".join(map(str, step["layers"]))
        table.add_row("grown by", f"{step['method']} from {step['source']['ref']}, layers {depth}, {step['guarantee']['kind']}")
    render.console.print(table)
    return 0


def _part(entry: Entry) -> str:
    if entry.layer < 0:
        return "embedding" if "embed" in entry.name else "head" if "lm_head" in entry.name else "norms"
    if entry.spec.dims[0].role == "norm":
        return "norms"
    if entry.expert >= 0:
        return "experts"
    if any("experts" in d.axes for d in entry.spec.dims):
        return "router"
    return "attention" if any("head_dim" in d.axes for d in entry.spec.dims) or "self_attn" in entry.name else "FFN"
