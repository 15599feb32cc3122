"""The one command that makes a grown checkpoint again, from what growth.json keeps of how it was asked for.

Flags where they can say it, else a recipe: for several steps, and for options that were read from files.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from hf_grow.common import yaml_io as yaml_text
from hf_grow.growth.plan import GrowthPlan
from hf_grow.growth.source_info import SourceInfo
from hf_grow.methods import METHODS
from hf_grow.options import parse_size
from hf_grow.publish.names import folder_name, public_path

OWN_COMMAND = {"dus"}
"""Methods that are commands, besides those that are the only one of their kind."""


def command(plan: GrowthPlan, output: str) -> str | None:
    """As typed in a shell, with every option that was given; None where flags cannot say it. A local source is taken from the current folder."""
    growth = plan.growth
    method = METHODS.get(growth.method)
    if method is None or not _known(growth.method, growth.options):
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
    """As a recipe for `hf-grow grow`; None for a growth that no recipe makes (a method of another version, or of somebody's own)."""
    growth, source = plan.growth, plan.source
    if set(growth.options) == {"steps"} and isinstance(growth.options["steps"], list):
        steps = growth.options["steps"]
        known = all(isinstance(s, Mapping) and _known(s.get("method"), {k: v for k, v in s.items() if k != "method"}) for s in steps)
        data: dict[str, Any] = {"steps": [_shared(s, source.donors) for s in steps] if known else []}
    else:
        known = _known(growth.method, growth.options)
        data = {"method": growth.method, **_shared(growth.options, source.donors)}
    if not known:
        return None
    head = {"source": source.ref, "revision": source.revision} if source.revision else {"source": f"./{folder_name(source.ref)}"}
    return yaml_text.dumps({**head, **data})


def _known(method: Any, options: Mapping[str, Any]) -> bool:
    return isinstance(method, str) and method in METHODS and set(options) <= set(METHODS[method].options.model_fields)


def _shared(options: Mapping[str, Any], others: Mapping[str, SourceInfo]) -> dict[str, Any]:
    """The options without the paths of this machine."""
    return {k: [_public(x, others) if isinstance(x, str) else x for x in v] if isinstance(v, list) else v for k, v in options.items()}


def _flag(name: str, value: Any, others: Mapping[str, SourceInfo]) -> list[str]:
    """The words of one option. Raises TypeError for a value that no flag takes."""
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag] if value else []
    if isinstance(value, list) and value and all(type(v) is int for v in value):
        return [flag, ranges(value)]
    if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
        return [flag, ",".join(_public(v, others) for v in value)]
    if isinstance(value, list) and value and all(isinstance(v, int | float) and not isinstance(v, bool) for v in value):
        return [flag, ",".join(map(_number, value))]
    if isinstance(value, str):
        return [flag, _public(value, others)]
    if isinstance(value, int) and name == "to":
        return [flag, size(value)]
    if isinstance(value, int | float):
        return [flag, _number(value)]
    raise TypeError(name)


def size(value: int) -> str:
    """10_700_000_000 -> '10.7B', where that says all of it; else the number itself."""
    for unit, worth in (("T", 10**12), ("B", 10**9), ("M", 10**6)):
        text = f"{value / worth:.5g}{unit}"
        if value >= worth and "e" not in text and parse_size(text) == value:
            return text
    return str(value)


def _number(value: float) -> str:
    """2.0 -> '2': flags read both alike."""
    return str(int(value)) if float(value).is_integer() and abs(value) < 2**53 else repr(value)


def _public(value: str, others: Mapping[str, SourceInfo]) -> str:
    """A path of this machine, or of a local donor, as ./NAME."""
    return f"./{folder_name(value)}" if value in {o.ref for o in others.values() if not o.revision} else public_path(value)


def ranges(values: list[int]) -> str:
    """[0, 1, 2, 1, 2] -> '0-2,1-2': both ends count, as the flags read it."""
    parts: list[list[int]] = []
    for v in values:
        if parts and v == parts[-1][1] + 1:
            parts[-1][1] = v
        else:
            parts.append([v, v])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
