"""The command that makes a grown checkpoint again, from the options in growth.json.

As flags where possible, else as a recipe: for several steps, and for options that were read from files.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from hf_grow.common import yaml_io
from hf_grow.growth.plan import GrowthPlan
from hf_grow.growth.source_info import SourceInfo
from hf_grow.methods import METHODS
from hf_grow.options import parse_size
from hf_grow.publish.layer_map import index_ranges
from hf_grow.publish.names import folder_name, public_path

OWN_COMMAND = {"dus"}
"""Methods with a command of their own, in addition to those that are the only one of their kind."""


def command(plan: GrowthPlan, output: str) -> str | None:
    """The shell command with every option given; None where flags cannot express them. A local source is read from the current folder."""
    growth = plan.growth
    method = METHODS.get(growth.method)
    if method is None or not _is_known(growth.method, growth.options):
        return None
    source = plan.source
    own = method.name in OWN_COMMAND or method.name == method.kind
    words = ["hf-grow", method.name if own else method.kind, source.ref if source.revision else f"./{folder_name(source.ref)}"]
    words += ["--revision", source.revision] if source.revision else []
    words += [] if own else ["--method", method.name]
    try:
        words += [w for name, value in growth.options.items() for w in _flag(name, value, source.donors)]
    except TypeError:
        return None
    return shlex.join([*words, "-o", output])


def recipe(plan: GrowthPlan) -> str | None:
    """The YAML recipe for `hf-grow grow`; None for methods that this version does not have."""
    growth, source = plan.growth, plan.source
    if set(growth.options) == {"steps"} and isinstance(growth.options["steps"], list):
        steps = growth.options["steps"]
        known = all(isinstance(s, Mapping) and _is_known(s.get("method"), {k: v for k, v in s.items() if k != "method"}) for s in steps)
        data: dict[str, Any] = {"steps": [_without_local_paths(s, source.donors) for s in steps] if known else []}
    else:
        known = _is_known(growth.method, growth.options)
        data = {"method": growth.method, **_without_local_paths(growth.options, source.donors)}
    if not known:
        return None
    head = {"source": source.ref, "revision": source.revision} if source.revision else {"source": f"./{folder_name(source.ref)}"}
    return yaml_io.dumps({**head, **data})


def _is_known(method: Any, options: Mapping[str, Any]) -> bool:
    return isinstance(method, str) and method in METHODS and set(options) <= set(METHODS[method].options.model_fields)


def _without_local_paths(options: Mapping[str, Any], donors: Mapping[str, SourceInfo]) -> dict[str, Any]:
    """The options without the paths of this machine."""
    return {k: [_public(x, donors) if isinstance(x, str) else x for x in v] if isinstance(v, list) else v for k, v in options.items()}


def _flag(name: str, value: Any, donors: Mapping[str, SourceInfo]) -> list[str]:
    """One option as flag and value. Raises TypeError for a value that no flag takes."""
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag] if value else []
    if isinstance(value, list) and value and all(type(v) is int for v in value):
        return [flag, ",".join(index_ranges(value))]
    if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
        return [flag, ",".join(_public(v, donors) for v in value)]
    if isinstance(value, list) and value and all(isinstance(v, int | float) and not isinstance(v, bool) for v in value):
        return [flag, ",".join(map(_number, value))]
    if isinstance(value, str):
        return [flag, _public(value, donors)]
    if isinstance(value, int) and name == "to":
        return [flag, size(value)]
    if isinstance(value, int | float):
        return [flag, _number(value)]
    raise TypeError(name)


def size(value: int) -> str:
    """10_700_000_000 -> '10.7B', if that is exact; else the number itself."""
    for unit, worth in (("T", 10**12), ("B", 10**9), ("M", 10**6)):
        text = f"{value / worth:.5g}{unit}"
        if value >= worth and "e" not in text and parse_size(text) == value:
            return text
    return str(value)


def _number(value: float) -> str:
    """2.0 -> '2': flags read both alike."""
    return str(int(value)) if float(value).is_integer() and abs(value) < 2**53 else repr(value)


def _public(value: str, donors: Mapping[str, SourceInfo]) -> str:
    """A path of this machine, or of a local donor, as ./NAME."""
    return f"./{folder_name(value)}" if value in {o.ref for o in donors.values() if not o.revision} else public_path(value)
