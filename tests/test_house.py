"""How the house is built: floors, what importing costs, and no field of the table that nobody reads."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import fields
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import hf_grow
from hf_grow.model.families import FAMILIES, PREDICATES, Dim, Family, TensorSpec

ROOT = Path(hf_grow.__file__).parent

# A module imports only from lower floors and, on its own floor, from what stands before it. A package stands for all of its modules.
FLOORS = [
    ["_version", "machine", "errors", "untrusted", "yaml_text", "suggest", "bars", "families", "foreign", "architecture", "portable", "loading", "tensormap", "tensormap_json"],
    ["axes", "recipe", "prompts", "growth"],
    ["methods.sizing", "methods.starting", "methods.spaces", "methods.shapes", "methods.widen", "methods.depth", "methods.width", "methods.expert_options", "methods.routers", "methods.upcycle",
     "methods.more_experts", "methods.experts", "methods.hybrid",
     "methods.idle", "methods", "methods.pipeline"],
    ["planning"],
    ["checkpoint.record", "checkpoint.names", "checkpoint.hub_errors", "checkpoint.ranges", "checkpoint.header", "checkpoint.fused", "checkpoint.reader", "checkpoint.heads", "checkpoint.hub", "checkpoint.source", "checkpoint.several", "checkpoint.transfer", "checkpoint.writer", "checkpoint.exchange", "checkpoint.partial", "checkpoint.sink", "checkpoint.spool",
     "checkpoint"],
    ["noise", "tensors", "evaluate", "layerwise", "prompted", "in_memory", "besides", "execute"],
    ["verification", "publish", "training"],
    ["api", "demo", "cli", "__main__", ""],
]  # fmt: skip
PLACES = {name: (floor, place) for floor, names in enumerate(FLOORS) for place, name in enumerate(names)}

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip("."): path for path in sorted(ROOT.rglob("*.py"))
}


def place_of(module: str) -> str:
    """The entry of FLOORS that a module stands under: its own, or the nearest package's."""
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
    return name.removeprefix("hf_grow").removeprefix(".")


each_module = pytest.mark.parametrize("module", MODULES, ids=lambda m: m or "hf_grow")


@each_module
def test_every_module_has_its_place_in_the_house(module: str):
    assert place_of(module) in PLACES, f"put {module} into FLOORS"


@each_module
def test_a_module_imports_only_what_stands_below_it(module: str):
    own = place_of(module)
    for other in imports(module):
        assert other in MODULES, f"{module} imports {other}, which is not there"
        assert place_of(other) == own or PLACES[place_of(other)] < PLACES[own], f"{module} must not import {other}"


def test_no_modules_import_each_other_in_a_circle():
    """At load time, also inside one package."""
    graph = {m: [o for o, at_once in imports(m).items() if at_once and o != m] for m in MODULES}
    assert list(TopologicalSorter(graph).static_order())


def test_the_floor_test_sees_imports():
    """The two tests above would pass on a parser that finds nothing."""
    assert imports("planning")["methods.sizing"] is True
    assert imports("axes") == {"tensormap": True}
    assert len([m for m in MODULES if imports(m)]) > 10


LIGHT = [
    "hf_grow", "hf_grow.model.families", "hf_grow.growth.tensormap", "hf_grow.growth.axes", "hf_grow.options", "hf_grow.growth.growth", "hf_grow.methods",
    "hf_grow.growth.plan", "hf_grow.checkpoint.reader", "hf_grow.checkpoint.source", "hf_grow.checkpoint.writer", "hf_grow.convert.router_init", "hf_grow.cli",
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
    assert {spec.when for family in FAMILIES.values() for spec in family.tensors} == set(PREDICATES)


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
