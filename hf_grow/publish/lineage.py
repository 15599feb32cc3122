"""The lineage of a grown checkpoint from growth.json: a tree of its sources and donors, back to the first ancestor.

growth.json may come from anyone: values of an unexpected form are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hf_grow.checkpoint.provenance import describe_training
from hf_grow.growth.source_info import SourceInfo
from hf_grow.publish.markdown import line
from hf_grow.publish.names import public_ref

MOST_STEPS = 200
MOST_DONORS = 64


@dataclass(frozen=True)
class Node:
    """A model in the lineage."""

    name: str
    revision: str = ""
    """Commit on the Hub; empty for a folder."""
    step: str = ""
    """How it was grown from the nodes below: 'dus, layers 32 -> 48, changes the function', and what was trained then. Empty for a first ancestor."""
    label: str = ""
    """What a further source is called in the map."""
    parents: tuple[Node, ...] = ()

    @property
    def text(self) -> str:
        commit = f" ({self.revision[:12]})" if self.revision else ""
        return f"{f'{self.label}: ' if self.label else ''}{self.name}{commit}{f', grown by {self.step}' if self.step else ''}"

    def ascii(self) -> Iterator[str]:
        """The tree as lines of text."""
        yield self.text
        for i, parent in enumerate(self.parents):
            first, rest = ("`-- ", "    ") if i == len(self.parents) - 1 else ("|-- ", "|   ")
            for n, below in enumerate(parent.ascii()):
                yield (rest if n else first) + below

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "revision": self.revision, "step": self.step, "label": self.label,
                "sources": [p.to_json() for p in self.parents]}  # fmt: skip


def lineage(name: str, history: Iterable[Mapping[str, Any]], donors: Mapping[str, SourceInfo] | None = None, revision: str = "") -> Node:
    """The tree of a model called `name`; `history`: its growths, oldest first; ``donors``: the further sources of the last one."""
    steps = [s for s in list(history)[-MOST_STEPS:] if isinstance(s, Mapping)]
    more = [lineage(_public(o.ref, o.revision), o.history, o.donors, o.revision) for o in list((donors or {}).values())[:MOST_DONORS]]
    labelled = tuple(Node(n.name, n.revision, n.step, line(label, 60), n.parents) for n, label in zip(more, donors or {}, strict=False))
    # Built from the first ancestor on, so that a long history needs no recursion.
    node: Node | None = None
    for i, step in enumerate(steps):
        source = step.get("source")
        ref, commit = (source.get("ref"), source.get("revision")) if isinstance(source, Mapping) else (None, None)
        how = _step(steps[i - 1]) if i else ""
        node = Node(_public(ref, commit), _commit(commit), how, parents=(node,) if node else ())
    return Node(line(name, 100), _commit(revision), _step(steps[-1]) if steps else "", parents=((node, *labelled) if node else labelled))


def hub_ancestors(history: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(id, commit) of the ancestors that came from the Hub, the nearest first."""
    ancestors = []
    for step in reversed(list(history)[-MOST_STEPS:]):
        source = step.get("source") if isinstance(step, Mapping) else None
        if isinstance(source, Mapping) and isinstance(source.get("ref"), str) and _commit(source.get("revision")):
            ancestors.append((str(source["ref"]), str(source["revision"])))
    return ancestors


def _public(ref: Any, revision: Any) -> str:
    return line(public_ref(ref, revision), 100) if isinstance(ref, str) and ref else "?"


def _commit(revision: Any) -> str:
    return line(revision, 40) if isinstance(revision, str) else ""


def _step(step: Mapping[str, Any]) -> str:
    method, layers, guarantee = step.get("method"), step.get("layers"), step.get("guarantee")
    parts = [line(method, 60) if isinstance(method, str) else "?"]
    if isinstance(layers, list | tuple) and len(layers) == 2 and all(type(n) is int for n in layers):
        parts.append(f"layers {layers[0]} -> {layers[1]}")
    if isinstance(guarantee, Mapping) and isinstance(guarantee.get("kind"), str):
        parts.append(line(guarantee["kind"], 40))
    trained = describe_training(step.get("training"))
    return ", ".join(parts) + (f"; then {trained}" if trained else "")
