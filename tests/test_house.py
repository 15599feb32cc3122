"""How the house is built: floors, what importing costs, and no field of the table that nobody reads."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from dataclasses import fields
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import hf_grow
from hf_grow.methods import METHODS
from hf_grow.methods.pipeline import PIPELINE
from hf_grow.model.families import FAMILIES
from hf_grow.model.family import PREDICATES, Dim, Family, TensorSpec

ROOT = Path(hf_grow.__file__).parent

TABLE = [
    row[1]
    for row in re.finditer(
        r"^\| `([\w/]+(?:/|\.py))` \|", (Path(__file__).parents[1] / "docs" / "architecture.md").read_text(), re.MULTILINE
    )
]
PLACES = {row.removesuffix(".py").removesuffix("/").replace("/", "."): place for place, row in enumerate(TABLE)}
"""Folders and files in the order of the table in docs/architecture.md: a module imports only from its own row and from rows above it."""

MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in sorted(ROOT.rglob("*.py"))}
TESTS = Path(__file__).parent


def place_of(module: str) -> str:
    """The row that a module stands under: its own, or the nearest folder's."""
    if module in PLACES or "." not in module:
        return module
    return place_of(module.rpartition(".")[0])


def imports(module: str) -> dict[str, bool]:
    """The modules of this package that a module imports, wherever in its code -> whether it does so at once, when it is loaded itself."""
    tree = ast.parse(MODULES[module].read_text())
    late = {id(n) for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef)) for n in ast.walk(f)}
    late |= {id(n) for i in ast.walk(tree) if isinstance(i, ast.If) and "TYPE_CHECKING" in ast.dump(i.test) for n in ast.walk(i)}
    found: dict[str, bool] = {}
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            names = [f"{node.module}.{a.name}" if within(f"{node.module}.{a.name}") in MODULES else str(node.module) for a in node.names]
        for name in names:
            if name == "hf_grow" or name.startswith("hf_grow."):
                found[within(name)] = found.get(within(name), False) or id(node) not in late
    return found


def within(name: str) -> str:
    return name.removeprefix("hf_grow").removeprefix(".") or "__init__"


each_module = pytest.mark.parametrize(
    "module",
    MODULES,
)


@each_module
def test_every_module_has_its_place_in_the_house(module: str):
    assert place_of(module) in PLACES, f"put {module} into the table of docs/architecture.md"


@each_module
def test_a_module_imports_only_what_stands_below_it(module: str):
    own = place_of(module)
    for other in imports(module):
        assert other in MODULES, f"{module} imports {other}, which is not there"
        assert PLACES[place_of(other)] <= PLACES[own], f"{module} must not import {other}"


def test_no_modules_import_each_other_in_a_circle():
    """Late imports and those for type checkers count too."""
    graph = {m: [o for o in imports(m) if o != m] for m in MODULES}
    assert list(TopologicalSorter(graph).static_order())


def test_no_benchmarks_import_each_other_in_a_circle():
    files = {path.stem: path for path in (ROOT.parent / "benchmarks").glob("*.py")}
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        nodes = list(ast.walk(ast.parse(path.read_text())))
        imported = {n.module for n in nodes if isinstance(n, ast.ImportFrom)}
        graph[name] = (imported | {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}) & files.keys()
    assert "tradeoff" in graph["tradeoff_plot"]  # this test sees imports
    assert list(TopologicalSorter(graph).static_order())


def test_no_test_module_imports_another():
    """What they share lies in tests/support."""
    found = {path.name: re.findall(r"^\s*(?:from|import) (test_\w+)", path.read_text(), re.MULTILINE) for path in TESTS.rglob("*.py")}
    assert len(found) > 100
    assert not {name: imported for name, imported in found.items() if imported}


def test_the_rows_of_the_table_are_there():
    assert all((ROOT / row).exists() for row in TABLE) and len(TABLE) > 20


def test_few_files_lie_beside_the_folders():
    assert len(list(ROOT.glob("*.py"))) <= 6


def test_the_floor_test_sees_imports():
    """The tests above would pass on a parser that finds nothing."""
    assert imports("growth.plan")["model.param_count"] is True
    assert imports("growth.axes") == {"growth.tensormap": True}
    assert len([m for m in MODULES if imports(m)]) > 10


def test_no_module_outside_methods_knows_the_options_of_a_method():
    """It knows them as `Method.options`, and reads what a Growth carries."""
    classes = {m.options.__name__ for m in (*METHODS.values(), PIPELINE)}
    assert classes > {"PipelineOptions", "ExpertsOptions", "HybridOptions"}
    for module, path in MODULES.items():
        if place_of(module) != "methods":
            nodes = list(ast.walk(ast.parse(path.read_text())))
            names = {n.id for n in nodes if isinstance(n, ast.Name)} | {n.attr for n in nodes if isinstance(n, ast.Attribute)}
            names |= {alias.name for n in nodes if isinstance(n, ast.ImportFrom) for alias in n.names}
            assert not names & classes, f"{module} knows {names & classes}"


LIGHT = [
    "hf_grow", "hf_grow.model.families", "hf_grow.growth.tensormap", "hf_grow.growth.axes", "hf_grow.options", "hf_grow.growth.growth", "hf_grow.methods",
    "hf_grow.growth.plan", "hf_grow.checkpoint.reader", "hf_grow.checkpoint.source", "hf_grow.checkpoint.writer", "hf_grow.convert.router_init",
    "hf_grow.training.config.train_config", "hf_grow.cli",
]  # fmt: skip
HEAVY = ("torch", "transformers", "datasets", "accelerate", "peft")


def test_planning_and_the_command_line_load_neither_torch_nor_transformers():
    code = f"""
import importlib, sys
for name in {LIGHT}:
    importlib.import_module(name)
    heavy = [m for m in {HEAVY} if m in sys.modules]
    assert not heavy, f"{{name}} loads {{heavy}}"
print("light")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "light\n", done.stderr


# ---- the table of families -----------------------------------------------------------------------------------------------------------


def attributes_read() -> set[str]:
    """Every `something.name` that any module reads."""
    return {
        node.attr
        for path in MODULES.values()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }


@pytest.mark.parametrize("record", [Family, TensorSpec, Dim])
def test_every_field_of_the_table_is_read_by_code(record: type):
    assert {f.name for f in fields(record)} <= attributes_read()


def test_every_predicate_is_used_by_a_family_and_every_condition_is_one():
    used = {spec.when for family in FAMILIES.values() for spec in family.tensors} | {f.sliding for f in FAMILIES.values() if f.sliding}
    assert used == set(PREDICATES)


def test_every_default_of_a_family_is_a_key_that_code_reads():
    """As a string somewhere outside the table itself; the switches are read together, as those whose default is a bool."""
    strings: set[str] = set()
    for path in MODULES.values():
        tree = ast.parse(path.read_text())
        table = {id(n) for v in ast.walk(tree) if isinstance(v, ast.Call) and getattr(v.func, "id", "") == "Family" for n in ast.walk(v)}
        strings |= {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in table}
    unread = {key for family in FAMILIES.values() for key, default in family.defaults.items() if not isinstance(default, bool)} - strings
    assert not unread


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_every_exception_of_a_family_is_one(family: Family):
    """Sizes and aliases that say what holds anyway would be rows that nobody needs."""
    plain = Family(family.model_type, family.architecture, family.tensors, family.defaults)
    assert all(family.size_key(axis) != plain.size_key(axis) for axis in family.sizes)
    assert all(alias != canonical for alias, canonical in family.aliases.items())
    names = [spec.name for spec in family.tensors]
    assert len({(spec.name, spec.when) for spec in family.tensors}) == len(names)
