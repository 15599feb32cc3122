"""Command-line flags made from option models: one declaration gives the flag, its help and its default."""

from __future__ import annotations

import argparse
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic.fields import FieldInfo

from hf_grow.errors import InputError
from hf_grow.growth import Method
from hf_grow.recipe import Options

SKIP = "\0absent"
_NO_SHORT: Mapping[str, str] = types.MappingProxyType({})


def add_flags(parser: argparse._ActionsContainer, models: Iterable[type[Options]], short: Mapping[str, str] = _NO_SHORT) -> None:
    """One flag for each field of the models (fields of the same name share a flag). Values stay text; the model reads them."""
    seen: set[str] = set()
    for model in models:
        for name, field in model.model_fields.items():
            if name not in seen:
                seen.add(name)
                _add_flag(parser, name, field, [short[name]] if name in short else [])


def _add_flag(parser: argparse._ActionsContainer, name: str, field: FieldInfo, short: list[str]) -> None:
    names = [*short, "--" + name.replace("_", "-")]
    text = (field.description or "").replace("%", "%%")
    if field.default not in (None, False) and not field.is_required() and "efault" not in text:
        text += f" Default: {field.default}."
    if field.annotation is bool:
        parser.add_argument(*names, dest=name, action="store_true", default=SKIP, help=text)
    else:
        parser.add_argument(*names, dest=name, default=SKIP, metavar=_metavar(name, field), help=text)


def _metavar(name: str, field: FieldInfo) -> str:
    if "tuple" in str(field.annotation):
        return "LIST"
    if name == "to":
        return "SIZE"
    if name in ("max_shard_size", "memory_budget"):
        return "BYTES"
    if name == "output":
        return "DIR"
    kinds = typing.get_args(field.annotation) if isinstance(field.annotation, types.UnionType) else (field.annotation,)
    return "N" if int in kinds or "int" in str(field.annotation) else "X" if "float" in str(field.annotation) else name.upper()


def given(arguments: argparse.Namespace, model: type[Options]) -> dict[str, Any]:
    """The flags of `model` that the user gave."""
    return {n: v for n in model.model_fields if (v := getattr(arguments, n, SKIP)) != SKIP}


def refuse_foreign(arguments: argparse.Namespace, method: Method, all_methods: Mapping[str, Method]) -> None:
    """Raises InputError for a flag that was given but means nothing to the chosen method."""
    for other in all_methods.values():
        for name in given(arguments, other.options).keys() - method.options.model_fields.keys():
            owners = [m.name for m in all_methods.values() if name in m.options.model_fields]
            raise InputError(
                f"--{name.replace('_', '-')} means nothing to method {method.name}.", hint=f"It belongs to: {', '.join(owners)}."
            )
