"""The algebra of growth: each tensor of the target is a small expression over tensors of the source.

    Source(name)                      a tensor of the source checkpoint, byte for byte
    Take(of, dim, axis, role)         one dimension grown, cut or reordered by an AxisMap that the plan holds under the name `axis`
    Sum(terms, weights)               weighted sum
    Vary(of, by)                      of * (1 + by), elementwise: noise in proportion to a tensor
    Share(of, share)                  `of` as it is, of whose gradient only this share arrives: one of several copies that are used in turn
    Concat(parts, dim)                parts side by side
    Subset(of, dim, count, key)       `count` coordinates of a dimension, chosen at random by (plan seed, key), in their order
    Replace(of, by, dim, key)         `of`, in which the coordinates that Subset chooses under the same key are those of `by`
    Fill(shape, value)                a constant
    Noise(shape, std, key, like)      N(0, std^2), seeded by (plan seed, key); `like`: std counts in standard deviations of that expression,
                                      and the mean may be its mean
    Orthogonal(shape, std, key)       random rows at right angles to each other
    Values(shape, key)                numbers that the plan holds under the name `key`, measured on the source before it is carried out

An expression says nothing of weights or gradients: the evaluator is given the quantity, and

    weight                    W' = A_out W B_in^T
    grad    (and exp_avg)     G' = B_out G A_in^T        Noise and Fill carry no gradient of the source
    grad2   (exp_avg_sq, F)   the same with squared gains

so the same map grows weights, Adam's moments and the Fisher (Shen et al. 2022, "Staged Training", derives the moment rules for copies).
A new kind of node is a subclass of Expr in the file of its method, with its evaluator registered in `execute`; nothing here changes.
No torch here: plans are made, printed and stored without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol

Quantity = Literal["weight", "grad", "grad2"]
Shape = tuple[int, ...]


class Axis(Protocol):
    """What a shape needs to know of an axis map."""

    @property
    def source_size(self) -> int: ...
    @property
    def target_size(self) -> int: ...


@dataclass(frozen=True)
class Scope:
    """What expressions refer to by name."""

    shapes: Mapping[str, Shape]
    axes: Mapping[str, Axis]


@dataclass(frozen=True)
class Expr:
    """Base of all nodes. Fields holding expressions are listed in `parts_of`; everything else is plain JSON data."""

    op: ClassVar[str] = ""
    parts_of: ClassVar[tuple[str, ...]] = ()
    NODES: ClassVar[dict[str, type[Expr]]] = {}

    def __init_subclass__(cls) -> None:
        assert cls.op not in Expr.NODES, cls
        Expr.NODES[cls.op] = cls

    def shape(self, scope: Scope) -> Shape:
        raise TypeError(f"{type(self).__name__} gives no shape")

    def children(self) -> Iterator[Expr]:
        for name in self.parts_of:
            value = getattr(self, name)
            if isinstance(value, tuple):
                yield from value
            elif value is not None:
                yield value

    def map_children(self, change: Callable[[Expr], Expr]) -> Expr:
        def apply(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(change, value))
            return None if value is None else change(value)

        return replace(self, **{n: apply(getattr(self, n)) for n in self.parts_of}) if self.parts_of else self

    def sources(self) -> Iterator[Source]:
        """Every source tensor read, in order, with repetitions."""
        for child in self.children():
            yield from child.sources()

    def axis_names(self) -> Iterator[str]:
        for child in self.children():
            yield from child.axis_names()


@dataclass(frozen=True)
class Source(Expr):
    """A tensor on disk. ``checkpoint`` names a further source checkpoint where a plan has several ("" is the main one)."""

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
    """Dimension ``dim`` mapped by AxisMap ``axis``: ``role`` out applies A, in applies B (to weights; gradients the other way round)."""

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
    """`of` times (1 + `by`), elementwise: noise in proportion to a tensor. Gradients pass as if `by` were zero, as they do with added noise."""

    op = "vary"
    parts_of = ("of", "by")
    of: Expr
    by: Expr

    def shape(self, scope: Scope) -> Shape:
        shapes = {self.of.shape(scope), self.by.shape(scope)}
        if len(shapes) != 1:
            raise ValueError(f"values of shapes {sorted(shapes)} to be multiplied")
        return shapes.pop()


@dataclass(frozen=True)
class Share(Expr):
    """One of several copies, each used for a share of the tokens: the weight is `of`, the gradient that share of its gradient."""

    op = "share"
    parts_of = ("of",)
    of: Expr
    share: float

    def shape(self, scope: Scope) -> Shape:
        return self.of.shape(scope)


@dataclass(frozen=True)
class Concat(Expr):
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
            raise ValueError(f"parts of shapes {shapes} do not fit along dimension {self.dim}")
        return tuple(shapes[0])


@dataclass(frozen=True)
class Subset(Expr):
    """`count` coordinates of dimension `dim`, drawn without replacement by (plan seed, `key`) and the dimension's size, in their order."""

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
            raise ValueError(f"{self.count} of {inner[self.dim]} coordinates cannot be chosen")
        inner[self.dim] = self.count
        return tuple(inner)


@dataclass(frozen=True)
class Replace(Expr):
    """`of`, in which the coordinates of dimension `dim` that `Subset` chooses under the same key are those of `by`, in their order."""

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
            raise ValueError(f"values of shape {list(new)} cannot replace a part of {list(whole)} along dimension {self.dim}")
        return whole


@dataclass(frozen=True)
class Fill(Expr):
    op = "fill"
    size: Shape
    value: float = 0.0

    def shape(self, scope: Scope) -> Shape:
        return self.size


@dataclass(frozen=True)
class Noise(Expr):
    op = "noise"
    parts_of = ("like",)
    size: Shape
    std: float
    key: str
    like: Expr | None = None
    centered: bool = True
    """Whether the mean is zero; otherwise it is that of `like`."""

    def shape(self, scope: Scope) -> Shape:
        return self.size


@dataclass(frozen=True)
class Orthogonal(Expr):
    """Rows at right angles, each as long as a row of N(0, std^2) is on average; at most as many rows as columns."""

    op = "orthogonal"
    size: Shape
    std: float
    key: str

    def shape(self, scope: Scope) -> Shape:
        if len(self.size) != 2 or self.size[0] > self.size[1]:
            raise ValueError(f"{self.size[0]} rows of {self.size[-1]} numbers cannot all be orthogonal")
        return self.size


@dataclass(frozen=True)
class Values(Expr):
    """Numbers that come with the plan (`Growth.data`): what had to be measured on the source, such as router rows from prompts."""

    op = "values"
    size: Shape
    key: str

    def shape(self, scope: Scope) -> Shape:
        return self.size


def _check_dim(dim: int, shape: Sequence[int]) -> None:
    if not 0 <= dim < len(shape):
        raise ValueError(f"there is no dimension {dim} in {list(shape)}")


def substitute(expr: Expr, tensors: Mapping[str, Expr]) -> Expr:
    """`expr` with every main source replaced by its own expression: composition of two growth steps."""
    if isinstance(expr, Source):
        return expr if expr.checkpoint else tensors[expr.name]
    return expr.map_children(lambda child: substitute(child, tensors))
