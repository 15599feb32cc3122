"""Expressions as JSON, as growth.json stores them, and back, with fields checked against their types."""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from hf_grow.growth.tensormap import Expr, Source


def to_json(expr: Expr) -> Any:
    """JSON data; a plain copy from the main source is just its name."""
    if isinstance(expr, Source) and not expr.checkpoint:
        return expr.name

    def field_json(name: str, value: Any) -> Any:
        if name in expr.parts_of:
            return [to_json(v) for v in value] if isinstance(value, tuple) else value and to_json(value)
        return list(value) if isinstance(value, tuple) else value

    return {"op": expr.op, **{f.name: field_json(f.name, getattr(expr, f.name)) for f in fields(expr)}}


def from_json(data: Any) -> Expr:
    """Inverse of `to_json`, for untrusted data. Raises ValueError."""
    if isinstance(data, str):
        return Source(data)
    op = data.get("op") if isinstance(data, dict) else None
    if not isinstance(op, str) or op not in Expr.NODES:
        raise ValueError(f"not an expression: {str(data)[:80]}")
    node = Expr.NODES[op]

    def field_value(name: str, value: Any) -> Any:
        if name in node.parts_of:
            return tuple(map(from_json, value)) if isinstance(value, list) else None if value is None else from_json(value)
        return tuple(value) if isinstance(value, list) else value

    try:
        made = node(**{k: field_value(k, v) for k, v in data.items() if k != "op"})
    except (TypeError, RecursionError) as error:
        raise ValueError(f"not a {op}: {error}") from None
    for name, hint in _hints(op).items():
        if not _fits(getattr(made, name), hint):
            raise ValueError(f"not a {op}: {name} is {str(getattr(made, name))[:80]}")
    return made


@cache
def _hints(op: str) -> dict[str, Any]:
    node = Expr.NODES[op]
    hints = get_type_hints(node)
    return {f.name: hints[f.name] for f in fields(node)}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value read from JSON has the annotated type (a bool is not a number)."""
    args = get_args(hint)
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(v, args[0]) for v in value)
    if get_origin(hint) is Literal:
        return value in args
    if args:  # a union
        return any(_fits(value, a) for a in args)
    if hint is bool or isinstance(value, bool):
        return hint is bool and isinstance(value, bool)
    return isinstance(value, (int, float) if hint is float else hint)
