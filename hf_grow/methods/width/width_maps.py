"""The expression of every tensor of a wider model: each dimension mapped by its activation space, plus random terms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from hf_grow.growth.axes import AxisMap
from hf_grow.growth.tensormap import Expr, Noise, Source, Sum, Take, Vary
from hf_grow.methods.width.activation_maps import ActivationSpace, HiddenSpaces
from hf_grow.methods.width.attention_maps import HeadDimSpace, HeadSpaces
from hf_grow.model.architecture import Architecture, Entry

Symmetry = Literal["none", "noise", "split"]


@dataclass(frozen=True)
class WidthMaps:
    """All activation spaces of one width growth."""

    arch: Architecture
    hidden: HiddenSpaces
    heads: HeadSpaces
    head_dim: HeadDimSpace
    ffn: Mapping[str, ActivationSpace]
    symmetry: Symmetry
    strength: float
    next_layer: bool
    """AKI: all added rows come from the next layer (otherwise only where a space has `above`)."""

    def space(self, entry: Entry, dim: int) -> ActivationSpace | None:
        """The space of a dimension, or None if it does not grow."""
        role, axes = entry.spec.dims[dim].role, entry.spec.dims[dim].axes
        if axes == ("hidden",):
            last_of_tied = role == "norm" and entry.layer < 0 and self.arch.tied
            gain = self.hidden.final_gain if last_of_tied else self.hidden.gain
            found = {"out": self.hidden.residual, "in": self.hidden.normed, "norm": gain}[role]
        elif axes == ("kv", "group", "head_dim"):
            found = self.heads.query if role == "out" else self.heads.attended
        elif axes == ("kv", "head_dim"):
            found = self.heads.stored
        elif axes == ("head_dim",):
            found = ActivationSpace("head_norm", self.head_dim.norm)
        elif axes[0] in self.ffn:
            found = self.ffn[axes[0]]
        else:
            return None
        return found if found.changed else None

    def tensor(self, entry: Entry, axes: dict[str, AxisMap]) -> Expr:
        """The expression of a target tensor; adds the axis maps it refers to to `axes`."""
        source: Expr = Source(entry.name)
        found = {d: s for d in range(len(entry.shape)) if (s := self.space(entry, d)) is not None}
        if not found:
            return source
        wide = self._rows(entry, source, found, axes)
        for dim, space in found.items():
            if dim > 0 or not self._out(entry, 0):
                wide = _take(wide, dim, space.name, space.map, "out" if self._out(entry, dim) else "in", axes)
        terms = [wide]
        shape = [found[d].map.target_size if d in found else n for d, n in enumerate(entry.shape)]
        if len(shape) > 1:
            for dim, space in found.items():
                if space.null and space.alive == ("out" if self._out(entry, dim) else "in"):
                    terms.append(self._null(entry, source, found, dim, shape, axes))
                if not self._out(entry, dim) and self.symmetry != "none" and space.contrasts:
                    noise = self._symmetry(entry, source, dim, space, shape, axes)
                    if self.symmetry == "split":
                        terms[0] = Vary(terms[0], noise[0] if len(noise) == 1 else Sum(tuple(noise), (1.0,) * len(noise)))
                    else:
                        terms += noise
        return terms[0] if len(terms) == 1 else Sum(tuple(terms), (1.0,) * len(terms))

    def _out(self, entry: Entry, dim: int) -> bool:
        return entry.spec.dims[dim].role != "in"

    def _rows(self, entry: Entry, source: Expr, found: Mapping[int, ActivationSpace], axes: dict[str, AxisMap]) -> Expr:
        """Dimension 0 of a tensor that produces it: mapped by its space, with added rows from the next layer where AKI takes them."""
        space = found.get(0)
        if space is None or not self._out(entry, 0):
            return source
        above = entry.at(layer=min(entry.layer + 1, self.arch.layers - 1)) if entry.layer >= 0 else entry.name
        if above not in self.arch.tensors:
            above = entry.name
        if space.above is not None:
            first, added = space.map, space.above
        elif self.next_layer and above != entry.name and entry.spec.dims[0].role != "norm":
            first, added = space.first_and_added
        else:
            return _take(source, 0, space.name, space.map, "out", axes)
        own = _take(source, 0, space.name if first is space.map else f"{space.name}.first", first, "out", axes)
        return Sum((own, _take(Source(above), 0, f"{space.name}.added", added, "out", axes)), (1.0, 1.0))

    def _null(
        self, entry: Entry, source: Expr, found: Mapping[int, ActivationSpace], dim: int, shape: list[int], axes: dict[str, AxisMap]
    ) -> Expr:
        """Random values on the null coordinates of a dimension, with the standard deviation of the old weights, corrected for the fan-in."""
        size = list(shape)
        size[dim] = len(found[dim].null)
        for other, space in found.items():  # entries that are null in two dimensions are drawn once, with the later one
            if other > dim and space.null and space.alive == ("out" if self._out(entry, other) else "in"):
                size[other] -= len(space.null)
        spread = math.sqrt(entry.shape[-1] / shape[-1])
        expr: Expr = Noise(tuple(size), spread, f"{entry.name}/null{dim}", source)
        for other, space in found.items():
            if size[other] != shape[other]:
                placed = space.scatter if other == dim else space.kept
                expr = _take(expr, other, f"{space.name}.{'null' if other == dim else 'kept'}", placed, "out", axes)
        return expr

    def _symmetry(
        self, entry: Entry, source: Expr, dim: int, space: ActivationSpace, shape: list[int], axes: dict[str, AxisMap]
    ) -> list[Expr]:
        """Noise on the columns of copies that sums to zero over them, absolute or (split) proportional to each weight."""
        contrasts = space.contrasts
        split = self.symmetry == "split"
        count = len(contrasts) + 1
        # A copy holds 1/count of the weight; the contrasts reduce unit noise to sqrt(1 - 1/count).
        scale = self.strength / math.sqrt(1 - 1 / count) * (1.0 if split else 1.0 / count)
        size = list(shape)
        size[dim] = space.map.source_size
        like = None if split else source
        return [
            _take(Noise(tuple(size), scale, f"{entry.name}/copy{dim}.{j}", like), dim, f"{space.name}.contrast{j}", contrast, "in", axes)
            for j, contrast in enumerate(contrasts)
        ]


def _take(of: Expr, dim: int, name: str, axis: AxisMap, role: Literal["out", "in"], axes: dict[str, AxisMap]) -> Expr:
    assert axes.setdefault(name, axis) is axis, name
    return Take(of, dim, name, role)
