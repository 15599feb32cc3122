"""The layer map as a picture: source layers left, target layers right, a line from each source layer to its target layers.

The shapes are computed once, then written as SVG (by hand, so that the same map gives the same bytes) or drawn as PNG with matplotlib. The picture
has its own light background for light and dark pages; kinds differ by colour and pattern.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

from hf_grow.common.safe_files import open_regular
from hf_grow.errors import InputError, OutputError
from hf_grow.publish.layer_map import DESCRIPTIONS, Kind, LayerMap, shape_lines
from hf_grow.publish.markdown import line

WIDTH = 640.0
COLUMNS = (170.0, 450.0)
"""Centres of the two columns."""
WIDEST = 150.0
"""Width of the blocks with the larger hidden size; the others in proportion."""
MOST_LAYERS = 1000
MOST_CELLS = 16
"""Experts drawn in a block at most; the text above gives their number."""
MADE_BY = b"drawn by hf-grow"
INK, PAPER, RIM = "#1f2933", "#fcfcf9", "#c9cdd2"
FILL: dict[Kind, str] = {"kept": "#5b8db8", "copy": "#e3a857", "average": "#b58ac2", "identity": PAPER}
LINE: dict[Kind, str] = {"kept": "#5b8db8", "copy": "#c98a2e", "average": "#9565a6", "identity": "#3b7d5c"}
HATCH: dict[Kind, str] = {"kept": "", "copy": "//", "average": "..", "identity": ""}


@dataclass(frozen=True)
class Rect:
    x: float
    y: float
    width: float
    height: float
    kind: Kind


@dataclass(frozen=True)
class Line:
    x1: float
    y1: float
    x2: float
    y2: float
    kind: Kind


@dataclass(frozen=True)
class Text:
    x: float
    y: float
    text: str
    size: float = 11.0
    anchor: str = "middle"
    bold: bool = False


@dataclass
class Drawing:
    height: float
    title: str
    description: str
    shapes: list[Rect | Line | Text] = field(default_factory=list)


def draw(layers: LayerMap, source: str, target: str) -> Drawing:
    """The picture's shapes. Raises InputError for more layers than a picture can show."""
    count = max(layers.source.layers, layers.target.layers)
    if count > MOST_LAYERS:
        raise InputError(f"A picture shows at most {MOST_LAYERS} layers; this model has {count}.")
    pitch = min(22.0, max(6.0, 900 / count))
    top = 42.0 + 16 * max(len(shape_lines(layers.source)) + bool(layers.further), len(shape_lines(layers.target))) + 22
    bottom = top + pitch * count
    drawing = Drawing(
        height=bottom + 24 + 20 * len(layers.kinds),
        title=f"Layer map: {line(layers.method, 60)}, {layers.source.layers} to {layers.target.layers} layers",
        description=layers.describe(),
    )
    hidden = (layers.source.size("hidden"), layers.target.size("hidden"))
    widths = [WIDEST * max(0.2, h / max(hidden)) for h in hidden]
    starts = [top + pitch * (count - n) / 2 for n in (layers.source.layers, layers.target.layers)]
    for column, (arch, name) in zip(COLUMNS, ((layers.source, source), (layers.target, target)), strict=True):
        drawing.shapes.append(Text(column, 28, line(name, 34), 14, bold=True))
        lines = [
            *shape_lines(arch),
            *([f"with {len(layers.further)} more checkpoints"] if layers.further and arch is layers.source else []),
        ]
        drawing.shapes += [Text(column, 48 + 16 * i, fact, 12) for i, fact in enumerate(lines)]
    drawing.shapes += _lines(layers, pitch, starts, widths)
    drawing.shapes += _blocks(layers, pitch, starts, widths)
    for i, kind in enumerate(layers.kinds):
        y = bottom + 16 + 20 * i
        drawing.shapes += [
            Rect(COLUMNS[0] - WIDEST / 2, y, 28, 13, kind),
            Text(COLUMNS[0] - WIDEST / 2 + 38, y + 11, DESCRIPTIONS[kind], 12, "start"),
        ]
    return drawing


def _middle(start: float, pitch: float, index: int) -> float:
    return start + pitch * (index + 0.5)


def _lines(layers: LayerMap, pitch: float, starts: list[float], widths: list[float]) -> Iterator[Line]:
    left, right = COLUMNS[0] + widths[0] / 2, COLUMNS[1] - widths[1] / 2
    for i, block in enumerate(layers.blocks):
        for s in block.sources:
            yield Line(left, _middle(starts[0], pitch, s), right, _middle(starts[1], pitch, i), block.kind)


def _blocks(layers: LayerMap, pitch: float, starts: list[float], widths: list[float]) -> Iterator[Rect | Text]:
    tall = pitch * 0.76
    every = math.ceil(13 / pitch)  # labels of lower blocks would run into each other
    size = min(11.0, 0.62 * pitch * every)

    def block(column: int, index: int, kind: Kind) -> Iterator[Rect]:
        """One rectangle; in a mixture of experts, one per expert."""
        arch = (layers.source, layers.target)[column]
        cells = min(arch.size("experts"), MOST_CELLS) if arch.is_moe and arch.is_sparse(index) else 1
        left, top = COLUMNS[column] - widths[column] / 2, starts[column] + pitch * index + (pitch - tall) / 2
        each = widths[column] / cells
        for cell in range(cells):
            yield Rect(left + cell * each, top, each - (2 if cells > 1 else 0), tall, kind)

    for i in range(layers.source.layers):
        yield from block(0, i, "kept")
        if i % every == 0:
            yield Text(COLUMNS[0] - WIDEST / 2 - 8, _middle(starts[0], pitch, i) + size / 3, str(i), size, "end")
    for i, b in enumerate(layers.blocks):
        yield from block(1, i, b.kind)
        if i % every == 0:
            labels = {"identity": f"{i} new, after {b.sources[0]}", "average": f"{i} from {' ~ '.join(map(str, b.sources[:4]))}"}
            text = labels.get(b.kind, f"{i} from {b.sources[0]}")
            yield Text(COLUMNS[1] + WIDEST / 2 + 8, _middle(starts[1], pitch, i) + size / 3, text, size, "start")


def save_picture(layers: LayerMap, source: str, target: str, path: Path) -> None:
    """Writes the picture to `path` as SVG or PNG, by its suffix; replaces only a picture of hf-grow. Raises InputError, OutputError."""
    kind = path.suffix.lower()
    if kind not in (".svg", ".png"):
        raise InputError(f"{path} is not a picture file.", hint="Use a name that ends in .svg or .png.")
    temporary = path.with_name(path.name + ".new")
    try:
        if path.exists() and not _ours(path):
            raise OutputError(f"{path} exists, and hf-grow did not draw it.", hint="Use another name, or remove it.")
        drawing = draw(layers, source, target)
        try:
            if kind == ".svg":
                temporary.write_text(to_svg(drawing), encoding="utf-8", newline="\n")
            else:
                to_png(drawing, temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"Cannot write {path}: {error.strerror}.") from None


def _ours(path: Path) -> bool:
    with open_regular(path) as handle:
        return MADE_BY in handle.read(4096)


def to_svg(drawing: Drawing) -> str:
    """SVG with a title and a description for screen readers; no script, no outside resource."""
    w, h = _number(WIDTH), _number(drawing.height)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{w}" height="{h}" viewBox="0 0 {w} {h}" role="img" aria-labelledby="title desc">',
        f"<!-- {MADE_BY.decode()} -->",
        f'<title id="title">{escape(drawing.title)}</title>',
        f'<desc id="desc">{escape(drawing.description)}</desc>',
        "<defs>",
        _pattern("copy", '<path d="M-1,1 l2,-2 M0,6 l6,-6 M5,7 l2,-2" stroke="#7a4f10" stroke-width="1.2"/>'),
        _pattern("average", '<circle cx="3" cy="3" r="1.2" fill="#4d2a5a"/>'),
        "</defs>",
        f'<rect width="{w}" height="{h}" rx="8" fill="{PAPER}" stroke="{RIM}"/>',
        f'<g font-family="Helvetica, Arial, sans-serif" fill="{INK}">',
    ]
    out += [_svg_shape(s) for s in drawing.shapes]
    return "\n".join([*out, "</g>", "</svg>", ""])


def _pattern(kind: Kind, inside: str) -> str:
    ground = f'<rect width="6" height="6" fill="{FILL[kind]}"/>'
    return f'<pattern id="{kind}" width="6" height="6" patternUnits="userSpaceOnUse">{ground}{inside}</pattern>'


def _svg_shape(shape: Rect | Line | Text) -> str:
    if isinstance(shape, Text):
        weight = ' font-weight="bold"' if shape.bold else ""
        place = f'x="{_number(shape.x)}" y="{_number(shape.y)}" font-size="{_number(shape.size)}" text-anchor={quoteattr(shape.anchor)}'
        return f"<text {place}{weight}>{escape(shape.text)}</text>"
    if isinstance(shape, Line):
        ends = " ".join(f'{n}="{_number(getattr(shape, n))}"' for n in ("x1", "y1", "x2", "y2"))
        dashes = ' stroke-dasharray="5 3"' if shape.kind == "identity" else ""
        return f'<line {ends} stroke="{LINE[shape.kind]}" stroke-width="1" stroke-opacity="0.7"{dashes}/>'
    fill = f"url(#{shape.kind})" if HATCH[shape.kind] else FILL[shape.kind]
    dashes = ' stroke-dasharray="4 2"' if shape.kind == "identity" else ""
    place = " ".join(f'{n}="{_number(getattr(shape, n))}"' for n in ("x", "y", "width", "height"))
    return f'<rect {place} rx="2" fill="{fill}" stroke="{LINE[shape.kind]}"{dashes}/>'


def _number(value: float) -> str:
    return f"{round(value, 2):g}" if abs(value) < 1e4 else f"{value:.2f}"


def to_png(drawing: Drawing, path: Path, *, scale: float = 2.0) -> None:
    """Draws the same with matplotlib (extra `plot`), at `scale` pixels a unit. Raises InputError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
        from matplotlib.patches import Rectangle
    except ImportError:
        raise InputError("PNG needs matplotlib.", hint="pip install 'hf-grow[plot]', or write a picture that ends in .svg.") from None
    figure = Figure(figsize=(WIDTH / 100, drawing.height / 100), dpi=100 * scale, facecolor=PAPER)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(drawing.height, 0))
    axes.set_axis_off()
    for s in drawing.shapes:
        if isinstance(s, Text):
            side = {"start": "left", "end": "right"}.get(s.anchor, "center")
            axes.text(s.x, s.y, s.text, fontsize=0.72 * s.size, color=INK, ha=side, weight="bold" if s.bold else None, parse_math=False)
        elif isinstance(s, Line):
            style = "--" if s.kind == "identity" else "-"
            axes.add_line(Line2D([s.x1, s.x2], [s.y1, s.y2], color=LINE[s.kind], linewidth=0.7, alpha=0.7, linestyle=style, zorder=1))
        else:
            style = "--" if s.kind == "identity" else "-"
            patch = Rectangle((s.x, s.y), s.width, s.height, linewidth=0.7, linestyle=style, zorder=2)
            patch.set(facecolor=FILL[s.kind], edgecolor=LINE[s.kind], hatch=HATCH[s.kind])
            axes.add_patch(patch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a letter that the font has not
        figure.savefig(path, format="png", facecolor=PAPER, metadata={"Software": MADE_BY.decode(), "Title": drawing.title})
