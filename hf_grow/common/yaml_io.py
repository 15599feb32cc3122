"""YAML read and written in one way everywhere, with numbers as YAML 1.2 has them.

PyYAML follows YAML 1.1, in which a float needs a point and a signed exponent: `1e-4` would be a string. YAML 1.2 (section 10.3.2 of
https://yaml.org/spec/1.2.2) takes it for the number that it looks like. A date stays a string, as there.

A file may come from anywhere, so its depth and its size with all aliases written out are bounded, and a key must not stand twice in one place,
where the second would replace the first without a word.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)[eE][-+]?[0-9]+\Z")
_NO_TEXT = re.compile("[\0\ud800-\udfff]")  # by escapes; no file name holds them, and UTF-8 does not
_TAG, _DATE = "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp"
MAX_DEPTH, MAX_NODES = 30, 50_000
"""Levels inside each other, and values (100 characters of text count as one) with every alias counted as what it stands for."""


@cache
def _classes() -> tuple[Any, Any, Any]:
    """Loader, loader that passes over tags of others, and dumper; the dumper puts quotes around a string that the loader would take for a number."""
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
            if isinstance(node, yaml.ScalarNode) and _NO_TEXT.search(node.value):
                raise yaml.YAMLError("a text in it holds half of a character, or a zero byte")
            if alias and node not in self.sizes:
                raise yaml.YAMLError("an alias stands inside what it stands for")
            if not alias:
                self.sizes[node] = self.total - before + 1 + (len(node.value) // 100 if isinstance(node, yaml.ScalarNode) else 0)
            self.total = before + self.sizes[node]
            if self.total > MAX_NODES:
                raise yaml.YAMLError(f"with its aliases it holds more than {MAX_NODES} values")
            return node

        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            seen = set()
            for key in (k for k, _ in node.value if isinstance(k, yaml.ScalarNode) and k.value != "<<"):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(None, None, f"the key {key.value[:80]!r} stands twice", key.start_mark)
                seen.add(key.value)
            return node

    resolvers: Any = yaml.SafeLoader.yaml_implicit_resolvers
    Loader.yaml_implicit_resolvers = {first: [pair for pair in pairs if pair[0] != _DATE] for first, pairs in resolvers.items()}

    class LocalTags(Loader):
        pass

    LocalTags.add_multi_constructor("!", lambda loader, suffix, node: None)

    class Dumper(yaml.SafeDumper):
        pass

    for kind in (Loader, Dumper):
        kind.add_implicit_resolver(_TAG, _FLOAT, list("-+.0123456789"))
    return Loader, LocalTags, Dumper


def loads(text: str, *, local_tags: bool = False) -> Any:
    """The data in a YAML text. Raises yaml.YAMLError; ``local_tags``: not for values with tags such as !function, which become None."""
    import yaml

    try:
        return yaml.load(text, _classes()[local_tags])
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
    ) as error:  # a tag or a number that its constructor cannot take
        raise yaml.YAMLError(f"a value is not what its tag or form says ({error})") from None


def dumps(data: Any) -> str:
    """Block style, keys in their order, without a newline at the end."""
    import yaml

    return str(yaml.dump(data, Dumper=_classes()[2], sort_keys=False, allow_unicode=True, width=120)).rstrip()
