"""The layer map: which source layers each target layer comes from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Literal

from hf_grow.errors import SourceError
from hf_grow.growth.growth import LayerOrigin
from hf_grow.growth.plan import GrowthPlan
from hf_grow.model.architecture import Architecture

Kind = Literal["kept", "copy", "average", "identity"]
DESCRIPTIONS: dict[Kind, str] = {
    "kept": "layer of the source",
    "copy": "further copy of a layer",
    "average": "average of layers",
    "identity": "adds nothing until trained",
}
"""Kinds of target layers with their description, in the order of a legend."""


@dataclass(frozen=True)
class Block:
    """One target layer."""

    sources: tuple[int, ...]
    kind: Kind


@dataclass(frozen=True)
class LayerRun:
    """Target layers [start, stop) of one kind whose sources go up one by one from `source`; averages stand alone."""

    start: int
    stop: int
    sources: tuple[int, ...]
    kind: Kind

    @property
    def target(self) -> str:
        return _span(self.start, self.stop - 1)

    @property
    def source(self) -> str:
        return (
            " ~ ".join(map(str, self.sources))
            if len(self.sources) > 1
            else _span(self.sources[0], self.sources[0] + self.stop - self.start - 1)
        )


@dataclass(frozen=True)
class LayerMap:
    method: str
    source: Architecture
    target: Architecture
    blocks: tuple[Block, ...]
    further: tuple[str, ...] = ()
    """Labels of the donors: further source checkpoints, used in every layer."""

    @property
    def kinds(self) -> tuple[Kind, ...]:
        return tuple(k for k in DESCRIPTIONS if any(b.kind == k for b in self.blocks))

    def runs(self) -> list[LayerRun]:
        starts = [0, *(i for i, (a, b) in enumerate(pairwise(self.blocks), 1) if not _follows(a, b)), len(self.blocks)]
        return [LayerRun(a, b, self.blocks[a].sources, self.blocks[a].kind) for a, b in pairwise(starts)]

    def describe(self) -> str:
        """The whole map as text, for screen readers."""
        parts = [f"{r.target} from {r.source} ({DESCRIPTIONS[r.kind]})" for r in self.runs()]
        listed = "; ".join(parts[:40]) + (f"; and {len(parts) - 40} more runs" if len(parts) > 40 else "")
        more = f" {len(self.further)} further source checkpoints go into every layer." if self.further else ""
        return f"{self.source.layers} layers become {self.target.layers}. Target layers: {listed}.{more}"


def layer_map(plan: GrowthPlan) -> LayerMap:
    """Raises SourceError for a record whose layers are not those of its configs."""
    source, target = plan.source.architecture, plan.architecture
    layers = plan.growth.layers
    valid = all(o.sources and all(type(s) is int and 0 <= s < source.layers for s in o.sources) for o in layers)
    if not valid or len(layers) != target.layers:
        raise SourceError("growth.json is damaged: its layers are not those of its configs.")
    return LayerMap(plan.growth.method, source, target, tuple(Block(o.sources, _kind(o)) for o in layers), tuple(plan.source.donors))


def shape_lines(arch: Architecture) -> list[str]:
    """The shape of a model in short lines."""
    lines = [f"{arch.layers} layers", f"hidden size {arch.size('hidden')}"]
    sizes = [f"FFN {arch.size('inter')}"] if arch.size("inter") else []
    sizes += [f"expert FFN {arch.size('expert_inter')}"] if arch.size("expert_inter") else []
    lines.append(", ".join([*sizes, f"heads {arch.heads}/{arch.size('kv')}"]))
    return [*lines, f"{arch.size('experts')} experts, {arch.top_k} per token"] if arch.is_moe else lines


def index_ranges(indices: Iterable[int]) -> list[str]:
    """[0, 1, 2, 1, 2, 5] -> ['0-2', '1-2', '5']: inclusive ranges of consecutive indices."""
    runs: list[list[int]] = []
    for i in indices:
        if runs and i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return [_span(first, last) for first, last in runs]


def layer_ranges(layers: Sequence[LayerOrigin]) -> str:
    """'0-23, 8-31'; identity blocks are marked +, averages ~."""
    parts: list[str] = []
    for plain, group in groupby(layers, lambda o: len(o.sources) == 1 and not o.identity):
        if plain:
            parts += index_ranges(o.sources[0] for o in group)
        else:
            parts += [f"{o.sources[0]}+" if o.identity else "~".join(map(str, o.sources)) for o in group]
    return ", ".join(parts) if len(parts) <= 24 else ", ".join(parts[:23]) + f" ... ({len(parts)} runs)"


def _kind(origin: LayerOrigin) -> Kind:
    return "identity" if origin.identity else "average" if len(origin.sources) > 1 else "copy" if origin.new else "kept"


def _follows(a: Block, b: Block) -> bool:
    return a.kind == b.kind != "identity" and len(a.sources) == len(b.sources) == 1 and b.sources[0] == a.sources[0] + 1


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"
