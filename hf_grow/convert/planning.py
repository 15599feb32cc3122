"""From a source, a method and its options to a checked plan."""

from __future__ import annotations

from collections.abc import Callable

from hf_grow.checkpoint.donors import parse_donor_refs, with_donors
from hf_grow.checkpoint.reader import Checkpoint
from hf_grow.checkpoint.source import open_source
from hf_grow.common.suggest import did_you_mean
from hf_grow.errors import InputError
from hf_grow.growth.growth import Method
from hf_grow.growth.plan import GrowthPlan, check_source, make_plan
from hf_grow.growth.source_info import SourceInfo
from hf_grow.methods import METHODS
from hf_grow.methods.no_effect import reject_ineffective_options
from hf_grow.methods.pipeline import PIPELINE
from hf_grow.options import Options

Notify = Callable[[str], None]
"""Receives notes for the user, one sentence or more each."""


def ignore(message: str) -> None:
    """The default `Notify`."""


def find_method(name: str) -> Method:
    """A method of METHODS, or the pipeline. Raises InputError for an unknown name."""
    known = {**METHODS, PIPELINE.name: PIPELINE}
    if name not in known:
        raise InputError(f"Unknown method {name!r}.{did_you_mean(name, known)}", hint=f"Methods: {', '.join(known)}.")
    return known[name]


def open_sources(ref: str, options: Options, *, revision: str | None = None, notify: Notify = ignore) -> Checkpoint:
    """Config and headers of the source and of the further checkpoints that the options name (OWNER/NAME@REVISION for a revision of a Hub id).

    Raises SourceError as `open_source` does, and where tokenizers differ.
    """
    main = open_source(ref, revision=revision, weights=False, notify=notify)
    return with_donors(main, parse_donor_refs(options.extra_sources()), weights=False, notify=notify)


def plan_for(info: SourceInfo, method: Method, options: Options) -> GrowthPlan:
    """A checked plan. Raises SourceError, PlanError; the source is checked first, because its errors explain more than those of a plan."""
    check_source(info)
    for other in info.donors.values():
        check_source(other)
    others = [other.architecture for other in info.donors.values()]
    plan = make_plan(info, method.build(info.architecture, options, others) if others else method.build(info.architecture, options))
    if not method.checks_own_options:
        reject_ineffective_options(method, info.architecture, options, others)
    return plan
