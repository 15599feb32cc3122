"""Rejects options that have no effect.

There is no table of which option applies when. A given option has an effect if some other value of it leads to another growth or to an error;
growths are pure functions and cheap, so other values are tried.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import ValidationError

from hf_grow.errors import GrowError, PlanError
from hf_grow.growth.growth import Growth, Method
from hf_grow.growth.tensormap import Expr, Noise, Orthogonal
from hf_grow.model.architecture import Architecture
from hf_grow.options import Options


def reject_ineffective_options(method: Method, arch: Architecture, options: Options, others: Sequence[Architecture] = ()) -> None:
    """Raises PlanError for options that differ from their defaults but have no effect on this source, whatever their value."""
    fields = {name: f.get_default(call_default_factory=True) for name, f in type(options).model_fields.items()}
    # Options that name additional checkpoints belong to `others`.
    given = [name for name, default in fields.items() if getattr(options, name) not in (default, options.extra_sources())]
    if not given:
        return
    arch, growth = _probe(method, arch, options, others)
    ineffective = [name for name in given if not any(_differs(method, arch, o, others, growth) for o in _variants(options, name))]
    if ineffective:
        names = ", ".join("--" + name.replace("_", "-") for name in ineffective)
        raise PlanError(
            f"{names} {'have' if len(ineffective) > 1 else 'has'} no effect here: {method.name} of this source with the other options gives the same model whatever "
            f"{'their values' if len(ineffective) > 1 else 'its value'}.",
            hint="Remove it." if len(ineffective) == 1 else "Remove them.",
        )


def _probe(method: Method, arch: Architecture, options: Options, others: Sequence[Architecture]) -> tuple[Architecture, Growth]:
    """The source (or one layer of it, if the method treats all alike) and its growth."""
    if method.kind == "experts" and not others:
        one: dict[str, Any] = {"num_hidden_layers": 1, "layer_types": None, "mlp_only_layers": [], "decoder_sparse_step": 1}
        try:
            small = Architecture({**arch.config, **{k: v for k, v in one.items() if k in arch.config}})
            return small, _build(method, small, options, others)
        except GrowError:
            pass  # an option that refers to all layers
    return arch, _build(method, arch, options, others)


def _build(method: Method, arch: Architecture, options: Options, others: Sequence[Architecture]) -> Growth:
    growth: Growth = method.build(arch, options, others) if others else method.build(arch, options)
    return growth


def _differs(method: Method, arch: Architecture, options: Options, others: Sequence[Architecture], growth: Growth) -> bool:
    try:
        other = _build(method, arch, options, others)
    except GrowError:
        return True
    if any(getattr(growth, part) != getattr(other, part) for part in ("config", "tensors", "axes", "measurements")):
        return True
    return growth.seed != other.seed and any(map(_random, growth.tensors.values()))


def _random(expr: Expr) -> bool:
    return isinstance(expr, Noise | Orthogonal) or any(map(_random, expr.children()))


def _variants(options: Options, name: str) -> Iterator[Options]:
    """The options with other valid values of one of them."""
    field = type(options).model_fields[name]
    values = options.model_dump()
    for value in (*_nearby_values(getattr(options, name)), *_choices(field.annotation), field.get_default(call_default_factory=True)):
        if value != getattr(options, name):
            try:
                yield type(options).model_validate({**values, name: value})
            except ValidationError:
                continue


def _nearby_values(value: Any) -> tuple[Any, ...]:
    if isinstance(value, bool):
        return (not value,)
    if isinstance(value, int):
        return value + 1, value - 1, 2 * value, 1
    if isinstance(value, float):
        return value / 2, 2 * value
    return (value[:-1], value[1:], value[::-1]) if isinstance(value, tuple) else ()


def _choices(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) is typing.Literal:
        return typing.get_args(annotation)
    return tuple(c for part in typing.get_args(annotation) for c in _choices(part))
