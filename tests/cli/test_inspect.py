"""`hf-grow inspect`: facts, lineage and layer map of a checkpoint, in the terminal, as SVG and as PNG."""

from __future__ import annotations

import io
import json
import re
import struct
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import cards
import pytest
from models import BY_NAME, make, save
from rich.console import Console

from hf_grow import api
from hf_grow.cli import main, render
from hf_grow.cli.pictures import show_layer_map, show_lineage
from hf_grow.errors import InputError, OutputError, SourceError
from hf_grow.growth.growth import LayerOrigin
from hf_grow.growth.plan import GrowthPlan, make_plan
from hf_grow.growth.source_info import SourceInfo, TensorInfo
from hf_grow.methods import METHODS
from hf_grow.model.architecture import Architecture
from hf_grow.options import parse
from hf_grow.publish.layer_map import layer_map, layer_ranges
from hf_grow.publish.lineage import hub_ancestors, lineage
from hf_grow.publish.picture import draw, save_picture, to_svg

SVG = "{http://www.w3.org/2000/svg}"


def plan_of(method: str, layers: int = 4, **options: Any) -> GrowthPlan:
    config = {**BY_NAME["mistral"].config, "num_hidden_layers": layers}
    arch = Architecture(config)
    tensors = {name: TensorInfo("F32", entry.shape) for name, entry in arch.tensors.items()}
    parsed = parse(METHODS[method].options, options, where="test", strict=False)
    return make_plan(SourceInfo("org/small", cards.COMMIT, config, tensors), METHODS[method].build(arch, parsed))


def shown(show: Any, what: Any, *, encoding: str = "utf-8") -> str:
    """The output in a terminal of 100 columns."""
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding=encoding), width=100, highlight=False, color_system=None)
    show(console, what)
    console.file.flush()
    return raw.getvalue().decode(encoding)


# The map


def test_the_kinds_of_layers() -> None:
    def kinds(*args: Any, **options: Any) -> list[str]:
        return [b.kind for b in layer_map(plan_of(*args, **options)).blocks]

    assert kinds("dus", layers_to=6) == ["kept"] * 3 + ["copy"] * 2 + ["kept"]
    assert kinds("identity", layers_to=6) == ["kept", "kept", "identity", "kept", "kept", "identity"]
    assert kinds("dus", 8, layers_to=12, seam_average=1) == ["kept"] * 5 + ["average"] * 2 + ["copy"] * 3 + ["kept"] * 2
    assert kinds("tile", factor=2) == ["kept"] * 4


def test_runs_follow_source_and_target() -> None:
    layers = layer_map(plan_of("dus", 32, layers_to=48))
    assert [(r.target, r.source, r.kind) for r in layers.runs()] == [
        ("0-23", "0-23", "kept"),
        ("24-39", "8-23", "copy"),
        ("40-47", "24-31", "kept"),
    ]
    assert layers.describe() == (
        "32 layers become 48. Target layers: 0-23 from 0-23 (layer of the source); 24-39 from 8-23 (further copy of a layer); "
        "40-47 from 24-31 (layer of the source)."
    )
    runs = layer_map(plan_of("interleave", factor=2)).runs() if "factor" in METHODS["interleave"].options.model_fields else []
    assert all(r.stop - r.start == 1 for r in runs)


def test_ranges_as_plans_print_them() -> None:
    layers = [
        LayerOrigin((0,)),
        LayerOrigin((1,)),
        LayerOrigin((1,), new=True, identity=True),
        LayerOrigin((2, 0), (0.5, 0.5)),
        LayerOrigin((3,)),
    ]
    assert layer_ranges(layers) == "0-1, 1+, 2~0, 3"
    assert render.layer_ranges is layer_ranges


@pytest.mark.parametrize("sources", [["0"], [-1], [4], [True], [], [1.0]])
def test_impossible_layers_are_refused(sources: list[Any]) -> None:
    record = json.loads(json.dumps(plan_of("dus", layers_to=6).to_json()))
    record["growth"]["layers"][2]["sources"] = sources
    with pytest.raises(SourceError, match=r"growth\.json is damaged"):
        layer_map(GrowthPlan.from_json(record))


# The pictures


def svg_of(plan: GrowthPlan, source: str = "small", target: str = "large") -> tuple[str, ElementTree.Element]:
    text = to_svg(draw(layer_map(plan), source, target))
    return text, ElementTree.fromstring(text)


def test_the_svg_has_a_block_for_every_layer_and_a_line_for_every_origin() -> None:
    plan = plan_of("dus", 8, layers_to=12, seam_average=1)
    text, root = svg_of(plan)
    blocks = [b for b in root.iter(f"{SVG}rect") if b.get("width") not in ("640", "28", "6")]  # ground, legend and patterns
    assert len(blocks) == 8 + 12
    assert [b.get("fill") for b in blocks[8:]].count("url(#copy)") == 3
    assert [b.get("fill") for b in blocks[8:]].count("url(#average)") == 2
    lines = list(root.iter(f"{SVG}line"))
    assert len(lines) == sum(len(o.sources) for o in plan.growth.layers) == 14
    left = [float(b.get("y", 0)) + float(b.get("height", 0)) / 2 for b in blocks[:8]]
    right = [float(b.get("y", 0)) + float(b.get("height", 0)) / 2 for b in blocks[8:]]
    ends = sorted(
        (left.index(pytest.approx(float(n.get("y1", 0)), abs=0.02)), right.index(pytest.approx(float(n.get("y2", 0)), abs=0.02)))
        for n in lines
    )
    assert ends == sorted((s, i) for i, o in enumerate(plan.growth.layers) for s in o.sources)
    assert {"12 layers", "8 layers", "small", "large", "average of layers"} <= {t.text for t in root.iter(f"{SVG}text")}
    assert text == svg_of(plan)[0]


def test_the_svg_has_a_text_alternative() -> None:
    _, root = svg_of(plan_of("identity", layers_to=6))
    title, desc = root.find(f"{SVG}title"), root.find(f"{SVG}desc")
    assert root.get("role") == "img"
    assert title is not None and desc is not None
    assert root.get("aria-labelledby") == f"{title.get('id')} {desc.get('id')}"
    assert title.text == "Layer map: identity, 4 to 6 layers"
    assert "2 from 1 (adds nothing until trained)" in (desc.text or "")


def test_the_svg_has_its_own_background_and_loads_nothing() -> None:
    """Readable on dark pages too, and safe in an <img>, where nothing is loaded or run."""
    text, root = svg_of(plan_of("dus", layers_to=6))
    ground = next(r for r in root.iter(f"{SVG}rect") if r.get("rx") == "8")
    assert (ground.get("width"), ground.get("height")) == (root.get("width"), root.get("height"))
    assert ground.get("fill", "").startswith("#")
    assert not re.search(r"href|<script|<style|<image|url\((?!#)", text)


def test_widths_and_experts_are_drawn() -> None:
    _, root = svg_of(plan_of("tile", factor=2))
    widths = [float(b.get("width", 0)) for b in root.iter(f"{SVG}rect")][3:11]
    assert widths == [75.0] * 4 + [150.0] * 4
    assert {"hidden size 48", "hidden size 96"} <= {t.text for t in root.iter(f"{SVG}text")}
    _, root = svg_of(plan_of("experts", experts=4))
    assert len([b for b in root.iter(f"{SVG}rect") if b.get("width") == "35.5"]) == 4 * 4
    assert "4 experts, 2 per token" in {t.text for t in root.iter(f"{SVG}text")}


def test_names_cannot_leave_their_text() -> None:
    text, root = svg_of(plan_of("dus", layers_to=6), "</text><script>alert(1)</script>", "a\x00\x1b[31m&\n'\"b")
    assert "<script" not in text
    assert "a [31m& '\"b" in {t.text for t in root.iter(f"{SVG}text")}


def test_png_is_drawn_with_the_same_proportions(tmp_path: Path) -> None:
    layers = layer_map(plan_of("dus", 8, layers_to=12, seam_average=1))
    save_picture(layers, "$x^2$ small", "large", tmp_path / "map.png")
    data = (tmp_path / "map.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", data[16:24])
    assert width == 1280
    assert abs(height - 2 * draw(layers, "a", "b").height) <= 2
    save_picture(layers, "small", "large", tmp_path / "map.png")  # its own work may be replaced


def test_a_picture_replaces_no_other_file(tmp_path: Path) -> None:
    layers = layer_map(plan_of("dus", layers_to=6))
    (tmp_path / "mine.svg").write_text("<svg/>")
    with pytest.raises(OutputError, match="hf-grow did not draw it"):
        save_picture(layers, "a", "b", tmp_path / "mine.svg")
    with pytest.raises(InputError, match=r"ends in \.svg or \.png"):
        save_picture(layers, "a", "b", tmp_path / "map.pdf")
    with pytest.raises(OutputError, match="Cannot write"):
        save_picture(layers, "a", "b", tmp_path / "no" / "map.svg")
    assert (tmp_path / "mine.svg").read_text() == "<svg/>"


def test_too_many_layers_for_a_picture() -> None:
    with pytest.raises(InputError, match="at most 1000 layers"):
        draw(layer_map(plan_of("stack", 600)), "a", "b")
    root = ElementTree.fromstring(to_svg(draw(layer_map(plan_of("stack", 126)), "a", "b")))
    labels = [t for t in root.iter(f"{SVG}text") if t.get("text-anchor") == "end"]
    assert 126 / 3 <= len(labels) < 126  # they would run into each other


def test_without_matplotlib_png_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match="PNG needs matplotlib") as refused:
        save_picture(layer_map(plan_of("dus", layers_to=6)), "a", "b", tmp_path / "map.png")
    assert "hf-grow[plot]" in refused.value.hint


# The terminal


def test_the_layer_map_in_the_terminal() -> None:
    said = shown(show_layer_map, layer_map(plan_of("dus", 32, layers_to=48)))
    assert f"target  0  {'█' * 24}{'▒' * 16}{'█' * 8}" in said
    assert re.search(r"24-39\s+▒\s+8-23\s+further copy of a layer", said)
    plain = shown(show_layer_map, layer_map(plan_of("identity", layers_to=6)), encoding="ascii")
    assert "target  0  ##+##+" in plain
    wide = shown(show_layer_map, layer_map(plan_of("tile", factor=2)))
    assert "hidden 48 -> 96" in wide
    assert "experts - -> 4" in shown(show_layer_map, layer_map(plan_of("experts", experts=4)))
    many = shown(show_layer_map, layer_map(plan_of("interleave", 40, layers_to=80)))
    assert "... and 48 more runs" in many
    assert "\ntarget  0 " in many and "\n        64 " in many


# The lineage

HISTORY = [
    {"source": {"ref": "org/first", "revision": cards.COMMIT}, "method": "tile", "options": {}, "layers": [4, 4],
     "guarantee": {"kind": "lossless", "because": ""}},
    {"source": {"ref": "/home/me/second", "revision": ""}, "method": "dus", "options": {}, "layers": [4, 6],
     "guarantee": {"kind": "changes the function", "because": ""}},
]  # fmt: skip


def test_the_lineage_reaches_the_first_ancestor_and_the_further_sources() -> None:
    plan = plan_of("dus", layers_to=6)
    coder = SourceInfo("org/coder", cards.COMMIT, plan.source.config, plan.source.tensors, {}, tuple(HISTORY[:1]))
    tree = lineage("third", HISTORY, {"code": coder})
    assert list(tree.ascii()) == [
        "third, grown by dus, layers 4 -> 6, changes the function",
        "|-- second, grown by tile, layers 4 -> 4, lossless",
        "|   `-- org/first (0123456789ab)",
        "`-- code: org/coder (0123456789ab), grown by tile, layers 4 -> 4, lossless",
        "    `-- org/first (0123456789ab)",
    ]
    said = shown(show_lineage, tree)
    assert "third, grown by dus" in said
    assert re.search(r"├── second.*\n│   └── org/first", said)
    assert hub_ancestors(HISTORY) == [("org/first", cards.COMMIT)]


@pytest.mark.parametrize(
    "history",
    [
        [3], [{}], [{"source": 3}], [{"source": {"ref": None, "revision": 7}, "method": [], "layers": "xx", "guarantee": 1}],
        [{"source": {"ref": "\x1b[31mred", "revision": "\n\n"}, "method": "[bold]x[/]", "layers": [1, 2, 3]}], [{}] * 3000,
    ],
)  # fmt: skip
def test_a_malformed_history_is_ignored(history: list[Any]) -> None:
    tree = lineage("model", history)
    said = shown(show_lineage, tree) + "\n".join(tree.ascii())
    assert "\x1b" not in said
    assert json.dumps(tree.to_json())
    assert hub_ancestors(history) in ([], [("\x1b[31mred", "")])


# The command


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """small -> big (dus) -> wide (tile)."""
    root = tmp_path_factory.mktemp("chain")
    save(make(BY_NAME["mistral"]), root / "small")
    api.grow(root / "small", root / "big", "dus", layers_to=6)
    api.grow(root / "big", root / "wide", "tile", factor=2)
    return root


def test_inspect_shows_facts_lineage_and_layer_map(chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(chain / "wide"), "--picture", str(tmp_path / "map.svg")]) == 0
    said = capsys.readouterr()
    assert "wrote " in said.err
    for line in (
        "tile from big",
        "wide, grown by tile, layers 6 -> 6, lossless",
        "big, grown by dus, layers 4 -> 6",
        "small",
        "hidden 48 -> 96",
    ):
        assert line in said.out
    assert ElementTree.parse(tmp_path / "map.svg").getroot().get("role") == "img"
    assert main(["inspect", str(chain / "small")]) == 0
    plain = capsys.readouterr().out
    assert "lineage" not in plain and "layer map" not in plain


def test_inspect_as_json(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(chain / "big"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["lineage"] == {
        "name": "big", "revision": "", "step": "dus, layers 4 -> 6, changes the function", "label": "",
        "sources": [{"name": "small", "revision": "", "step": "", "label": "", "sources": []}],
    }  # fmt: skip
    assert [b["sources"][0] for b in facts["layer_map"]] == [0, 1, 2, 1, 2, 3]
    assert main(["inspect", str(chain / "small"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["layer_map"] is None
    assert facts["lineage"]["sources"] == []


def test_inspect_refuses_a_picture_of_an_ungrown_checkpoint(chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(chain / "small"), "--picture", str(tmp_path / "map.svg")]) == 2
    assert "was not grown by hf-grow" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_damaged_record_is_reported_and_the_rest_shown(chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "copy"
    api.grow(chain / "small", copy, "dus", layers_to=6)
    record = json.loads((copy / "growth.json").read_text())
    (copy / "growth.json").write_text(json.dumps(record | {"growth": {}}))
    assert main(["inspect", str(copy)]) == 0
    said = capsys.readouterr()
    assert "growth.json is damaged" in said.err
    assert "MistralForCausalLM" in said.out
