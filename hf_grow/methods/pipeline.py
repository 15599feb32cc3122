"""Several growths as one: each step plans on the target of the previous one, and all compose into a single map. Lossless if every step is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from hf_grow.errors import InputError, PlanError
from hf_grow.growth.growth import Growth, Method, compose
from hf_grow.methods import METHODS
from hf_grow.methods.no_effect import reject_ineffective_options
from hf_grow.model.architecture import Architecture
from hf_grow.options import Options, parse


def _step(value: Any) -> Any:
    if isinstance(value, Step):
        return value
    if not isinstance(value, Mapping) or value.get("method") not in METHODS:
        raise ValueError(f"a step is `method:` with its options; the methods are {', '.join(METHODS)}")
    method = METHODS[value["method"]]
    try:
        options = parse(method.options, {k: v for k, v in value.items() if k != "method"}, where=f"the step {method.name}", strict=False)
    except InputError as error:
        raise ValueError(error.message) from None
    return Step(method=method.name, options=options)


class Step(Options):
    method: str
    """Growth method."""
    options: Options
    """Its options."""


class PipelineOptions(Options):
    """Options of a pipeline of growths."""

    steps: Annotated[list[Annotated[Step, BeforeValidator(_step)]], Field(min_length=1)]
    """The steps in order, each `method:` with that method's options."""

    def non_defaults(self) -> dict[str, Any]:
        return {"steps": [{"method": s.method, **s.options.non_defaults()} for s in self.steps]}

    def extra_sources(self) -> tuple[str, ...]:
        return tuple(ref for s in self.steps for ref in s.options.extra_sources())


def build_pipeline(arch: Architecture, options: PipelineOptions, others: Sequence[Architecture] = ()) -> Growth:
    """One growth of all steps; ``others`` go to the step that names further checkpoints. Raises PlanError with the step that does not fit."""
    if sum(bool(s.options.extra_sources()) for s in options.steps) > 1:
        raise PlanError("Only one step may read further checkpoints.")
    grown: list[Growth] = []
    for number, step in enumerate(options.steps, 1):
        here = Architecture(grown[-1].config) if grown else arch
        method, more = METHODS[step.method], others if step.options.extra_sources() else ()
        try:
            grown.append(method.build(here, step.options, more) if more else method.build(here, step.options))
            reject_ineffective_options(method, here, step.options, more)
        except PlanError as error:
            raise PlanError(f"Step {number} ({step.method}): {error.message}", hint=error.hint) from None
    return reduce(compose, grown)


PIPELINE = Method(
    "pipeline",
    "hybrid",
    "several growths as one",
    "",
    "that of its weakest step",
    PipelineOptions,
    build_pipeline,
    lambda arch, target: None,
    checks_own_options=True,
)
