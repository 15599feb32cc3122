"""Layer maps and lineages in the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from hf_grow.publish.layer_map import DESCRIPTIONS, Kind, LayerMap
from hf_grow.publish.lineage import Node

GLYPHS: dict[Kind, tuple[str, str, str]] = {
    "kept": ("█", "#", "blue"),
    "copy": ("▒", "=", "yellow"),
    "average": ("~", "~", "magenta"),
    "identity": ("+", "+", "green"),
}
"""Kind of layer -> glyph in Unicode, in ASCII, and colour. The glyphs differ too, so that colour is not needed."""
LAYERS_PER_LINE = 64
MAX_RUNS = 32
INNER_AXES = ("hidden", "inter", "expert_inter", "kv", "group", "head_dim", "experts")


def show_layer_map(console: Console, layers: LayerMap) -> None:
    """One glyph per layer, then one row for each run of layers that are consecutive in the source too."""
    strips = Table(title="layer map", title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False)
    source: list[Kind] = ["kept"] * layers.source.layers
    for title, kinds in (("source", source), ("target", [b.kind for b in layers.blocks])):
        for start in range(0, len(kinds), LAYERS_PER_LINE):
            line = Text.assemble(*(_glyph(console, kind) for kind in kinds[start : start + LAYERS_PER_LINE]))
            strips.add_row("" if start else title, str(start), line)
    console.print(strips)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("layers", "", "from", ""):
        table.add_column(column, justify="right" if column else "left")
    runs = layers.runs()
    for run in runs[:MAX_RUNS]:
        table.add_row(run.target, _glyph(console, run.kind), run.source, DESCRIPTIONS[run.kind])
    console.print(table)
    if len(runs) > MAX_RUNS:
        console.print(f"... and {len(runs) - MAX_RUNS} more runs (--json lists all, --picture draws them)", style="dim")
    for text in _changes_inside(layers):
        console.print(text, markup=False)


def _glyph(console: Console, kind: Kind) -> Text:
    unicode, ascii_, colour = GLYPHS[kind]
    return Text(ascii_ if console.options.ascii_only else unicode, colour)


def _changes_inside(layers: LayerMap) -> Iterator[str]:
    """What changed within the layers: further checkpoints, and sizes."""
    old, new = layers.source, layers.target
    changed = [f"{axis} {old.size(axis) or '-'} -> {new.size(axis) or '-'}" for axis in INNER_AXES if old.size(axis) != new.size(axis)]
    if layers.further:
        yield f"with       {len(layers.further)} further checkpoints in every layer"
    if changed:
        yield "inside     " + ", ".join(changed)


def show_lineage(console: Console, root: Node) -> None:
    """The tree of the checkpoints that ``root`` was grown from."""
    tree = Tree(Text(root.text, "bold"), guide_style="dim")
    _add_parents(tree, root)
    console.print("lineage", style="bold")
    console.print(tree, soft_wrap=False)  # soft wrapping would cut off long lines of a tree


def _add_parents(tree: Tree, node: Node) -> None:
    for parent in node.parents:
        _add_parents(tree.add(Text(parent.text)), parent)
