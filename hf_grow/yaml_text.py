"""YAML read and written in one way everywhere, with numbers as YAML 1.2 has them.

PyYAML follows YAML 1.1, in which a float needs a point and a signed exponent: `1e-4` would be a string. YAML 1.2 (section 10.3.2 of
https://yaml.org/spec/1.2.2) takes it for the number that it looks like.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)[eE][-+]?[0-9]+\Z")
_TAG = "tag:yaml.org,2002:float"


@cache
def _classes() -> tuple[Any, Any]:
    """Loader and dumper; the dumper puts quotes around a string that the loader would take for a number."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    class Dumper(yaml.SafeDumper):
        pass

    for kind in (Loader, Dumper):
        kind.add_implicit_resolver(_TAG, _FLOAT, list("-+.0123456789"))
    return Loader, Dumper


def loads(text: str) -> Any:
    """The data in a YAML text. Raises yaml.YAMLError."""
    import yaml

    return yaml.load(text, _classes()[0])


def dumps(data: Any) -> str:
    """Block style, keys in their order, without a newline at the end."""
    import yaml

    return str(yaml.dump(data, Dumper=_classes()[1], sort_keys=False, allow_unicode=True, width=120)).rstrip()
