"""Evaluating expressions: row blocks of a target tensor from row blocks of source tensors.

Everything but a plain copy is computed in fp32 (fp64 where the source is fp64) and cast last. Row blocks keep memory small and change
nothing: noise is drawn in fixed chunks keyed by (seed, key, chunk), so neither block size, order, sharding nor resumption shows.
A method with a node of its own registers its evaluator: ``@evaluate.register`` on ``(node, evaluator, start, stop) -> Tensor``.
"""

from __future__ import annotations

import base64
import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import singledispatch

import numpy as np
import torch
from torch import Tensor

from hf_grow.errors import ExecutionError, PlanError, SourceError
from hf_grow.growth.axes import AxisMap, AxisRun
from hf_grow.growth.finite_check import NOT_FINITE_HINT, FiniteCheck
from hf_grow.growth.noise import gaussian, random_subset
from hf_grow.growth.plan import GrowthPlan, TensorInfo
from hf_grow.growth.tensormap import (
    Concat,
    Expr,
    Fill,
    Noise,
    Orthogonal,
    Quantity,
    Replace,
    Scope,
    Share,
    Source,
    Subset,
    Sum,
    Take,
    Values,
    Vary,
)
from hf_grow.growth.tensors import TensorRows, raw_bytes, torch_dtype

BLOCK = 8 << 20  # bytes of one block in the compute dtype
MANY_RUNS = 16  # above this, one gather beats slice copies


class Evaluator:
    """Evaluates one plan's expressions. ``quantity`` chooses what flows through the map: weights, gradients or squared gradients."""

    def __init__(self, plan: GrowthPlan, tensors: TensorRows, quantity: Quantity = "weight") -> None:
        if plan.growth.measurements:
            kinds = " and ".join(m.kind for m in plan.growth.measurements)
            raise PlanError(f"The plan needs {kinds} measured on the source's weights.", hint="hf_grow.grow measures them.")
        self.tensors = tensors
        self.quantity = quantity
        self.seed = plan.growth.seed
        self.axes: Mapping[str, AxisMap] = plan.growth.axes
        self.data = plan.growth.data
        self.scope = Scope(plan.source.scope_shapes, self.axes)
        wide = any(t.dtype == "F64" for t in plan.source.by_key.values())
        self.compute = torch.float64 if wide else torch.float32
        self._moments: dict[Expr, tuple[float, float]] = {}

    def rows(self, expr: Expr, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of dimension 0, in the compute dtype; a tensor of its own, which the caller may change."""
        return evaluate(expr, self, start, stop)

    def blocks(self, expr: Expr, info: TensorInfo, budget: int, *, allow_nonfinite: bool = False) -> Iterator[Tensor]:
        """The whole tensor in the target's dtype, as row blocks that take about `budget` bytes to compute.

        Raises SourceError where a value is NaN or infinite (unless `allow_nonfinite`: it is then written so), ExecutionError where it is
        finite and does not fit the target's dtype.
        """
        # A block lives about four times over: source rows, result, a temporary of either, the cast. Beyond BLOCK, larger ones are slower:
        # they leave the cache, and the allocator takes fresh pages for each.
        row = math.prod(info.shape[1:]) * self.compute.itemsize
        step = max(1, min(budget // 4, BLOCK) // max(row, 1))
        for start in range(0, info.shape[0], step):
            wide = self.rows(expr, start, min(start + step, info.shape[0]))
            block = wide.to(torch_dtype(info.dtype)).contiguous()
            check = FiniteCheck(info.dtype)
            check.update(raw_bytes(block))
            if not check.finite:
                block = _not_finite(wide, block, info.dtype, allow_nonfinite)
            del wide  # the block may be needed for long
            yield block

    def whole(self, expr: Expr, info: TensorInfo) -> Tensor:
        return torch.cat(list(self.blocks(expr, info, 1 << 62)))

    def moments(self, expr: Expr) -> tuple[float, float]:
        """Mean and standard deviation of all values of an expression, to nine digits: what lies behind depends on the processor's order of summing."""
        if expr not in self._moments:
            shape = expr.shape(self.scope)
            step = max(1, BLOCK // (self.compute.itemsize * max(1, math.prod(shape[1:]))))
            total, squares, count = 0.0, 0.0, math.prod(shape)
            for start in range(0, shape[0], step):
                block = self.rows(expr, start, min(start + step, shape[0]))
                total += float(block.sum(dtype=torch.float64))
                squares += float(torch.linalg.vector_norm(block, dtype=torch.float64)) ** 2
            mean = total / count
            self._moments[expr] = float(f"{mean:.9g}"), float(f"{math.sqrt(max(0.0, squares / count - mean**2)):.9g}")
        return self._moments[expr]


def _not_finite(wide: Tensor, block: Tensor, dtype: str, allowed: bool) -> Tensor:
    """A block with values that are not finite after the cast, as it may be written; `wide`: before the cast."""
    if bool((wide.isfinite() & ~block.isfinite()).any()):
        raise ExecutionError(f"a value is too large for {dtype}.", hint="Grow it without noise or averages, or from a source in F32.")
    if not allowed:
        raise SourceError("a value is not finite: the source holds NaN or infinite values.", hint=NOT_FINITE_HINT)
    return block.masked_fill(block.isnan(), math.nan)  # of one form: which bits arithmetic leaves in a NaN is the processor's affair


@singledispatch
def evaluate(expr: Expr, ev: Evaluator, start: int, stop: int) -> Tensor:
    raise TypeError(f"no evaluator is registered for {type(expr).__name__}")


@evaluate.register
def _(expr: Source, ev: Evaluator, start: int, stop: int) -> Tensor:
    return ev.tensors.rows(expr.key, start, stop).to(ev.compute, copy=not ev.tensors.writable)


@evaluate.register
def _(expr: Take, ev: Evaluator, start: int, stop: int) -> Tensor:
    axis = ev.axes[expr.axis]
    if expr.dim == 0:
        runs = list(axis.window(start, stop))
        inside = [r for r in runs if r.start is not None]
        if not inside:
            return torch.zeros(stop - start, *expr.shape(ev.scope)[1:], dtype=ev.compute)
        low = min(r.start for r in inside if r.start is not None)
        high = max(r.start + r.length for r in inside if r.start is not None)
        if len(runs) > MANY_RUNS and high - low <= 4 * (stop - start):
            return _gathered(ev.rows(expr.of, low, high), 0, runs, low, expr, ev)
        if len(runs) == 1:
            return _run_rows(runs[0], expr, ev)
        result, at = torch.empty(stop - start, *expr.shape(ev.scope)[1:], dtype=ev.compute), 0
        for run in runs:
            part = result.narrow(0, at, run.length)
            if run.start is None:
                part.zero_()
            else:
                torch.mul(ev.rows(expr.of, run.start, run.start + run.length), run.gain(expr.role, ev.quantity), out=part)
            at += run.length
        return result
    inner = ev.rows(expr.of, start, stop)
    if len(axis.runs) > MANY_RUNS:
        return _gathered(inner, expr.dim, list(axis.runs), 0, expr, ev)
    shape = list(inner.shape)
    shape[expr.dim] = axis.target_size
    result, at = torch.empty(shape, dtype=ev.compute), 0
    for run in axis.runs:
        part = result.narrow(expr.dim, at, run.length)
        if run.start is None:
            part.zero_()
        else:
            torch.mul(inner.narrow(expr.dim, run.start, run.length), run.gain(expr.role, ev.quantity), out=part)
        at += run.length
    return result


def _run_rows(run: AxisRun, expr: Take, ev: Evaluator) -> Tensor:
    assert run.start is not None
    rows, gain = ev.rows(expr.of, run.start, run.start + run.length), run.gain(expr.role, ev.quantity)
    return rows if gain == 1 else rows.mul_(gain)


def _gathered(inner: Tensor, dim: int, runs: list[AxisRun], offset: int, expr: Take, ev: Evaluator) -> Tensor:
    """Many short runs at once: one index_select, one multiplication."""
    # Rows outside the range read row 0, times zero: there may be more of them than rows to read.
    index = torch.cat(
        [torch.zeros(r.length, dtype=torch.long) if r.start is None else torch.arange(r.length) + r.start - offset for r in runs]
    )
    gains = [0.0 if r.start is None else r.gain(expr.role, ev.quantity) for r in runs]
    gain = torch.repeat_interleave(torch.tensor(gains, dtype=ev.compute), torch.tensor([r.length for r in runs]))
    return inner.index_select(dim, index) * gain.view([-1 if d == dim else 1 for d in range(inner.dim())])


@evaluate.register
def _(expr: Sum, ev: Evaluator, start: int, stop: int) -> Tensor:
    power = 2 if ev.quantity == "grad2" else 1
    total = ev.rows(expr.terms[0], start, stop)
    if expr.weights[0] != 1:
        total.mul_(expr.weights[0] ** power)
    for term, weight in zip(expr.terms[1:], expr.weights[1:], strict=True):
        total.add_(ev.rows(term, start, stop), alpha=weight**power)
    return total


@evaluate.register
def _(expr: Vary, ev: Evaluator, start: int, stop: int) -> Tensor:
    if ev.quantity != "weight":
        return ev.rows(expr.of, start, stop)
    of = ev.rows(expr.of, start, stop)
    return of.addcmul_(of, ev.rows(expr.by, start, stop))


@evaluate.register
def _(expr: Share, ev: Evaluator, start: int, stop: int) -> Tensor:
    of = ev.rows(expr.of, start, stop)
    return of if ev.quantity == "weight" else of.mul_(expr.share ** (2 if ev.quantity == "grad2" else 1))


@evaluate.register
def _(expr: Concat, ev: Evaluator, start: int, stop: int) -> Tensor:
    if expr.dim > 0:
        return torch.cat([ev.rows(p, start, stop) for p in expr.parts], expr.dim)
    parts, at = [], 0
    for part in expr.parts:
        length = part.shape(ev.scope)[0]
        low, high = max(start, at), min(stop, at + length)
        if low < high:
            parts.append(ev.rows(part, low - at, high - at))
        at += length
    return torch.cat(parts)


@evaluate.register
def _(expr: Subset, ev: Evaluator, start: int, stop: int) -> Tensor:
    chosen = random_subset(ev.seed, expr.key, expr.of.shape(ev.scope)[expr.dim], expr.count)
    if expr.dim > 0:
        return ev.rows(expr.of, start, stop).index_select(expr.dim, torch.from_numpy(chosen.copy()))
    if start == stop:
        return torch.empty(expr.shape(ev.scope), dtype=ev.compute)[:0]
    part = torch.from_numpy(chosen[start:stop].copy())
    return ev.rows(expr.of, int(part[0]), int(part[-1]) + 1).index_select(0, part - part[0])


@evaluate.register
def _(expr: Replace, ev: Evaluator, start: int, stop: int) -> Tensor:
    out = ev.rows(expr.of, start, stop)
    chosen = random_subset(ev.seed, expr.key, expr.of.shape(ev.scope)[expr.dim], expr.by.shape(ev.scope)[expr.dim])
    if expr.dim > 0:
        return out.index_copy_(expr.dim, torch.from_numpy(chosen.copy()), ev.rows(expr.by, start, stop))
    first, last = (int(i) for i in np.searchsorted(chosen, (start, stop)))
    if first == last:
        return out
    return out.index_copy_(0, torch.from_numpy(chosen[first:last] - start), ev.rows(expr.by, first, last))


@evaluate.register
def _(expr: Fill, ev: Evaluator, start: int, stop: int) -> Tensor:
    value = expr.value if ev.quantity == "weight" else 0.0  # a constant carries nothing of the source's gradient
    return torch.full((stop - start, *expr.size[1:]), value, dtype=ev.compute)


@evaluate.register
def _(expr: Noise, ev: Evaluator, start: int, stop: int) -> Tensor:
    row = math.prod(expr.size[1:])
    if ev.quantity != "weight":
        return torch.zeros(stop - start, *expr.size[1:], dtype=ev.compute)
    mean, spread = (0.0, 1.0) if expr.like is None else ev.moments(expr.like)
    drawn = torch.from_numpy(gaussian(ev.seed, expr.key, start * row, stop * row, expr.std * spread)).to(ev.compute)
    return (drawn if expr.centered else drawn.add_(mean)).view(stop - start, *expr.size[1:])


@evaluate.register
def _(expr: Orthogonal, ev: Evaluator, start: int, stop: int) -> Tensor:
    if ev.quantity != "weight":
        return torch.zeros(stop - start, *expr.size[1:], dtype=ev.compute)
    drawn = ev.rows(Noise(expr.size, 1.0, expr.key), 0, expr.size[0]).double()
    rows = torch.linalg.qr(drawn.T).Q.T  # few rows, so always all of them
    length = torch.full((len(rows), 1), expr.std * math.sqrt(expr.size[1]), dtype=torch.float64)
    length = length.copysign((rows * drawn).sum(1, keepdim=True))  # LAPACK leaves the signs open
    made: Tensor = rows * length
    return made[start:stop].to(ev.compute)


@evaluate.register
def _(expr: Values, ev: Evaluator, start: int, stop: int) -> Tensor:
    if ev.quantity != "weight":
        return torch.zeros(stop - start, *expr.size[1:], dtype=ev.compute)
    values = np.frombuffer(base64.b64decode(ev.data[expr.key]), dtype="<f2").reshape(expr.size)
    return torch.from_numpy(values[start:stop].astype(np.float32)).to(ev.compute)


@contextmanager
def single_threaded_ops() -> Iterator[None]:
    """Inside, torch uses one thread for one operation: the tensors are what runs in parallel. (The setting is one of the whole process.)"""
    with _threads.lock:
        if _threads.inside == 0:
            _threads.before = torch.get_num_threads()
        torch.set_num_threads(1)  # holds for this thread, and for threads that have not used torch yet
        _threads.inside += 1
    try:
        yield
    finally:
        with _threads.lock:
            _threads.inside -= 1
            if _threads.inside == 0:
                torch.set_num_threads(_threads.before)


class _Threads:
    def __init__(self) -> None:
        self.lock, self.inside, self.before = threading.Lock(), 0, 1


_threads = _Threads()
