"""The algebra of tensor maps: shapes and substitution against numpy, JSON both ways, nonsense refused."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from axis_maps import identity, tile
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_grow.growth.axes import AxisMap, AxisRun
from hf_grow.growth.tensormap import Concat, Expr, Fill, Noise, Replace, Scope, Shape, Source, Subset, Sum, Take, substitute
from hf_grow.growth.tensormap_json import from_json, to_json

# Sources and axis maps carry their sizes in their names, so that any generated expression can be evaluated.
NAMES = ["a", "b", "model.layers.0.q", "", "op", "ü ::"]
FINITE = st.floats(-1e3, 1e3, allow_nan=False)


def source_name(shape: Shape, name: str) -> str:
    return f"{'x'.join(map(str, shape))}|{name}"


def named_axis(name: str) -> AxisMap:
    """The axis map '3to5v1': a fixed random map from size 3 to size 5."""
    sizes, _, version = name.partition("v")
    start, stop = map(int, sizes.split("to"))
    rng = np.random.default_rng([start, stop, int(version)])
    runs = []
    for _ in range(stop):
        if rng.random() < 0.3:
            runs.append(AxisRun(None, 1, 0.0, 0.0))
        else:
            runs.append(AxisRun(int(rng.integers(start)), 1, float(rng.normal()), float(rng.normal())))
    return AxisMap(start, tuple(runs))


class Shapes(Mapping[str, Any]):
    """A scope in which every such name exists."""

    def __init__(self, read: Any) -> None:
        self.read = read

    def __getitem__(self, name: str) -> Any:
        return self.read(name)

    def __iter__(self) -> Any:
        return iter(())

    def __len__(self) -> int:
        return 0


def source_shape(key: str) -> Shape:
    return tuple(int(n) for n in key.removeprefix("other::").split("|")[0].split("x"))


SCOPE = Scope(Shapes(source_shape), Shapes(named_axis))


@st.composite
def expressions(draw, shape: Shape | None = None, depth: int = 3) -> Expr:
    """Any expression of a given shape."""
    if shape is None:
        shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple))
    kind = draw(
        st.sampled_from(["source", "fill", "noise", "take", "sum", "concat", "subset", "replace"] if depth else ["source", "fill", "noise"])
    )
    inner = expressions(shape, depth - 1) if depth else st.none()
    if kind == "source":
        return Source(source_name(shape, draw(st.sampled_from(NAMES))), draw(st.sampled_from(["", "other"])))
    if kind == "fill":
        return Fill(shape, draw(FINITE))
    if kind == "noise":
        return Noise(shape, draw(FINITE), draw(st.sampled_from(NAMES)), draw(st.none() | inner), draw(st.booleans()))
    if kind == "sum":
        terms = tuple(draw(st.lists(inner, min_size=1, max_size=3)))
        return Sum(terms, tuple(draw(FINITE) for _ in terms))
    dim = draw(st.integers(0, len(shape) - 1))
    if kind == "take":
        size = draw(st.integers(1, 4))
        of = draw(expressions((*shape[:dim], size, *shape[dim + 1 :]), depth - 1))
        return Take(of, dim, f"{size}to{shape[dim]}v{draw(st.integers(0, 2))}", draw(st.sampled_from(["out", "in"])))
    if kind == "subset":
        of = draw(expressions((*shape[:dim], shape[dim] + draw(st.integers(0, 2)), *shape[dim + 1 :]), depth - 1))
        return Subset(of, dim, shape[dim], draw(st.sampled_from(NAMES)))
    if kind == "replace":
        by = draw(expressions((*shape[:dim], draw(st.integers(1, shape[dim])), *shape[dim + 1 :]), depth - 1))
        return Replace(draw(inner), by, dim, draw(st.sampled_from(NAMES)))
    cuts = sorted(draw(st.sets(st.integers(1, shape[dim] - 1)))) if shape[dim] > 1 else []
    sizes = np.diff([0, *cuts, shape[dim]]).tolist()
    return Concat(tuple(draw(expressions((*shape[:dim], n, *shape[dim + 1 :]), depth - 1)) for n in sizes), dim)


def chosen(key: str, size: int, count: int) -> np.ndarray:
    """Any subset that key and size alone decide."""
    return np.sort(np.random.default_rng([size, *key.encode()]).permutation(size)[:count])


def value_of(expr: Expr, sources: Mapping[str, np.ndarray]) -> np.ndarray:
    """What an expression says about weights, written with dense matrices. Noise: any number that its key alone decides."""
    match expr:
        case Source():
            return sources[expr.key]
        case Fill(size, value):
            return np.full(size, value)
        case Noise(size, std, key, like, centered):
            about = np.array([-1.0, 1.0]) if like is None else value_of(like, sources)  # mean 0, spread 1
            drawn = np.random.default_rng(list(key.encode())).normal(size=size) * std * about.std()
            return drawn if centered or like is None else drawn + about.mean()
        case Sum(terms, weights):
            return sum(w * value_of(t, sources) for w, t in zip(weights, terms, strict=True))
        case Concat(parts, dim):
            return np.concatenate([value_of(p, sources) for p in parts], axis=dim)
        case Take(of, dim, axis, role):
            matrix = np.zeros((named_axis(axis).target_size, named_axis(axis).source_size))
            for row, (source, a, b) in enumerate(named_axis(axis).rows()):
                if source is not None:
                    matrix[row, source] = a if role == "out" else b
            return np.moveaxis(np.tensordot(matrix, value_of(of, sources), axes=(1, dim)), 0, dim)
        case Subset(of, dim, count, key):
            whole = value_of(of, sources)
            return whole.take(chosen(key, whole.shape[dim], count), axis=dim)
        case Replace(of, by, dim, key):
            whole, new = np.moveaxis(value_of(of, sources).copy(), dim, 0), np.moveaxis(value_of(by, sources), dim, 0)
            whole[chosen(key, len(whole), len(new))] = new
            return np.moveaxis(whole, 0, dim)
    raise AssertionError(expr)


def random_sources() -> Mapping[str, np.ndarray]:
    return Shapes(lambda key: np.random.default_rng(list(key.encode())).normal(size=source_shape(key)))


# ---- meaning -------------------------------------------------------------------------------------------------------------------------


@given(expressions())
def test_the_shape_of_an_expression_is_that_of_its_value(expr: Expr):
    assert expr.shape(SCOPE) == value_of(expr, random_sources()).shape


@given(expressions())
def test_sources_are_exactly_the_tensors_that_are_read(expr: Expr):
    read: list[str] = []

    def note(key: str) -> np.ndarray:
        read.append(key)
        return np.zeros(source_shape(key))

    value_of(expr, Shapes(note))
    assert [s.key for s in expr.sources()] == read


@given(expressions())
def test_axis_names_are_exactly_the_maps_that_are_used(expr: Expr):
    written = re.findall(r'"axis": "([^"]*)"', json.dumps(to_json(expr)))
    assert sorted(expr.axis_names()) == sorted(written)


@settings(max_examples=200)
@given(expressions(), st.data())
def test_substitution_is_doing_one_step_after_the_other(second: Expr, data):
    """Evaluate the second step on what the first one made, or evaluate the substituted expression on the source: the same."""
    first = {s.name: data.draw(expressions(source_shape(s.name), 2)) for s in second.sources() if not s.checkpoint}
    sources = random_sources()
    made = Shapes(lambda key: sources[key] if key.startswith("other::") else value_of(first[key], sources))
    np.testing.assert_allclose(value_of(substitute(second, first), sources), value_of(second, made), rtol=1e-12)


@given(expressions())
def test_substituting_each_source_by_itself_changes_nothing(expr: Expr):
    assert substitute(expr, {s.name: Source(s.name) for s in expr.sources()}) == expr


def test_a_further_checkpoint_is_not_substituted():
    assert substitute(Source("w", "other"), {"w": Fill((1,), 0.0)}) == Source("w", "other")


def test_a_tensor_that_the_first_step_does_not_make_is_a_key_error():
    with pytest.raises(KeyError):
        substitute(Sum((Source("missing"),), (1.0,)), {"w": Source("w")})


@pytest.mark.parametrize(
    ("expr", "says"),
    [
        (Sum((Source("2x3|a"), Source("3x2|a")), (1.0, 1.0)), "shapes"),
        (Sum((Source("2|a"),), (1.0, 2.0)), "2 weights"),
        (Sum((), ()), "a sum of shapes"),
        (Concat((Source("2x3|a"), Source("2x4|a")), 0), "cannot be concatenated along dimension 0"),
        (Concat((Source("2x3|a"), Source("2|a")), 1), "no dimension 1"),
        (Concat((), 0), "no dimension 0"),
        (Concat((Source("2|a"),), -1), "no dimension -1"),
        (Take(Source("2x3|a"), 0, "3to4v0", "out"), "takes 3, dimension 0 has 2"),
        (Take(Source("2x3|a"), 2, "3to4v0", "out"), "no dimension 2"),
        (Take(Source("2x3|a"), -1, "3to4v0", "out"), "no dimension -1"),
    ],
)
def test_an_expression_that_fits_nothing_has_no_shape(expr: Expr, says: str):
    with pytest.raises(ValueError, match=says):
        expr.shape(SCOPE)


@pytest.mark.parametrize("expr", [Source("nowhere"), Take(Source("w"), 0, "no axis", "out")])
def test_a_name_that_is_not_in_scope_is_a_key_error(expr: Expr):
    with pytest.raises(KeyError):
        expr.shape(Scope({"w": (2,)}, {"axis": identity(2)}))


# ---- JSON ----------------------------------------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(expressions(depth=4))
def test_an_expression_survives_json(expr: Expr):
    assert from_json(json.loads(json.dumps(to_json(expr)))) == expr


def test_a_copy_is_written_as_its_bare_name():
    assert to_json(Source("lm_head.weight")) == "lm_head.weight"
    assert to_json(Source("w", "other")) == {"op": "source", "name": "w", "checkpoint": "other"}


SUM = {"op": "sum", "terms": ["w"], "weights": [1.0]}
TAKE = {"op": "take", "of": "w", "dim": 0, "axis": "x", "role": "out"}
NOISE = {"op": "noise", "size": [1], "std": 1.0, "key": "k", "like": None}


@pytest.mark.parametrize(
    "data",
    [
        None, 3, True, [], {}, ["w"], {"op": None}, {"op": []}, {"op": {}}, {"op": "sum "}, {"op": ""}, {"op": "eval", "code": "1"},
        {"op": "source"}, {"op": "source", "name": None}, {"op": "source", "name": ["w"]}, {"op": "source", "name": "w", "shape": [1]},
        {**SUM, "terms": "w"}, {**SUM, "terms": [1]}, {**SUM, "terms": None}, {**SUM, "weights": 1.0}, {**SUM, "weights": ["1"]},
        {**SUM, "weights": [True]}, {**SUM, "weights": None}, {**SUM, "__class__": "x"}, {**SUM, "parts_of": []},
        {**TAKE, "of": None}, {**TAKE, "of": ["w"]}, {**TAKE, "of": 0}, {**TAKE, "of": {}}, {**TAKE, "dim": "0"}, {**TAKE, "dim": 0.0},
        {**TAKE, "dim": True}, {**TAKE, "axis": 1}, {**TAKE, "role": "sideways"}, {**TAKE, "role": []},
        {"op": "concat", "parts": "w", "dim": 0}, {"op": "concat", "parts": ["w"]},
        {"op": "fill", "size": 3, "value": 0.0}, {"op": "fill", "size": [1.5], "value": 0.0}, {"op": "fill", "size": [1], "value": "0"},
        {**NOISE, "std": "loud"}, {**NOISE, "key": 1}, {**NOISE, "like": 0}, {**NOISE, "like": False}, {**NOISE, "size": None},
    ],
    ids=str,
)  # fmt: skip
def test_json_that_is_no_expression_is_a_value_error(data: Any):
    with pytest.raises(ValueError, match="not a"):
        from_json(data)


def test_an_expression_nested_too_deep_is_a_value_error():
    data: Any = "w"
    for _ in range(100_000):
        data = {"op": "sum", "terms": [data], "weights": [1.0]}
    with pytest.raises(ValueError, match="not a sum"):
        from_json(data)
    while not isinstance(data, str):  # taken apart by hand: the interpreter frees nested objects by recursion
        data = data["terms"].pop()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["w", "out", "x", ""]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["op", "name", "terms", "of"]), inner)
        | st.fixed_dictionaries({"op": st.just("sum"), "terms": inner, "weights": inner})
        | st.fixed_dictionaries({"op": st.just("take"), "of": inner, "dim": inner, "axis": inner, "role": inner})
        | st.fixed_dictionaries({"op": st.just("noise"), "size": inner, "std": inner, "key": inner}, optional={"like": inner})
        | st.fixed_dictionaries({"op": st.just("concat"), "parts": inner, "dim": inner})
        | st.fixed_dictionaries({"op": st.just("fill"), "size": inner}, optional={"value": inner})
    ),
    max_leaves=8,
)


@settings(max_examples=500)
@given(JSON)
def test_any_json_is_an_expression_or_a_value_error(data: Any):
    """And what is taken for an expression is one: it can be walked, written and asked for its shape."""
    try:
        expr = from_json(data)
    except ValueError:
        return
    list(expr.sources()), list(expr.axis_names())
    assert repr(from_json(json.loads(json.dumps(to_json(expr))))) == repr(expr)  # repr: nan is not equal to itself
    try:
        expr.shape(Scope({"w": (2,)}, {"x": tile(2, 2)}))
    except (ValueError, KeyError):
        pass
