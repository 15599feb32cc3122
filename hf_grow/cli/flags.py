"""Command-line flags generated from option models: one declaration gives the flag, its help and its default."""

from __future__ import annotations

import argparse
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic.fields import FieldInfo

from hf_grow.errors import InputError
from hf_grow.growth.growth import Method
from hf_grow.options import Options

SKIP = "\0absent"
_NO_SHORT: Mapping[str, str] = types.MappingProxyType({})


def add_flags(parser: argparse._ActionsContainer, models: Iterable[type[Options]], short: Mapping[str, str] = _NO_SHORT) -> None:
    """Adds a flag for each field of the models; fields of the same name share a flag. Values stay text, which the model parses."""
    seen: set[str] = set()
    for model in models:
        for name, field in model.model_fields.items():
            if name not in seen:
                seen.add(name)
                _add_flag(parser, name, field, [short[name]] if name in short else [])


def _add_flag(parser: argparse._ActionsContainer, name: str, field: FieldInfo, short: list[str]) -> None:
    names = [*short, "--" + name.replace("_", "-")]
    text = (field.description or "").replace("%", "%%") + (" Required." if field.is_required() else "")
    if field.default not in (None, False) and not field.is_required() and "efault" not in text:
        text += f" Default: {field.default}."
    if field.annotation is bool:
        parser.add_argument(*names, dest=name, action="store_true", default=SKIP, help=text)
    else:
        parser.add_argument(*names, dest=name, default=SKIP, metavar=_metavar(name, field), help=text)


_METAVARS = {
    "to": "SIZE",
    "max_shard_size": "BYTES",
    "memory_budget": "BYTES",
    "source_cache": "BYTES",
    "output": "DIR",
    "with_optimizer": "DIR",
    "push": "REPO",
    "tasks": "FILE|NAMES",
    "prompts": "FILE",
    "utility": "FILE",
}


def _metavar(name: str, field: FieldInfo) -> str:
    if name in _METAVARS:
        return _METAVARS[name]
    kinds = _types(field.annotation)
    choices = [a for k in kinds if typing.get_origin(k) is typing.Literal for a in typing.get_args(k)]
    if choices:
        return "{" + ",".join(map(str, choices)) + "}"
    if any(typing.get_origin(k) is tuple for k in kinds):
        return "LIST"
    return "N" if int in kinds else "X" if float in kinds else name.upper()


def _types(annotation: Any) -> list[Any]:
    """The members of a union, without their constraints."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return [t for member in typing.get_args(annotation) for t in _types(member)]
    return _types(typing.get_args(annotation)[0]) if typing.get_origin(annotation) is typing.Annotated else [annotation]


def given(arguments: argparse.Namespace, model: type[Options]) -> dict[str, Any]:
    """The flags of ``model`` that were given -> their text."""
    return {n: v for n in model.model_fields if (v := getattr(arguments, n, SKIP)) != SKIP}


def reject_other_methods_flags(arguments: argparse.Namespace, method: Method, all_methods: Mapping[str, Method]) -> None:
    """Raises InputError for a given flag that the chosen method does not have."""
    for other in all_methods.values():
        for name in given(arguments, other.options).keys() - method.options.model_fields.keys():
            owners = [m.name for m in all_methods.values() if name in m.options.model_fields]
            raise InputError(
                f"--{name.replace('_', '-')} is not an option of method {method.name}.", hint=f"It is an option of: {', '.join(owners)}."
            )
