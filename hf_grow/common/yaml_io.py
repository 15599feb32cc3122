"""YAML reading and writing with YAML 1.2 numbers, bounded depth and size, and no duplicate keys.

PyYAML follows YAML 1.1, in which a float needs a point and a signed exponent, so that `1e-4` would be a string. Here it is a number, and a date
a string, as in YAML 1.2 (section 10.3.2 of https://yaml.org/spec/1.2.2). Input is untrusted: aliases count with their expanded size.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)[eE][-+]?[0-9]+\Z")
_INVALID_TEXT = re.compile("[\0\ud800-\udfff]")  # possible through escapes; neither file names nor UTF-8 can hold them
_TAG, _DATE = "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp"
MAX_DEPTH, MAX_NODES = 30, 50_000
"""Limits: nesting levels, and values with aliases expanded (100 characters of text count as one)."""


@cache
def _classes() -> tuple[Any, Any, Any]:
    """Loader, loader that ignores unknown tags, and dumper, which quotes strings that the loader would read as numbers."""
    import yaml

    class Loader(yaml.SafeLoader):
        def __init__(self, stream: str) -> None:
            super().__init__(stream)
            self.depth, self.total = 0, 0
            self.sizes: dict[yaml.Node, int] = {}

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.depth == MAX_DEPTH:
                raise yaml.YAMLError(f"it is nested deeper than {MAX_DEPTH} levels")
            before, alias = self.total, self.check_event(yaml.AliasEvent)
            self.depth += 1
            node: Any = super().compose_node(parent, index)
            self.depth -= 1
            if isinstance(node, yaml.ScalarNode) and _INVALID_TEXT.search(node.value):
                raise yaml.YAMLError("a string contains a lone surrogate or a NUL byte")
            if alias and node not in self.sizes:
                raise yaml.YAMLError("an alias refers to a node that contains it")
            if not alias:
                self.sizes[node] = self.total - before + 1 + (len(node.value) // 100 if isinstance(node, yaml.ScalarNode) else 0)
            self.total = before + self.sizes[node]
            if self.total > MAX_NODES:
                raise yaml.YAMLError(f"with aliases expanded it holds more than {MAX_NODES} values")
            return node

        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            seen = set()
            for key in (k for k, _ in node.value if isinstance(k, yaml.ScalarNode) and k.value != "<<"):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(None, None, f"duplicate key {key.value[:80]!r}", key.start_mark)
                seen.add(key.value)
            return node

    resolvers: Any = yaml.SafeLoader.yaml_implicit_resolvers
    Loader.yaml_implicit_resolvers = {first: [pair for pair in pairs if pair[0] != _DATE] for first, pairs in resolvers.items()}

    class IgnoreTags(Loader):
        pass

    IgnoreTags.add_multi_constructor("!", lambda loader, suffix, node: None)

    class Dumper(yaml.SafeDumper):
        pass

    for kind in (Loader, Dumper):
        kind.add_implicit_resolver(_TAG, _FLOAT, list("-+.0123456789"))
    return Loader, IgnoreTags, Dumper


def loads(text: str, *, local_tags: bool = False) -> Any:
    """The data in a YAML text. ``local_tags``: values with tags such as !function become None instead of an error. Raises yaml.YAMLError."""
    import yaml

    try:
        return yaml.load(text, _classes()[local_tags])
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:  # raised by the constructor of a tag
        raise yaml.YAMLError(f"a value does not match its tag ({error})") from None


def dumps(data: Any) -> str:
    """YAML in block style, keys in the given order, without a final newline."""
    import yaml

    return str(yaml.dump(data, Dumper=_classes()[2], sort_keys=False, allow_unicode=True, width=120)).rstrip()
