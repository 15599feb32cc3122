"""What make_plan refuses before a byte is written, and what is not taken for a stored plan."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from axis_maps import tile
from hypothesis import given, settings
from hypothesis import strategies as st
from models import SIZES

from hf_grow.errors import PlanError, SourceError
from hf_grow.growth.axes import AxisMap, AxisRun
from hf_grow.growth.growth import Growth, Guarantee
from hf_grow.growth.plan import GrowthPlan, make_plan
from hf_grow.growth.source_info import SourceInfo, TensorInfo
from hf_grow.growth.tensormap import Concat, Fill, Source, Take
from hf_grow.methods import METHODS
from hf_grow.model.architecture import Architecture

CONFIG = {"model_type": "llama", **SIZES, "num_hidden_layers": 2}
INFO = SourceInfo("me/model", "", CONFIG, {n: TensorInfo("F32", e.shape) for n, e in Architecture(CONFIG).tensors.items()})
STACK = METHODS["stack"].build(Architecture(CONFIG), METHODS["stack"].options())
Q = "model.layers.0.self_attn.q_proj.weight"


def with_tensor(name: str, expr: Any, **changes: Any) -> Growth:
    return replace(STACK, tensors={**STACK.tensors, name: expr}, **changes)


@pytest.mark.parametrize(
    ("growth", "says"),
    [
        (with_tensor("model.extra", Source(Q)), "The growth and the target config differ in model.extra"),
        (replace(STACK, tensors={n: e for n, e in STACK.tensors.items() if n != Q}), f"The growth and the target config differ in {Q}"),
        (with_tensor(Q, Fill((3, 3))), "would have shape [3, 3], but the target config implies [48, 48]"),
        (with_tensor(Q, Source("model.missing")), "cannot be built: 'model.missing'"),
        (with_tensor(Q, Take(Source(Q), 0, "nowhere", "out")), "cannot be built: 'nowhere'"),
        (with_tensor(Q, Take(Source(Q), 5, "x", "out"), axes={"x": tile(48, 2)}), "there is no dimension 5"),
        (with_tensor(Q, Take(Source(Q), 0, "x", "out"), axes={"x": tile(7, 2)}), "takes 7, dimension 0 has 48"),
        (with_tensor(Q, Concat((), 0)), "cannot be built"),
        (with_tensor("model.norm.weight", Fill((48,))), "These source tensors would be lost: model.norm.weight"),
        (replace(STACK, config={**STACK.config, "num_attention_heads": 7}), "The target config cannot be built: "),
        (replace(STACK, config={**STACK.config, "num_hidden_layers": 5}), "The growth and the target config differ in model.layers.4."),
    ],
    ids=["extra", "missing", "shape", "no-source", "no-axis", "no-dimension", "axis-size", "empty", "lost", "config", "deeper-config"],
)
def test_a_growth_that_does_not_fit_its_source_or_target_is_refused(growth: Growth, says: str):
    with pytest.raises(PlanError) as caught:
        make_plan(INFO, growth)
    assert says in str(caught.value)


def test_a_source_tensor_may_be_left_out_with_a_reason():
    growth = with_tensor("model.norm.weight", Fill((48,), 1.0), dropped={"model.norm.weight": "drawn anew"})
    assert make_plan(INFO, growth).growth.dropped == {"model.norm.weight": "drawn anew"}


def test_a_growth_cannot_claim_to_be_lossless_over_an_inexact_axis_map():
    inexact = replace(STACK, axes={"x": AxisMap(2, (AxisRun(0, 2), AxisRun(0, 1)))}, guarantee=Guarantee("lossless", "so it says"))
    with pytest.raises(PlanError, match="claims to be lossless, but the axis maps x are not exact"):
        make_plan(INFO, inexact)
    assert make_plan(INFO, replace(inexact, guarantee=STACK.guarantee))
    assert make_plan(INFO, replace(inexact, axes={"x": tile(2, 2)}))


# ---- stored plans --------------------------------------------------------------------------------------------------------------------

STORED = json.loads(json.dumps(make_plan(INFO, STACK).to_json()))


def broken(change: Callable[[Any], Any]) -> Any:
    data = copy.deepcopy(STORED)
    change(data)
    return data


@pytest.mark.parametrize("version", [None, 0, 2, "1", [1]])
def test_a_plan_of_another_format_is_refused(version: Any):
    with pytest.raises(SourceError, match="this version reads 1"):
        GrowthPlan.from_json({**STORED, "format": version})


@pytest.mark.parametrize(
    "data",
    [
        *(broken(lambda d, k=k: d.pop(k)) for k in ("source", "growth", "target")),
        *(broken(lambda d, k=k: d["growth"].pop(k)) for k in STORED["growth"]),
        *(broken(lambda d, k=k: d["source"].pop(k)) for k in STORED["source"]),
        *(broken(lambda d, k=k: d["target"].pop(k)) for k in STORED["target"]),
        broken(lambda d: d["growth"]["layers"].append(3)),
        broken(lambda d: d["growth"]["axes"].update(x={"source_size": 3, "runs": [[0, 9, 1, 1]]})),
        broken(lambda d: d["growth"]["axes"].update(x=3)),
        broken(lambda d: d["growth"]["guarantee"].update(more=1)),
        broken(lambda d: d["target"]["tensors"].update({Q: ["F32", [48, 48], {"op": "run"}]})),
        broken(lambda d: d["target"]["tensors"].update({Q: ["F32", [48, 48]]})),
        broken(lambda d: d["target"]["tensors"].update({Q: ["F32", 48, Q]})),
        broken(lambda d: d["source"]["tensors"].update({Q: None})),
    ],
    ids=lambda d: "",
)
def test_a_damaged_plan_is_a_source_error(data: Any):
    with pytest.raises(SourceError, match=r"growth\.json is damaged"):
        GrowthPlan.from_json(data)


def paths(data: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in the stored plan, three levels deep."""
    if len(at) == 3 or not isinstance(data, (dict, list)):
        return [at]
    items = data.items() if isinstance(data, dict) else enumerate(data)
    return [at, *(p for k, v in items for p in paths(v, (*at, k)))]


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=2),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([p for p in paths(STORED) if p]), JUNK)
def test_junk_anywhere_in_a_plan_never_becomes_another_error(path: tuple[Any, ...], junk: Any):
    data = copy.deepcopy(STORED)
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = junk
    try:
        plan = GrowthPlan.from_json(data)
    except SourceError:
        return
    assert json.dumps(plan.to_json())
