"""Options as pydantic models: one declaration gives the YAML keys, the command-line flags, their help and their defaults.

The docstring under a field is its help text. YAML is read strictly: unknown keys and strings in place of numbers are errors, and all of
them are reported at once.
"""

from __future__ import annotations

import os
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
"""Length limit of a layer list."""
MAX_YAML = 1_000_000
"""Size limit in bytes of a YAML file."""

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


class Options(BaseModel):
    """Base of all option models: frozen, strict about unknown keys, without NaN and infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    def non_defaults(self) -> dict[str, Any]:
        """The options that differ from their defaults, as JSON data: what growth.json records."""
        return self.model_dump(mode="json", exclude_defaults=True)

    def extra_sources(self) -> tuple[str, ...]:
        """Additional source checkpoints (folders or Hub ids) that the growth reads, in the order of their labels "1", "2", ..."""
        return ()


def parse_size(value: Any) -> Any:
    """'10.7B' -> 10_700_000_000. Units K, M, B, T (powers of 1000); plain integers pass. Raises ValueError."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([KMBT]?)\s*", value, re.IGNORECASE)
    if not match:
        raise ValueError(f"{value!r} is not a size; write 10.7B, 350M or a plain number of parameters")
    return round(float(match[1]) * _UNITS[match[2].upper()])


def parse_bytes(value: Any) -> Any:
    """'5GB' -> 5_000_000_000; KiB, MiB, ... are powers of 1024. Plain integers pass. Raises ValueError."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([KMGT]?)(i?)B?\s*", value, re.IGNORECASE)
    if not match:
        raise ValueError(f"{value!r} is not a number of bytes; write 5GB, 512MiB or a plain number")
    base = 1024 if match[3] else 1000
    return round(float(match[1]) * base ** ["", "K", "M", "G", "T"].index(match[2].upper()))


def parse_layers(value: Any) -> Any:
    """'0-23,8-31' -> (0, ..., 23, 8, ..., 31); ranges are inclusive, as in the papers. Raises ValueError."""
    if not isinstance(value, str):
        return tuple(value) if isinstance(value, list) else value
    layers: list[int] = []
    for part in value.split(","):
        match = re.fullmatch(r"\s*(\d{1,5})\s*(?:-\s*(\d{1,5})\s*)?", part)
        if not match:
            raise ValueError(f"{part!r} is not a layer range; write 0-23,8-31 (ranges are inclusive)")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"{part.strip()!r} is a decreasing range; write {last}-{first}, or single layers")
        layers.extend(range(first, last + 1))
        if len(layers) > MAX_LISTED_LAYERS:
            raise ValueError(f"the list holds more than {MAX_LISTED_LAYERS:,} layers")
    return tuple(layers)


Count = Annotated[int, BeforeValidator(parse_size), Field(ge=1, le=10**18)]
Bytes = Annotated[int, BeforeValidator(parse_bytes)]
LayerList = Annotated[tuple[int, ...], BeforeValidator(parse_layers)]


@dataclass(frozen=True)
class Requires:
    """Field metadata: the option requires `other` (or `or_else`) to be truthy, or one of ``values`` if any are given."""

    other: str
    values: tuple[Any, ...] = ()
    or_else: str = ""


@dataclass(frozen=True)
class Excludes:
    """Field metadata: the option cannot be combined with `other`."""

    other: str


M = TypeVar("M", bound=BaseModel)


def parse(model: type[M], data: Mapping[str, Any], *, where: str, strict: bool = True, check_requirements: bool = True) -> M:
    """Validates `data` as a `model`.

    ``where``: the source of the data, for the message. ``strict=False``: strings are converted, as on a command line.
    ``check_requirements=False``: leaves `Requires` and `Excludes` to a later `unmet_requirements` together with other options.
    Raises InputError that lists all errors, one per line.
    """
    parsed, errors = validate(model, data, strict=strict)
    if parsed is not None and check_requirements:
        errors = unmet_requirements(parsed)
    raise_errors(where, errors)
    assert parsed is not None
    return parsed


def combined(*models: type[Options]) -> type[Options]:
    """A model with the fields of several, so that the mistakes in all of them are reported at once. `part` takes it apart again."""
    return type("Options", models, {"__module__": __name__})


def part(options: Options, model: type[M]) -> M:
    """The fields of ``model`` in the options of a `combined` model."""
    return model(**{name: getattr(options, name) for name in options.model_fields_set & model.model_fields.keys()})


def raise_errors(where: str, errors: Sequence[str]) -> None:
    """Raises InputError with all errors, one per line and each once, if there are any."""
    if errors := list(dict.fromkeys(errors)):
        raise InputError(f"{where} has {len(errors)} mistake{'s' * (len(errors) > 1)}:\n" + "\n".join(f"  {line}" for line in errors))


def find_yaml(text: str, bundled: Mapping[str, Path], missing: str) -> Path:
    """The YAML file that ``text`` names: a path, else the name of a bundled file. ``missing``: begins the message of the InputError if there is none."""
    path = Path(text)
    if path.is_file() or path.suffix or os.sep in text:
        return path  # if it is missing, the error comes from reading it
    if text not in bundled:
        raise InputError(f"{missing} {text!r}.{did_you_mean(text, bundled)}", hint=f"Give a YAML file, or one of: {', '.join(bundled)}.")
    return bundled[text]


def unmet_requirements(*options: BaseModel) -> list[str]:
    """One line per given option whose `Requires` or `Excludes` is violated; they see the fields of all `options`, not nested ones."""
    values = {name: getattr(model, name) for model in options for name in type(model).model_fields}
    errors = []
    for model in options:
        for name, field in type(model).model_fields.items():
            if name not in model.model_fields_set or values[name] is None or values[name] is False:
                continue
            label = field.alias or name
            for rule in field.metadata:
                if not isinstance(rule, Requires | Excludes) or rule.other not in values:
                    continue
                other, value = rule.other, values[rule.other]
                if isinstance(rule, Excludes):
                    if value is not None and value is not False:
                        errors.append(f"{label}: cannot be combined with {other}. Remove one of them.")
                elif rule.values and value not in rule.values:
                    errors.append(f"{label}: requires {other} {' or '.join(map(str, rule.values))}, not {value}.")
                elif not rule.values and not value and not values.get(rule.or_else):
                    needed = f"{other} or {rule.or_else}" if rule.or_else else other
                    errors.append(f"{label}: requires {needed}. Add {needed}, or remove {label}.")
            errors += [f"{label}.{line}" for line in _unmet_nested(values[name])]
    return errors


def _unmet_nested(value: Any) -> list[str]:
    if isinstance(value, BaseModel):
        return unmet_requirements(value)
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return [f"{key}.{line}" for key, v in items for line in _unmet_nested(v)]


def validate(model: type[M], data: Mapping[str, Any], *, strict: bool = True) -> tuple[M | None, list[str]]:
    """`data` as a `model`, or None with one line per error that begins with the key."""
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


def _model_at(model: type[BaseModel], location: tuple[str | int, ...]) -> type[BaseModel]:
    """The nested model at a location, as far as its fields hold a single model each."""
    for key in location:
        inner = _models_in(model.model_fields[key].annotation) if isinstance(key, str) and key in model.model_fields else []
        model = inner[0] if len(inner) == 1 else model
    return model


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [inner for part in get_args(annotation) for inner in _models_in(part)]


def nested_keys(model: type[BaseModel]) -> list[str]:
    """The keys of a model, then those of nested models with dots."""
    nested = [(f.alias or n, inner) for n, f in model.model_fields.items() for inner in _models_in(f.annotation)]
    return [f.alias or n for n, f in model.model_fields.items()] + [f"{key}.{k}" for key, inner in nested for k in nested_keys(inner)]


def load_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML mapping with string keys. Raises InputError."""
    import yaml

    try:
        data = yaml_io.loads(read_text(path, max_bytes=MAX_YAML, error=InputError, missing=f"Cannot read {path}: no such file."))
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict) or not all(isinstance(k, str) for k in data):
        got = "nothing" if data is None else f"a {type(data).__name__}"
        raise InputError(f"{path} must hold `key: value` lines, got {got}.")
    return data
