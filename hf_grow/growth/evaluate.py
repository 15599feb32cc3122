"""Evaluates expressions in row blocks of the target tensor.

Everything but a plain copy is computed in fp32 (fp64 if the source is fp64) and cast last. The result does not depend on block size, order,
sharding or resumption: noise is drawn in fixed chunks keyed by (seed, key, chunk). A new node registers its evaluator:
``@evaluate.register`` on ``(node, evaluator, start, stop) -> Tensor``.
"""

from __future__ import annotations

import base64
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import singledispatch

import numpy as np
import torch
from torch import Tensor

from hf_grow.errors import ExecutionError, PlanError, SourceError
from hf_grow.growth.axes import AxisMap, AxisRun
from hf_grow.growth.finite_check import NOT_FINITE_HINT, FiniteCheck
from hf_grow.growth.noise import gaussian, random_subset
from hf_grow.growth.plan import GrowthPlan
from hf_grow.growth.source_info import TensorInfo
from hf_grow.growth.tensormap import (
    Concat,
    Expr,
    Fill,
    Generated,
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
MANY_RUNS = 16  # above this, one index_select is faster than slice copies


class Evaluator:
    """Evaluates the expressions of one plan. ``quantity``: what flows through the map, weights, gradients or squared gradients."""

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
        """Rows [start, stop) of dimension 0: a new tensor [stop - start, ...] in the compute dtype, which the caller may modify."""
        return evaluate(expr, self, start, stop)

    def blocks(self, expr: Expr, info: TensorInfo, budget: int, *, allow_nonfinite: bool = False) -> Iterator[Tensor]:
        """The tensor `info` as row blocks in its dtype, which take about `budget` bytes to compute.

        Raises SourceError for NaN and infinite values (unless `allow_nonfinite`, which keeps them), ExecutionError for finite values that
        overflow the dtype.
        """
        # About four copies of a block exist at once: source rows, result, a temporary, the cast. Blocks above BLOCK are slower: they do not
        # fit the cache, and each one gets fresh pages from the allocator.
        row = math.prod(info.shape[1:]) * self.compute.itemsize
        step = max(1, min(budget // 4, BLOCK) // max(row, 1))
        for start in range(0, info.shape[0], step):
            wide = self.rows(expr, start, min(start + step, info.shape[0]))
            block = wide.to(torch_dtype(info.dtype)).contiguous()
            check = FiniteCheck(info.dtype)
            check.update(raw_bytes(block))
            if not check.finite:
                block = _not_finite(wide, block, info.dtype, allow_nonfinite)
            del wide  # the caller may keep the block
            yield block

    def whole(self, expr: Expr, info: TensorInfo) -> Tensor:
        """The tensor `info` in memory, with its shape and dtype. Raises as `blocks` does."""
        return torch.cat(list(self.blocks(expr, info, 1 << 62)))

    def moments(self, expr: Expr) -> tuple[float, float]:
        """Mean and standard deviation of an expression's values, rounded to nine digits, since further ones depend on the summation order."""
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
    """Checks a block that is not finite after the cast (`wide`: before it) and returns it with canonical NaNs. Raises as `Evaluator.blocks`."""
    if bool((wide.isfinite() & ~block.isfinite()).any()):
        raise ExecutionError(f"a value is too large for {dtype}.", hint="Grow it without noise or averages, or from a source in F32.")
    if not allowed:
        raise SourceError("a value is not finite: the source holds NaN or infinite values.", hint=NOT_FINITE_HINT)
    return block.masked_fill(block.isnan(), math.nan)  # NaN payloads depend on the processor


@singledispatch
def evaluate(expr: Expr, ev: Evaluator, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of an expression in the compute dtype. Raises TypeError for a node without an evaluator."""
    raise TypeError(f"no evaluator is registered for {type(expr).__name__}")


@evaluate.register
def _(expr: Source, ev: Evaluator, start: int, stop: int) -> Tensor:
    return ev.tensors.rows(expr.key, start, stop).to(ev.compute, copy=not ev.tensors.writable)


@evaluate.register
def _(expr: Take, ev: Evaluator, start: int, stop: int) -> Tensor:
    axis = ev.axes[expr.axis]
    if expr.dim > 0:
        inner = ev.rows(expr.of, start, stop)
        if len(axis.runs) > MANY_RUNS:
            return _gathered(inner, expr.dim, list(axis.runs), 0, expr, ev)
        shape = [*inner.shape[: expr.dim], axis.target_size, *inner.shape[expr.dim + 1 :]]
        return _sliced(shape, axis.runs, expr, ev, lambda run: inner.narrow(expr.dim, run.start or 0, run.length))
    runs = list(axis.window(start, stop))
    inside = [r for r in runs if r.start is not None]
    if inside:
        low = min(r.start for r in inside if r.start is not None)
        high = max(r.start + r.length for r in inside if r.start is not None)
        if len(runs) > MANY_RUNS and high - low <= 4 * (stop - start):
            return _gathered(ev.rows(expr.of, low, high), 0, runs, low, expr, ev)
        if len(runs) == 1:
            rows, gain = ev.rows(expr.of, low, high), runs[0].gain(expr.role, ev.quantity)
            return rows if gain == 1 else rows.mul_(gain)
    shape = [stop - start, *expr.shape(ev.scope)[1:]]
    return _sliced(shape, runs, expr, ev, lambda run: ev.rows(expr.of, run.start or 0, (run.start or 0) + run.length))


def _sliced(shape: Sequence[int], runs: Sequence[AxisRun], expr: Take, ev: Evaluator, read: Callable[[AxisRun], Tensor]) -> Tensor:
    """Few long runs by slice copies; `read` gives the source values of a run."""
    result, at = torch.empty(shape, dtype=ev.compute), 0
    for run in runs:
        part = result.narrow(expr.dim, at, run.length)
        if run.start is None:
            part.zero_()
        else:
            torch.mul(read(run), run.gain(expr.role, ev.quantity), out=part)
        at += run.length
    return result


def _gathered(inner: Tensor, dim: int, runs: list[AxisRun], offset: int, expr: Take, ev: Evaluator) -> Tensor:
    """Many short runs by one index_select and one multiplication."""
    # Rows outside the range of A read row 0 with gain zero.
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
def _(expr: Generated, ev: Evaluator, start: int, stop: int) -> Tensor:
    if ev.quantity != "weight":
        return torch.zeros(stop - start, *expr.size[1:], dtype=ev.compute)
    return _values(expr, ev, start, stop)


@singledispatch
def _values(expr: Generated, ev: Evaluator, start: int, stop: int) -> Tensor:
    raise TypeError(f"no evaluator is registered for {type(expr).__name__}")


@_values.register
def _(expr: Fill, ev: Evaluator, start: int, stop: int) -> Tensor:
    return torch.full((stop - start, *expr.size[1:]), expr.value, dtype=ev.compute)


@_values.register
def _(expr: Noise, ev: Evaluator, start: int, stop: int) -> Tensor:
    row = math.prod(expr.size[1:])
    mean, spread = (0.0, 1.0) if expr.like is None else ev.moments(expr.like)
    drawn = torch.from_numpy(gaussian(ev.seed, expr.key, start * row, stop * row, expr.std * spread)).to(ev.compute)
    return (drawn if expr.centered else drawn.add_(mean)).view(stop - start, *expr.size[1:])


@_values.register
def _(expr: Orthogonal, ev: Evaluator, start: int, stop: int) -> Tensor:
    drawn = ev.rows(Noise(expr.size, 1.0, expr.key), 0, expr.size[0]).double()
    rows = torch.linalg.qr(drawn.T).Q.T  # few rows, so all at once
    length = torch.full((len(rows), 1), expr.std * math.sqrt(expr.size[1]), dtype=torch.float64)
    length = length.copysign((rows * drawn).sum(1, keepdim=True))  # QR is unique only up to signs
    orthogonal: Tensor = rows * length
    return orthogonal[start:stop].to(ev.compute)


@_values.register
def _(expr: Values, ev: Evaluator, start: int, stop: int) -> Tensor:
    values = np.frombuffer(base64.b64decode(ev.data[expr.key]), dtype="<f2").reshape(expr.size)
    return torch.from_numpy(values[start:stop].astype(np.float32)).to(ev.compute)


@contextmanager
def single_threaded_ops() -> Iterator[None]:
    """Makes torch use one thread per operation, since tensors are processed in parallel. The setting is process-wide; nesting is counted."""
    with _threads.lock:
        if _threads.inside == 0:
            _threads.before = torch.get_num_threads()
        torch.set_num_threads(1)  # applies to this thread and to threads that have not used torch yet
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
