"""`grow` in a training recipe: the model is grown as it is loaded. Each process computes the rows that it holds; nothing is written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from hf_grow.checkpoint.donors import parse_donor_refs, with_donors
from hf_grow.checkpoint.reader import Checkpoint
from hf_grow.convert.planning import find_method, plan_for
from hf_grow.errors import InputError
from hf_grow.growth.growth import Method
from hf_grow.growth.plan import GrowthPlan
from hf_grow.options import Options, parse
from hf_grow.training.growth_state.moments import Policy
from hf_grow.training.setup.train_setup import Notify, TrainSetup
from hf_grow.training.sharding.row_source import GrownRows
from hf_grow.training.sharding.sharded_checkpoint import rows_of
from hf_grow.training.trainer.state import GrowthAtResume

POLICY = "optimizer_policy"
"""Key of `grow`: what becomes of the optimizer's state, if training resumes from a checkpoint of the smaller model."""
WRITE_FIRST = "Write the grown model first (hf-grow grow), and train that."


def read_growth(settings: Mapping[str, Any]) -> tuple[Method, Options]:
    """Method and options of `grow`, whose keys are those of a growth recipe. Raises InputError."""
    method = find_method(str(settings.get("method") or ("pipeline" if "steps" in settings else "dus")))
    return method, parse(method.options, {k: v for k, v in settings.items() if k not in ("method", POLICY)}, where="grow")


def growth_at_resume(setup: TrainSetup) -> GrowthAtResume | None:
    """With `grow` and `resume_from_checkpoint`: the training state of the smaller model, which grows with its weights."""
    checkpoint = setup.arguments.resume_from_checkpoint
    if setup.source is None or setup.plan is None or checkpoint is None:
        return None
    return GrowthAtResume(Path(str(checkpoint)), setup.plan, _policy(setup.recipe.grow or {}))


def _policy(settings: Mapping[str, Any]) -> Policy:
    policy: Policy = settings.get(POLICY, "map")
    if policy not in get_args(Policy):
        raise InputError(f"{POLICY}: there is no {policy!r}.", hint=f"Policies: {', '.join(get_args(Policy))}.")
    return policy


def plan_growth(source: Checkpoint, settings: Mapping[str, Any], notify: Notify) -> GrowthPlan:
    """The plan from config and headers. Raises InputError for options that do not fit, and for a growth that must read weights to be planned."""
    method, options = read_growth(settings)
    _policy(settings)
    opened = with_donors(source, parse_donor_refs(options.extra_sources()), weights=False, notify=notify)
    plan = plan_for(opened.info, method, options)
    if plan.growth.measurements:
        kinds = " and ".join(m.kind for m in plan.growth.measurements)
        raise InputError(f"{kinds} are measured on the source's weights, which is not done while loading.", hint=WRITE_FIRST)
    return plan


def grown_rows(setup: TrainSetup, source: Checkpoint) -> GrownRows:
    """Rows of the grown model. ``source``: with its weights on this machine. Raises InputError where these show that the plan is another."""
    assert setup.plan is not None and setup.recipe.grow is not None
    _, options = read_growth(setup.recipe.grow)
    complete = with_donors(source, parse_donor_refs(options.extra_sources()), weights=True)
    if complete.info.by_key != setup.plan.source.by_key or complete.config != setup.plan.source.config:
        raise InputError(
            f"{source.ref} stores a head of its own, although its config ties it to the embedding; headers alone did not show it.",
            hint=WRITE_FIRST,
        )
    if complete.donors and not complete.files:
        raise InputError(f"{source.ref} is in shards, and a growth of it with further sources is not done while loading.", hint=WRITE_FIRST)
    return GrownRows(setup.plan, rows_of(complete))
