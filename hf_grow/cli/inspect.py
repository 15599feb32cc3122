"""`hf-grow inspect MODEL`: size, architecture, lineage and layer map of a checkpoint, without reading its weights."""

from __future__ import annotations

import argparse
import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from hf_grow.checkpoint.provenance import describe_training, training_stages, training_totals
from hf_grow.checkpoint.source import open_source
from hf_grow.cli import render
from hf_grow.cli.commands import add_json, add_source, print_json
from hf_grow.cli.pictures import show_layer_map, show_lineage
from hf_grow.common.units import format_bytes
from hf_grow.errors import InputError, SourceError
from hf_grow.growth.plan import HEAD, GrowthPlan, check_source
from hf_grow.model.architecture import Entry
from hf_grow.model.family import AXES
from hf_grow.model.param_count import count_parameters, format_count
from hf_grow.publish.layer_map import layer_map
from hf_grow.publish.lineage import Node, lineage
from hf_grow.publish.names import public_ref
from hf_grow.publish.picture import save_picture

if TYPE_CHECKING:
    from hf_grow.checkpoint.reader import Checkpoint
    from hf_grow.publish.layer_map import LayerMap


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source(parser)
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the layer map of a grown checkpoint into FILE (.svg or .png)")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    checkpoint = open_source(arguments.source, revision=arguments.revision, weights=False, notify=render.note)
    plan, layers = _growth(checkpoint)
    tree = lineage(_name(checkpoint), checkpoint.info.history, plan.source.donors if plan else None, checkpoint.revision)
    facts = _facts(checkpoint, tree, layers)
    if arguments.picture:
        if plan is None or layers is None:
            raise InputError(f"{checkpoint.ref} was not grown by hf-grow: it has no layer map.", hint="Remove --picture.")
        save_picture(layers, public_ref(plan.source.ref, plan.source.revision), _name(checkpoint), arguments.picture)
        render.note(f"wrote {arguments.picture}")
    if arguments.json:
        print_json(facts)
        return 0
    _show(checkpoint, facts, tree)
    if tree.parents:
        show_lineage(render.console, tree)
    if layers:
        show_layer_map(render.console, layers)
    return 0


def _facts(checkpoint: Checkpoint, tree: Node, layers: LayerMap | None) -> dict[str, Any]:
    """What --json prints."""
    unknown_tensors = check_source(checkpoint.info)
    arch = checkpoint.info.architecture
    size = count_parameters(arch)
    parts: Counter[str] = Counter()
    for entry in arch.tensors.values():
        parts[_part(entry)] += math.prod(entry.shape)
    return {
        "model": checkpoint.ref,
        "revision": checkpoint.revision,
        "architecture": arch.family.architecture,
        "layers": arch.layers,
        "axes": {axis: arch.size(axis) for axis in AXES if arch.size(axis)},
        "tied": arch.tied,
        "parameters": size.total,
        "active_parameters": size.active,
        "parts": dict(parts.most_common()),
        "dtypes": dict(Counter(t.dtype for t in checkpoint.tensors.values())),
        "files": {name: file["size"] for name, file in checkpoint.files.items()},
        "not_in_the_table": unknown_tensors,
        "training": training_totals(training_stages(checkpoint.growth)),
        "history": [dict(step) for step in checkpoint.info.history],
        "lineage": tree.to_json(),
        "layer_map": [{"sources": list(b.sources), "kind": b.kind} for b in layers.blocks] if layers else None,
    }


def _show(checkpoint: Checkpoint, facts: dict[str, Any], tree: Node) -> None:
    arch, total = checkpoint.info.architecture, facts["parameters"]
    table = Table(title=f"{checkpoint.ref}: {facts['architecture']}", title_justify="left", title_style="bold", show_header=False)
    active = f", {format_count(facts['active_parameters'])} active" if arch.is_moe else ""
    table.add_row("parameters", f"{format_count(total)} ({total:,}){active}")
    table.add_row("layers", str(arch.layers))
    table.add_row("axes", ", ".join(f"{axis} {size}" for axis, size in facts["axes"].items()))
    table.add_row("embeddings", _tying(checkpoint, arch.tied))
    for part, count in facts["parts"].items():
        table.add_row(part, f"{format_count(count)} ({count / total:.1%})")
    table.add_row("dtypes", ", ".join(f"{count} tensors {dtype}" for dtype, count in facts["dtypes"].items()))
    table.add_row("files", f"{len(checkpoint.files)}, {format_bytes(sum(facts['files'].values()))}")
    if tree.parents:
        table.add_row("grown by", Text(f"{tree.step.split(',')[0]} from {tree.parents[0].name}"))
    if training := describe_training(facts["training"]):
        table.add_row("since then", training)
    render.console.print(table)


def _tying(checkpoint: Checkpoint, tied: bool) -> str:
    if checkpoint.head == "own":
        return f"untied: config.json ties them, but the stored {HEAD} differs, and transformers 5 uses it"
    unknown = tied and HEAD in checkpoint.tensors and not checkpoint.head
    return ("tied" if tied else "untied") + (f", if the stored {HEAD} equals the embedding (its weights were not read)" if unknown else "")


def _growth(checkpoint: Checkpoint) -> tuple[GrowthPlan | None, LayerMap | None]:
    """The growth that made the checkpoint, if growth.json records one that can be read."""
    if checkpoint.growth is None:
        return None, None
    try:
        plan = GrowthPlan.from_json(checkpoint.growth)
        return plan, layer_map(plan)
    except SourceError as error:
        render.note(error.message)
        return None, None


def _name(checkpoint: Checkpoint) -> str:
    return public_ref(checkpoint.ref, checkpoint.revision or "")


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
