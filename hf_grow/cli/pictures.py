"""Layer maps and lineages in the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from hf_grow.publish.layer_map import MEANING, Kind, LayerMap
from hf_grow.publish.lineage import Node

GLYPHS: dict[Kind, tuple[str, str, str]] = {
    "kept": ("█", "#", "blue"),
    "copy": ("▒", "=", "yellow"),
    "average": ("~", "~", "magenta"),
    "identity": ("+", "+", "green"),
}
"""In a terminal that knows Unicode; in one that does not; colour. The glyphs differ too, so that colour is not needed."""
ACROSS = 64
MOST_RUNS = 32


def show_layer_map(console: Console, layers: LayerMap) -> None:
    """One glyph a layer, then one row for every run of layers that follow each other in the source too."""
    ascii_only = console.options.ascii_only
    strips = Table(title="layer map", title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False)
    before: list[Kind] = ["kept"] * layers.source.layers
    for title, kinds in (("source", before), ("target", [b.kind for b in layers.blocks])):
        for start in range(0, len(kinds), ACROSS):
            glyphs = Text.assemble(*((_glyph(k, ascii_only), GLYPHS[k][2]) for k in kinds[start : start + ACROSS]))
            strips.add_row("" if start else title, str(start), glyphs)
    console.print(strips)
    runs = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("layers", "", "from", ""):
        runs.add_column(column, justify="right" if column else "left")
    found = layers.runs()
    for run in found[:MOST_RUNS]:
        runs.add_row(run.target, Text(_glyph(run.kind, ascii_only), GLYPHS[run.kind][2]), run.source, MEANING[run.kind])
    console.print(runs)
    if len(found) > MOST_RUNS:
        console.print(f"... and {len(found) - MOST_RUNS} more runs (--json has all, --picture draws them)", style="dim")
    for text in _shapes(layers):
        console.print(text, markup=False)


def _glyph(kind: Kind, ascii_only: bool) -> str:
    return GLYPHS[kind][1 if ascii_only else 0]


def _shapes(layers: LayerMap) -> Iterator[str]:
    """What changed inside the layers."""
    a, b = layers.source, layers.target
    axes = ("hidden", "inter", "expert_inter", "kv", "group", "head_dim", "experts")
    changed = [f"{axis} {a.size(axis) or '-'} -> {b.size(axis) or '-'}" for axis in axes if a.size(axis) != b.size(axis)]
    if layers.further:
        yield f"with       {len(layers.further)} further checkpoints in every layer"
    if changed:
        yield "inside     " + ", ".join(changed)


def show_lineage(console: Console, root: Node) -> None:
    tree = Tree(Text(root.text, "bold"), guide_style="dim")
    _grow(tree, root)
    console.print("lineage", style="bold")
    console.print(tree, soft_wrap=False)  # a tree would cut what does not fit


def _grow(tree: Tree, node: Node) -> None:
    for parent in node.parents:
        _grow(tree.add(Text(parent.text)), parent)
