"""New router rows."""

from __future__ import annotations

import math

from hf_grow.errors import PlanError
from hf_grow.growth.growth import Measurement
from hf_grow.growth.tensormap import Expr, Fill, Noise, Orthogonal, Sum, Values
from hf_grow.methods.experts.expert_options import ExpertsOptions
from hf_grow.model.architecture import Architecture, Entry

MEASURED = ("prompts", "cheap-embed")
"""Routers whose rows are measured on the source before the plan is carried out."""


def check_router(options: ExpertsOptions, rows: int) -> None:
    """Raises PlanError if prompts are missing, do not apply, or are not as many as the new rows."""
    if options.router not in MEASURED:
        if options.prompts is not None:
            raise PlanError(f"--prompts does not apply to --router {options.router}.", hint="Use --router prompts or cheap-embed.")
        return
    if options.prompts is None:
        raise PlanError(
            f"--router {options.router} needs --prompts.", hint="A YAML file: experts: [{positive: [...], negative: [...]}, ...]."
        )
    if len(options.prompts.experts) != rows:
        raise PlanError(f"The prompts are for {len(options.prompts.experts)} experts; {rows} get new router rows.")


def new_rows(entry: Entry, rows: int, options: ExpertsOptions) -> Expr:
    """``rows`` new rows [rows, hidden_size] for the router `entry` of one layer."""
    size = (rows, entry.shape[1])
    match options.router:
        case "zeros":
            return Fill(size, 0.0)
        case "normal":
            return Noise(size, options.router_std, entry.name)
        case "orthogonal":
            if rows > size[1]:
                raise PlanError(f"{rows} router rows of {size[1]} numbers cannot all be orthogonal.", hint="Use --router normal.")
            return Orthogonal(size, options.router_std, entry.name)
        case _:  # measured rows have length one; cheap ones are the same in every layer
            return Sum((Values(size, _key(options, entry.layer)),), (options.router_std * math.sqrt(size[1]),))


def _key(options: ExpertsOptions, layer: int) -> str:
    return "router" if options.router == "cheap-embed" else f"router.{layer}"


def is_router(entry: Entry) -> bool:
    return entry.spec.dims[0].axes == ("experts",)


def router_measurements(options: ExpertsOptions, target: Architecture) -> tuple[Measurement, ...]:
    """What `new_rows` of the target's routers need from the source's weights."""
    if options.router not in MEASURED:
        return ()
    layers = {_key(options, entry.layer): entry.layer for entry in target.tensors.values() if is_router(entry)}
    return (Measurement("router rows", layers, {"prompts": options.prompts, "kind": options.router, "pooling": options.prompt_pooling}),)
