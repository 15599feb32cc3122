"""Training recipes by name or file, and overrides from the command line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_grow.common import yaml_io
from hf_grow.errors import InputError
from hf_grow.options import load_yaml
from hf_grow.training.config.train_config import RecipeData, read_recipe

RECIPES = {path.stem: path for path in sorted((Path(__file__).parents[2] / "_recipes" / "train").glob("*.yaml"))}
"""The bundled training recipes (recipes/train/ in the repository)."""


def parse_overrides(words: list[str]) -> dict[str, Any]:
    """["--data.seq_length", "128", "--bf16"] -> {"data.seq_length": 128, "bf16": True}. Values are parsed as YAML.

    Raises InputError for a word without a key, and for a value that is not YAML.
    """
    import yaml

    overrides: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or len(word) < 3:
            raise InputError(f"Unexpected argument {word!r}.", hint="Write --KEY VALUE; a list as --train '[new, norms]'.")
        key, equals, text = word[2:].partition("=")
        if not equals:
            text = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        try:
            value = yaml_io.loads(text)
        except yaml.YAMLError:
            raise InputError(
                f"--{key}: {text!r} is not valid YAML.", hint="Quote values with characters that YAML gives a meaning."
            ) from None
        section, *inner = key.split(".")
        overrides[".".join([section.replace("-", "_"), *inner])] = value
    return overrides


def load_recipe(path: Path, overrides: Mapping[str, Any]) -> RecipeData:
    """The recipe in a file, with ``overrides`` by dotted key ({"data.seq_length": 128}). Raises InputError if the file cannot be read."""
    data = load_yaml(path)
    for key, value in overrides.items():
        data = _with_key(data, key.split("."), value, key)
    return read_recipe(data, str(path))


def _with_key(data: Any, keys: list[str], value: Any, dotted: str) -> dict[str, Any]:
    """A copy of nested data with one value set. Raises InputError where a value on the way is no mapping."""
    if data is not None and not isinstance(data, dict):
        raise InputError(f"--{dotted}: {keys[0]} cannot be set inside {str(data)[:40]!r}, which is not a mapping.")
    copy = dict(data or {})
    copy[keys[0]] = value if len(keys) == 1 else _with_key(copy.get(keys[0]), keys[1:], value, dotted)
    return copy
