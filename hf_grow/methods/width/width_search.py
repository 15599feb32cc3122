"""The widths of a model as one value: scaling, search for a parameter count, checks and warnings."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from hf_grow.errors import PlanError
from hf_grow.methods.width.attention_maps import divisors, heads_feasible
from hf_grow.model.architecture import Architecture
from hf_grow.model.family import FFN_AXES
from hf_grow.model.param_count import check_target, count_parameters, format_count

LARGEST_FACTOR = 4.0


@dataclass(frozen=True)
class Widths:
    """hidden_size, FFN sizes (0 where the family has none), query heads, kv heads, head_dim."""

    hidden: int
    inter: int
    expert_inter: int
    heads: int
    kv: int
    head_dim: int
    shared_inter: int = 0

    def changed(self, **sizes: int) -> Widths:
        """With other sizes. Raises PlanError if one would shrink."""
        new = replace(self, **sizes)
        for name in (*FFN_AXES, "head_dim", "hidden"):
            if getattr(new, name) < getattr(self, name):
                raise PlanError(f"{name} cannot shrink: {getattr(self, name)} -> {getattr(new, name)}.")
        return new

    def scaled(self, factor: float, head_dim: int | None = None) -> Widths:
        """All widths but head_dim times one factor. Raises PlanError if a size would not be an integer."""

        def by(name: str) -> int:
            exact: float = getattr(self, name) * factor
            if abs(exact - round(exact)) > 1e-9:
                raise PlanError(
                    f"--factor {factor:g} makes {name} {exact:g}, which is not an integer.", hint="Give the sizes one by one instead."
                )
            return round(exact)

        return self.changed(**{n: by(n) for n in ("hidden", *FFN_AXES, "heads", "kv")}, head_dim=head_dim or self.head_dim)


def widths_of(arch: Architecture) -> Widths:
    ffn = {axis: arch.size(axis) for axis in FFN_AXES}
    return Widths(hidden=arch.size("hidden"), heads=arch.heads, kv=arch.size("kv"), head_dim=arch.size("head_dim"), **ffn)


def with_widths(arch: Architecture, shape: Widths, layers: int | None = None) -> Architecture:
    """The architecture with other widths (and depth), to count its parameters. Raises SourceError if the family does not allow them."""
    config: dict[str, Any] = {**arch.config, "hidden_size": shape.hidden, "num_attention_heads": shape.heads}
    for axis in ("kv", "head_dim", *FFN_AXES):
        if arch.size(axis):
            config[arch.family.size_key(axis)] = getattr(shape, axis)
    if layers is not None:
        config |= {"num_hidden_layers": layers, "layer_types": None}
    return Architecture(config)


def head_candidates(old: Widths, hidden: int, divides: bool) -> list[tuple[int, int]]:
    """Feasible (heads, kv heads) for a hidden size, best first: heads proportional to it, with the old number of query heads per kv head
    (more kv heads would enlarge the KV cache). ``divides``: heads must divide the hidden size.
    """
    wanted = old.heads * hidden / old.hidden
    pairs = [
        (heads, kv)
        for heads in range(old.heads, int(wanted) + 2)
        if not (divides and hidden % heads)
        for kv in divisors(heads)
        if heads_feasible(old.heads, old.kv, heads, kv)
    ]
    ratio = old.heads / old.kv
    return sorted(pairs, key=lambda p: abs(math.log(p[0] / wanted)) + 0.3 * abs(math.log(p[0] / p[1] / ratio)))


def nearest_widths(
    arch: Architecture, target: int, *, head_dim: int | None = None, whole: bool = False, strict: bool = True, multiple: int = 128
) -> Widths:
    """Widths whose parameter count is nearest to `target`, all scaled by about one factor. Raises PlanError if none is within 5 %
    (``strict``) or none is feasible. ``whole``: integer factors only; ``multiple``: step of the sizes otherwise.
    """
    now = count_parameters(arch).total
    best: tuple[float, Widths, int] | None = None
    for shape in candidate_widths(arch, whole=whole, multiple=multiple):
        shape = replace(shape, head_dim=head_dim or shape.head_dim)
        total = count_parameters(with_widths(arch, shape)).total
        off = abs(total / target - 1)
        if best is None or off < best[0]:
            best = off, shape, total
    hint = "hf-grow hybrid SOURCE --to SIZE grows depth and width together."
    if best is None:
        raise PlanError(f"{format_count(target)} parameters cannot be reached by width: no feasible widths are near.", hint=hint)
    if strict:
        check_target(now, target, best[2], hint=hint if target > now else "Give a larger --to.")
    return best[1]


def candidate_widths(arch: Architecture, *, whole: bool = False, multiple: int = 128) -> Iterator[Widths]:
    """Widths larger than the source: hidden in steps of `multiple` (or integer factors), the rest in proportion."""
    old = widths_of(arch)
    step = old.hidden if whole else _step(old.hidden, multiple)
    for hidden in range(old.hidden + step, int(LARGEST_FACTOR * old.hidden) + 1, step):
        factor = hidden / old.hidden

        def near(size: int, factor: float = factor) -> int:
            unit = 1 if whole else _step(size, multiple)
            return max(size, round(size * factor / unit) * unit)

        pairs = (
            [(round(old.heads * factor), round(old.kv * factor))]
            if whole
            else head_candidates(old, hidden, arch.family.heads_divide_hidden)
        )
        for heads, kv in pairs:
            if abs(heads / (old.heads * factor) - 1) <= 0.26:  # far fewer heads than that would limit attention
                ffn = {axis: near(size) if (size := getattr(old, axis)) else 0 for axis in FFN_AXES}
                yield replace(old, hidden=hidden, heads=heads, kv=kv, **ffn)
                break


def _step(size: int, multiple: int) -> int:
    """`multiple`, halved until it divides `size` and is at most an eighth of it."""
    while multiple > 1 and (multiple > size // 8 or size % multiple):
        multiple //= 2
    return multiple


def check_widths(arch: Architecture, shape: Widths) -> None:
    """Raises PlanError, with alternatives, if the family's config class does not allow the widths."""
    if arch.family.heads_divide_hidden and shape.hidden % shape.heads:
        pairs = [(h, g) for h in divisors(shape.hidden) for g in divisors(h) if heads_feasible(arch.heads, arch.size("kv"), h, g)]
        pairs.sort(key=lambda p: (abs(p[0] - shape.heads), abs(p[1] - shape.kv)))
        flags = ", ".join(f"--heads {h} --kv-heads {g}" for h, g in pairs[:3])
        raise PlanError(
            f"{arch.family.architecture} requires hidden_size to be a multiple of the number of heads; {shape.hidden} is not divisible by {shape.heads}.",
            hint=f"With --hidden {shape.hidden} these work: {flags}."
            if flags
            else f"Use a hidden_size that is a multiple of {shape.heads}.",
        )


def width_warnings(arch: Architecture, shape: Widths) -> list[str]:
    """Warnings about widths that are allowed but costly."""
    old, out = widths_of(arch), []
    for name, unit in (("hidden", 128), ("inter", 128), ("expert_inter", 64), ("shared_inter", 128)):
        size = getattr(shape, name)
        if size != getattr(old, name) and getattr(old, name) % unit == 0 and size % unit:
            out.append(f"{name} {size} is not a multiple of {unit}: matrix products on GPUs get slower.")
    for parallel in (8, 4):
        if old.kv % parallel == 0 and shape.kv % parallel:
            out.append(
                f"{shape.kv} kv heads are not divisible by {parallel}: tensor parallelism over {parallel} GPUs is no longer possible without copies."
            )
            break
    if shape.head_dim != old.head_dim and arch.has_norm_over("head_dim"):
        out.append("Under this family's norm over head_dim the new coordinates of queries and keys stay zero for good; only values learn.")
    if shape.heads * shape.head_dim < shape.hidden and old.heads * old.head_dim >= old.hidden:
        out.append(f"attention is narrower than the model: {shape.heads} x {shape.head_dim} < {shape.hidden}.")
    return out
