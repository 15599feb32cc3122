"""The algebra of axis maps against the dense matrices A and B that they stand for."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from axis_maps import identity, tile
from hypothesis import given
from hypothesis import strategies as st

from hf_grow.growth.axes import AxisMap, AxisRun, duplicate, select

GAINS = st.sampled_from([0.0, 1.0, 0.5, -2.0, 1 / 3, 2.0])


@st.composite
def runs_from(draw, size: int) -> AxisRun:
    length = draw(st.integers(1, size))
    start = draw(st.none() | st.integers(0, size - length))
    return AxisRun(start, length, draw(GAINS), draw(GAINS)) if start is not None else AxisRun(None, length, 0.0, 0.0)


@st.composite
def axis_maps(draw, size: int | None = None) -> AxisMap:
    size = size or draw(st.integers(1, 5))
    return AxisMap(size, tuple(draw(st.lists(runs_from(size), min_size=1, max_size=4))))


def dense(axis: AxisMap) -> tuple[np.ndarray, np.ndarray]:
    """A and B, written out row by row from the definition of a run."""
    a, b = np.zeros((2, axis.target_size, axis.source_size))
    row = 0
    for run in axis.runs:
        for i in range(run.length):
            if run.start is not None:
                a[row, run.start + i], b[row, run.start + i] = run.a, run.b
            row += 1
    return a, b


def same(axis: AxisMap, a: np.ndarray, b: np.ndarray) -> bool:
    mine = dense(axis)
    return mine[0].shape == a.shape and np.allclose(mine[0], a, atol=1e-12) and np.allclose(mine[1], b, atol=1e-12)


@given(axis_maps(), axis_maps())
def test_the_map_of_a_product_axis_is_the_kronecker_product(outer: AxisMap, inner: AxisMap):
    (a1, b1), (a2, b2) = dense(outer), dense(inner)
    assert same(outer.times(inner), np.kron(a1, a2), np.kron(b1, b2))


@given(axis_maps(), axis_maps(), axis_maps())
def test_products_do_not_depend_on_brackets(x: AxisMap, y: AxisMap, z: AxisMap):
    assert same(x.times(y).times(z), *dense(x.times(y.times(z))))


@given(axis_maps(), st.data())
def test_a_window_is_those_rows(axis: AxisMap, data):
    start = data.draw(st.integers(0, axis.target_size))
    stop = data.draw(st.integers(start, axis.target_size))
    a, b = dense(axis)
    cut = AxisMap(axis.source_size, tuple(axis.window(start, stop)))
    assert same(cut, a[start:stop], b[start:stop])


@given(axis_maps())
def test_rows_tell_each_row_of_both_matrices(axis: AxisMap):
    a, b = np.zeros((2, axis.target_size, axis.source_size))
    for row, (source, gain_a, gain_b) in enumerate(axis.rows()):
        if source is not None:
            a[row, source], b[row, source] = gain_a, gain_b
    assert same(axis, a, b)


@given(axis_maps(), axis_maps())
def test_weights_and_gradients_take_dual_gains(out: AxisMap, into: AxisMap):
    """W' = A_out W B_in^T, G' = B_out G A_in^T, and squares for squared gradients: gains of each run against the formulas."""
    (a_out, b_out), (a_in, b_in) = dense(out), dense(into)
    x = np.random.default_rng(0).normal(size=(out.source_size, into.source_size))
    wanted = {
        "weight": a_out @ x @ b_in.T,
        "grad": b_out @ x @ a_in.T,
        "grad2": b_out**2 @ x @ (a_in**2).T,
    }
    for quantity, value in wanted.items():
        rows = np.concatenate([run.gain("out", quantity) * taken(x, run) for run in out.runs])
        both = np.concatenate([run.gain("in", quantity) * taken(rows.T, run) for run in into.runs]).T
        np.testing.assert_allclose(both, value, atol=1e-12)


def taken(x: np.ndarray, run: AxisRun) -> np.ndarray:
    return np.zeros((run.length, x.shape[1])) if run.start is None else x[run.start : run.start + run.length]


@given(axis_maps())
def test_a_map_is_exact_when_b_transposed_times_a_is_one(axis: AxisMap):
    a, b = dense(axis)
    assert axis.is_exact() == np.allclose(b.T @ a, np.eye(axis.source_size), atol=1e-12)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 3))
def test_tiles_and_pads_are_exact_copies_side_by_side(size: int, copies: int, pad: int):
    axis = tile(size, copies, pad)
    one, zero = np.eye(size), np.zeros((pad, size))
    assert same(axis, np.vstack([one] * copies + [zero]), np.vstack([one / copies] * copies + [zero]))
    assert axis.is_exact()


@given(st.integers(1, 6), st.data())
def test_duplicated_rows_share_what_readers_see(size: int, data):
    more = data.draw(st.lists(st.integers(0, size - 1), max_size=6))
    sources = data.draw(st.permutations([*range(size), *more]))
    a = np.eye(size)[sources]
    axis = duplicate(size, sources)
    assert same(axis, a, a / a.sum(axis=0))
    assert axis.is_exact()


def test_a_row_that_nothing_copies_makes_duplication_inexact():
    assert not duplicate(3, [0, 1, 1]).is_exact()


@given(st.integers(1, 6), st.data())
def test_selected_rows_keep_unit_gains(size: int, data):
    indices = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=8))
    picked = np.eye(size)[indices]
    assert same(select(size, indices), picked, picked)
    assert select(size, indices).is_exact() == (sorted(indices) == list(range(size)))


@given(axis_maps())
def test_the_identity_is_neutral(axis: AxisMap):
    assert same(identity(1).times(axis), *dense(axis))
    assert same(axis.times(identity(1)), *dense(axis))


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 5), st.integers(1, 4))
def test_products_of_exact_maps_are_exact(n: int, copies: int, m: int, more: int):
    assert tile(n, copies).times(tile(m, more)).is_exact()


def test_neighbouring_runs_are_joined():
    assert select(9, range(2, 9)).runs == (AxisRun(2, 7),)
    assert identity(3).times(identity(4)) == identity(12)
    assert select(4, [0, 1, 3]).runs == (AxisRun(0, 2), AxisRun(3, 1))


@pytest.mark.parametrize("run", [AxisRun(0, 0), AxisRun(0, -1), AxisRun(-1, 1), AxisRun(2, 2), AxisRun(3, 1), AxisRun(None, 0)], ids=str)
def test_a_run_outside_its_axis_is_refused(run: AxisRun):
    with pytest.raises(ValueError, match="outside an axis of 3"):
        AxisMap(3, (run,))


@given(axis_maps())
def test_an_axis_map_survives_json(axis: AxisMap):
    assert AxisMap.from_json(json.loads(json.dumps(axis.to_json()))) == axis


@pytest.mark.parametrize(
    "data",
    [
        None, 3, "x", [], {}, {"source_size": 3}, {"runs": []}, {"source_size": None, "runs": []}, {"source_size": "3", "runs": []},
        {"source_size": 2.5, "runs": []}, {"source_size": True, "runs": []}, {"source_size": 3, "runs": None},
        {"source_size": 3, "runs": "abcd"}, {"source_size": 3, "runs": [[0, 1, 1.0]]}, {"source_size": 3, "runs": [None]},
        *({"source_size": 3, "runs": [run]} for run in (
            ["0", 1, 1.0, 1.0], [0.5, 1, 1.0, 1.0], [True, 1, 1.0, 1.0], [0, "1", 1.0, 1.0], [0, 1.5, 1.0, 1.0], [0, None, 1.0, 1.0],
            [0, 1, None, 1.0], [0, 1, "1", 1.0], [0, 1, 1.0, True], [0, 1, float("nan"), 1.0], [0, 1, 1.0, float("inf")],
            [0, 1, 10**400, 1.0], [0, 4, 1.0, 1.0], [-1, 1, 1.0, 1.0], [0, 2**70, 1.0, 1.0], [[], 1, 1.0, 1.0],
        )),
    ],
    ids=str,
)  # fmt: skip
def test_json_that_is_no_axis_map_is_a_value_error(data: Any):
    with pytest.raises(ValueError):
        AxisMap.from_json(data)
