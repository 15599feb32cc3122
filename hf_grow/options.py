"""Options and recipes: one declaration gives the YAML keys, the command-line flags, their help and their defaults.

An options class is a pydantic model; the docstring under a field is its help. YAML is read strictly (an unknown key or a string where a
number belongs is an error), and every mistake is reported at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from hf_grow.common import yaml_io
from hf_grow.common.safe_files import read_text
from hf_grow.common.suggest import did_you_mean
from hf_grow.errors import InputError

MAX_LISTED_LAYERS = 100_000
"""Layers of one list: more than any model has."""
MAX_YAML = 1_000_000
"""Bytes of a recipe, or of a file of prompts."""

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


class Options(BaseModel):
    """Base of all option models."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    def non_defaults(self) -> dict[str, Any]:
        """The options that differ from their defaults, as JSON data."""
        return self.model_dump(mode="json", exclude_defaults=True)

    def extra_sources(self) -> tuple[str, ...]:
        """Further source checkpoints (folders or Hub ids) that a growth with these options reads; it calls them "1", "2", and so on."""
        return ()


def parse_size(value: Any) -> Any:
    """'10.7B' -> 10_700_000_000. Units K, M, B, T; plain integers pass."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([KMBT]?)\s*", value, re.IGNORECASE)
    if not match:
        raise ValueError(f"{value!r} is no size; write 10.7B, 350M or a plain number of parameters")
    return round(float(match[1]) * _UNITS[match[2].upper()])


def parse_bytes(value: Any) -> Any:
    """'5GB' -> 5_000_000_000; 'KiB' and so on are powers of 1024. Plain integers pass."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([KMGT]?)(i?)B?\s*", value, re.IGNORECASE)
    if not match:
        raise ValueError(f"{value!r} is no number of bytes; write 5GB, 512MiB or a plain number")
    base = 1024 if match[3] else 1000
    return round(float(match[1]) * base ** ["", "K", "M", "G", "T"].index(match[2].upper()))


def parse_layers(value: Any) -> Any:
    """'0-23,8-31' -> (0, ..., 23, 8, ..., 31): both ends count, as in the papers."""
    if not isinstance(value, str):
        return tuple(value) if isinstance(value, list) else value
    layers: list[int] = []
    for part in value.split(","):
        match = re.fullmatch(r"\s*(\d{1,5})\s*(?:-\s*(\d{1,5})\s*)?", part)
        if not match:
            raise ValueError(f"{part!r} is no layer range; write 0-23,8-31 (both ends count)")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"{part.strip()!r} runs backwards; write {last}-{first}, or single layers")
        layers.extend(range(first, last + 1))
        if len(layers) > MAX_LISTED_LAYERS:
            raise ValueError(f"the list holds more than {MAX_LISTED_LAYERS:,} layers")
    return tuple(layers)


ParameterCount = Annotated[int, BeforeValidator(parse_size), Field(ge=1, le=10**18)]
Bytes = Annotated[int, BeforeValidator(parse_bytes)]
LayerList = Annotated[tuple[int, ...], BeforeValidator(parse_layers)]


@dataclass(frozen=True)
class Requires:
    """Metadata of a field that means something only where another is given, other than as 0, no or nothing: as one of ``values``, where there are some."""

    other: str
    values: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Excludes:
    """Metadata of a field that means nothing where another is given."""

    other: str


M = TypeVar("M", bound=BaseModel)


def parse(model: type[M], data: Mapping[str, Any], *, where: str, strict: bool = True, check_requirements: bool = True) -> M:
    """`data` as a `model`. Raises InputError that lists every mistake, one line each. ``check_requirements=False``: further options will be put beside these."""
    parsed, found = validate(model, data, strict=strict)
    if parsed is not None and check_requirements:
        found = unmet_requirements(parsed)
    raise_errors(where, found)
    assert parsed is not None
    return parsed


def raise_errors(where: str, found: Sequence[str]) -> None:
    """Raises InputError with all mistakes, one a line, if there are any."""
    if found:
        raise InputError(f"{where} has {len(found)} mistake{'s' * (len(found) > 1)}:\n" + "\n".join(f"  {line}" for line in found))


def unmet_requirements(*options: BaseModel) -> list[str]:
    """One line for each option that was given and means nothing beside the others; `Needs` and `Unless` look at all of them, not at what is nested."""
    has = {name: getattr(model, name) for model in options for name in type(model).model_fields}
    found = []
    for model in options:
        for name, field in type(model).model_fields.items():
            if name not in model.model_fields_set or has[name] is None or has[name] is False:
                continue
            label = field.alias or name
            for rule in field.metadata:
                if not isinstance(rule, Requires | Excludes) or rule.other not in has:
                    continue
                other, there = rule.other, has[rule.other]
                if isinstance(rule, Excludes):
                    if there is not None and there is not False:
                        found.append(f"{label}: means nothing beside {other}. Leave one of them out.")
                elif rule.values and there not in rule.values:
                    found.append(f"{label}: belongs to {other} {' or '.join(map(str, rule.values))}, and {other} is {there}.")
                elif not rule.values and not there:
                    found.append(f"{label}: means nothing without {other}. Give that too, or leave it out.")
            found += [f"{label}.{line}" for line in _unmet_inside(has[name])]
    return found


def _unmet_inside(value: Any) -> list[str]:
    if isinstance(value, BaseModel):
        return unmet_requirements(value)
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return [f"{key}.{line}" for key, v in inside for line in _unmet_inside(v)]


def validate(model: type[M], data: Mapping[str, Any], *, strict: bool = True) -> tuple[M | None, list[str]]:
    """`data` as a `model`, or None and every mistake as a line that begins with its key."""
    try:
        return model.model_validate(dict(data), strict=strict), []
    except ValidationError as error:
        return None, [_explain(model, e) for e in error.errors(include_url=False)]


def _explain(model: type[BaseModel], error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"]) or "(whole)"
    value = error.get("input")
    if error["type"] == "extra_forbidden":
        fields = _model_at(model, error["loc"][:-1]).model_fields
        known = sorted(f.alias or name for name, f in fields.items())
        return f"{where}: unknown key.{did_you_mean(str(error['loc'][-1]), known)} Known: {', '.join(known)}."
    if error["type"] == "missing":
        return f"{where}: is missing."
    if error["type"] in ("int_type", "float_type") and isinstance(value, str):
        try:
            float(value)
        except ValueError:
            pass
        else:
            return f"{where}: {value!r} is a string. YAML needs a plain number, without quotes."
    if error["type"] == "string_type" and isinstance(value, int | float):
        return f"{where}: {value!r} is read as {'yes or no' if isinstance(value, bool) else 'a number'}; put quotes around a word."
    if error["type"] == "value_error":
        return f"{where}: {error['msg'].removeprefix('Value error, ')}"
    return f"{where}: {re.sub(r'^[A-Z][a-z]+ should', 'should', error['msg'])}, got {value!r}."


def _model_at(model: type[BaseModel], place: tuple[str | int, ...]) -> type[BaseModel]:
    """The model that stands at a place inside another, as far as its fields hold one model each."""
    for key in place:
        inner = _models_in(model.model_fields[key].annotation) if isinstance(key, str) and key in model.model_fields else []
        model = inner[0] if len(inner) == 1 else model
    return model


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in get_args(annotation) for found in _models_in(part)]


def nested_keys(model: type[BaseModel]) -> list[str]:
    """The keys of a model and, behind them, those of the models inside it, with dots."""
    below = [(f.alias or n, inner) for n, f in model.model_fields.items() for inner in _models_in(f.annotation)]
    return [f.alias or n for n, f in model.model_fields.items()] + [f"{key}.{k}" for key, inner in below for k in nested_keys(inner)]


def load_yaml(path: Path) -> dict[str, Any]:
    """A YAML file as a mapping. Raises InputError if it cannot be read or is none."""
    import yaml

    try:
        data = yaml_io.loads(read_text(path, most=MAX_YAML, error=InputError, missing=f"Cannot read {path}: there is no such file."))
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict) or not all(isinstance(k, str) for k in data):
        got = "nothing" if data is None else f"a {type(data).__name__}"
        raise InputError(f"{path} must hold `key: value` lines, got {got}.")
    return data
