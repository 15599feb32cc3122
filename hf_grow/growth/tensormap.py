"""Tensor maps: every tensor of the target as a small expression over tensors of the source.

    Source(name)                      a tensor of the source checkpoint, byte for byte
    Take(of, dim, axis, role)         one dimension grown, cut or reordered by the AxisMap that the plan stores under the name `axis`
    Sum(terms, weights)               weighted sum
    Vary(of, by)                      of * (1 + by), elementwise: noise proportional to a tensor
    Share(of, share)                  the weight `of`, with this share of its gradient: one of several copies that are used in turn
    Concat(parts, dim)                concatenation
    Subset(of, dim, count, key)       `count` random coordinates of a dimension, chosen by (plan seed, key), in order
    Replace(of, by, dim, key)         `of` with the coordinates that Subset chooses under the same key replaced by those of `by`
    Fill(size, value)                 a constant
    Noise(size, std, key, like)       N(0, std^2), seeded by (plan seed, key); with `like`, std is relative to that expression's standard deviation
    Orthogonal(size, std, key)        random orthogonal rows
    Values(size, key)                 numbers stored in the plan under `key`, measured on the source

An expression does not say whether weights or gradients flow through it; the evaluator is given the quantity:

    weight                    W' = A_out W B_in^T
    grad    (and exp_avg)     G' = B_out G A_in^T        zero for Fill, Noise, Orthogonal and Values
    grad2   (exp_avg_sq, F)   the same with squared gains

so one map grows weights, Adam moments and the Fisher (Shen et al. 2022, "Staged Training", derives the moment rules for copies). A new kind
of node is a subclass of Expr with an evaluator registered in `evaluate`. This module does not need torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol

Quantity = Literal["weight", "grad", "grad2"]
Shape = tuple[int, ...]


class Axis(Protocol):
    """The part of AxisMap that shapes depend on."""

    @property
    def source_size(self) -> int: ...
    @property
    def target_size(self) -> int: ...


@dataclass(frozen=True)
class Scope:
    """What expressions refer to by name: shapes of source tensors by `Source.key`, and axis maps."""

    shapes: Mapping[str, Shape]
    axes: Mapping[str, Axis]


@dataclass(frozen=True)
class Expr:
    """Base of all nodes. Fields that hold expressions are listed in `parts_of`; all others are plain JSON data. ``op``: its name in growth.json."""

    op: ClassVar[str] = ""
    parts_of: ClassVar[tuple[str, ...]] = ()
    NODES: ClassVar[dict[str, type[Expr]]] = {}

    def __init_subclass__(cls) -> None:
        if cls.op:  # not a base class
            assert cls.op not in Expr.NODES, cls
            Expr.NODES[cls.op] = cls

    def shape(self, scope: Scope) -> Shape:
        """Shape of the result. Raises ValueError or LookupError if the parts do not fit."""
        raise TypeError(f"{type(self).__name__} gives no shape")

    def children(self) -> Iterator[Expr]:
        """The direct subexpressions."""
        for name in self.parts_of:
            value = getattr(self, name)
            if isinstance(value, tuple):
                yield from value
            elif value is not None:
                yield value

    def map_children(self, change: Callable[[Expr], Expr]) -> Expr:
        """A copy with `change` applied to every direct subexpression."""

        def apply(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(change, value))
            return None if value is None else change(value)

        return replace(self, **{n: apply(getattr(self, n)) for n in self.parts_of}) if self.parts_of else self

    def sources(self) -> Iterator[Source]:
        """All source tensors read, in order, with repetitions."""
        for child in self.children():
            yield from child.sources()

    def axis_names(self) -> Iterator[str]:
        """The names of all axis maps used."""
        for child in self.children():
            yield from child.axis_names()


@dataclass(frozen=True)
class Source(Expr):
    """A tensor on disk. ``checkpoint``: label of an additional source checkpoint; empty for the main one."""

    op = "source"
    name: str
    checkpoint: str = ""

    @property
    def key(self) -> str:
        return f"{self.checkpoint}::{self.name}" if self.checkpoint else self.name

    def shape(self, scope: Scope) -> Shape:
        return scope.shapes[self.key]

    def sources(self) -> Iterator[Source]:
        yield self


@dataclass(frozen=True)
class Take(Expr):
    """Dimension ``dim`` mapped by AxisMap ``axis``: ``role`` out applies A to weights and B to gradients, in the reverse."""

    op = "take"
    parts_of = ("of",)
    of: Expr
    dim: int
    axis: str
    role: Literal["out", "in"]

    def shape(self, scope: Scope) -> Shape:
        inner, axis = list(self.of.shape(scope)), scope.axes[self.axis]
        _check_dim(self.dim, inner)
        if inner[self.dim] != axis.source_size:
            raise ValueError(f"axis map {self.axis} takes {axis.source_size}, dimension {self.dim} has {inner[self.dim]}")
        inner[self.dim] = axis.target_size
        return tuple(inner)

    def axis_names(self) -> Iterator[str]:
        yield self.axis
        yield from self.of.axis_names()


@dataclass(frozen=True)
class Sum(Expr):
    """Weighted sum of expressions of one shape."""

    op = "sum"
    parts_of = ("terms",)
    terms: tuple[Expr, ...]
    weights: tuple[float, ...]

    def shape(self, scope: Scope) -> Shape:
        shapes = {t.shape(scope) for t in self.terms}
        if len(shapes) != 1 or len(self.weights) != len(self.terms):
            raise ValueError(f"a sum of shapes {sorted(shapes)} with {len(self.weights)} weights")
        return shapes.pop()


@dataclass(frozen=True)
class Vary(Expr):
    """`of * (1 + by)`, elementwise: noise proportional to a tensor. Gradients pass as if `by` were zero, as with added noise."""

    op = "vary"
    parts_of = ("of", "by")
    of: Expr
    by: Expr

    def shape(self, scope: Scope) -> Shape:
        shapes = {self.of.shape(scope), self.by.shape(scope)}
        if len(shapes) != 1:
            raise ValueError(f"shapes {sorted(shapes)} cannot be multiplied elementwise")
        return shapes.pop()


@dataclass(frozen=True)
class Share(Expr):
    """One of several copies that each serve a share of the tokens: the weight is `of`, the gradient `share` times its gradient."""

    op = "share"
    parts_of = ("of",)
    of: Expr
    share: float

    def shape(self, scope: Scope) -> Shape:
        return self.of.shape(scope)


@dataclass(frozen=True)
class Concat(Expr):
    """Expressions concatenated along dimension `dim`."""

    op = "concat"
    parts_of = ("parts",)
    parts: tuple[Expr, ...]
    dim: int

    def shape(self, scope: Scope) -> Shape:
        shapes = [list(p.shape(scope)) for p in self.parts]
        for s in shapes or [[]]:
            _check_dim(self.dim, s)
        total = sum(s[self.dim] for s in shapes)
        for s in shapes:
            s[self.dim] = total
        if any(s != shapes[0] for s in shapes):
            raise ValueError(f"shapes {shapes} cannot be concatenated along dimension {self.dim}")
        return tuple(shapes[0])


@dataclass(frozen=True)
class Subset(Expr):
    """`count` coordinates of dimension `dim`, drawn without replacement by (plan seed, `key`, size of the dimension), in order."""

    op = "subset"
    parts_of = ("of",)
    of: Expr
    dim: int
    count: int
    key: str

    def shape(self, scope: Scope) -> Shape:
        inner = list(self.of.shape(scope))
        _check_dim(self.dim, inner)
        if not 0 <= self.count <= inner[self.dim]:
            raise ValueError(f"cannot choose {self.count} of {inner[self.dim]} coordinates")
        inner[self.dim] = self.count
        return tuple(inner)


@dataclass(frozen=True)
class Replace(Expr):
    """`of` with the coordinates of dimension `dim` that `Subset` chooses under the same key replaced by those of `by`, in order."""

    op = "replace"
    parts_of = ("of", "by")
    of: Expr
    by: Expr
    dim: int
    key: str

    def shape(self, scope: Scope) -> Shape:
        whole, new = self.of.shape(scope), self.by.shape(scope)
        _check_dim(self.dim, whole)
        fits = len(whole) == len(new) and all(n <= w if d == self.dim else n == w for d, (w, n) in enumerate(zip(whole, new, strict=True)))
        if not fits:
            raise ValueError(f"values of shape {list(new)} cannot replace a part of shape {list(whole)} along dimension {self.dim}")
        return whole


@dataclass(frozen=True)
class Generated(Expr):
    """Base of nodes that read no source values, of shape `size`; no gradient of the source flows into them."""

    size: Shape

    def shape(self, scope: Scope) -> Shape:
        return self.size


@dataclass(frozen=True)
class Fill(Generated):
    """A constant."""

    op = "fill"
    value: float = 0.0


@dataclass(frozen=True)
class Noise(Generated):
    """Gaussian noise N(0, std^2), or with `like` in units of its standard deviation. Depends on (plan seed, key) only."""

    op = "noise"
    parts_of = ("like",)
    std: float
    key: str
    like: Expr | None = None
    centered: bool = True
    """Whether the mean is zero; otherwise it is that of `like`."""


@dataclass(frozen=True)
class Orthogonal(Generated):
    """Orthogonal rows of the root-mean-square length of rows of N(0, std^2); at most as many rows as columns."""

    op = "orthogonal"
    std: float
    key: str

    def shape(self, scope: Scope) -> Shape:
        if len(self.size) != 2 or self.size[0] > self.size[1]:
            raise ValueError(f"{self.size[0]} rows of {self.size[-1]} numbers cannot all be orthogonal")
        return self.size


@dataclass(frozen=True)
class Values(Generated):
    """Numbers stored in the plan (`Growth.data`), measured on the source, such as router rows from prompts."""

    op = "values"
    key: str


def _check_dim(dim: int, shape: Sequence[int]) -> None:
    if not 0 <= dim < len(shape):
        raise ValueError(f"there is no dimension {dim} in {list(shape)}")


def substitute(expr: Expr, tensors: Mapping[str, Expr]) -> Expr:
    """`expr` with every tensor of the main source replaced by its expression in `tensors`: the composition of two growths."""
    if isinstance(expr, Source):
        return expr if expr.checkpoint else tensors[expr.name]
    return expr.map_children(lambda child: substitute(child, tensors))
