"""Evaluating expressions: row blocks of a target tensor from row blocks of source tensors.

Everything but a plain copy is computed in fp32 (fp64 where the source is fp64) and cast last. Row blocks keep memory small and change
nothing: noise is drawn in fixed chunks keyed by (seed, key, chunk), so neither block size, order, sharding nor resumption shows.
A method with a node of its own registers its evaluator: ``@evaluate.register`` on ``(node, evaluator, start, stop) -> Tensor``.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from functools import singledispatch
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from hf_grow.axes import AxisMap, Run
from hf_grow.checkpoint.reader import Checkpoint
from hf_grow.errors import ExecutionError
from hf_grow.planning import DTYPE_NAMES, GrowthPlan, TensorInfo
from hf_grow.tensormap import Concat, Expr, Fill, Noise, Product, Quantity, Scope, Source, Sum, Take

NOISE_CHUNK = 1 << 16
MANY_RUNS = 16  # above this, one gather beats slice copies


def torch_dtype(dtype: str) -> torch.dtype:
    found = getattr(torch, DTYPE_NAMES[dtype])
    assert isinstance(found, torch.dtype)
    return found


class Tensors(Protocol):
    """Where source tensors come from: rows [start, stop) of dimension 0, in their own dtype."""

    def rows(self, key: str, start: int, stop: int) -> Tensor: ...


class StoredTensors:
    """Source tensors read from the checkpoint's files, only the rows asked for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.handles: dict[str, int] = {}

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        stored = self.checkpoint.tensors[key]
        if stored.file not in self.handles:
            self.handles[stored.file] = os.open(self.checkpoint.path(stored.file), os.O_RDONLY)
        row = (stored.stop - stored.start) // stored.shape[0]
        buffer = bytearray((stop - start) * row)
        if os.preadv(self.handles[stored.file], [buffer], stored.start + start * row) != len(buffer):
            raise ExecutionError(f"{key} could not be read whole from {stored.file}.", hint="Did the source change? Run again.")
        return torch.frombuffer(buffer, dtype=torch_dtype(stored.dtype)).view(stop - start, *stored.shape[1:])

    def close(self) -> None:
        while self.handles:
            os.close(self.handles.popitem()[1])


class HeldTensors:
    """Source tensors that are in memory already."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        return self.tensors[key][start:stop]


class Evaluator:
    """Evaluates one plan's expressions. ``quantity`` chooses what flows through the map: weights, gradients or squared gradients."""

    def __init__(self, plan: GrowthPlan, tensors: Tensors, quantity: Quantity = "weight") -> None:
        self.tensors = tensors
        self.quantity = quantity
        self.seed = plan.growth.seed
        self.axes: Mapping[str, AxisMap] = plan.growth.axes
        self.scope = Scope({n: t.shape for n, t in plan.source.tensors.items()}, self.axes)
        wide = any(t.dtype == "F64" for t in plan.source.tensors.values())
        self.compute = torch.float64 if wide else torch.float32
        self._spread: dict[Expr, float] = {}

    def rows(self, expr: Expr, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of dimension 0, in the compute dtype."""
        return evaluate(expr, self, start, stop)

    def blocks(self, expr: Expr, info: TensorInfo, budget: int) -> Iterator[Tensor]:
        """The whole tensor in the target's dtype, as row blocks that take about `budget` bytes to compute.

        Raises ExecutionError where a value is not finite, or does not fit the target's dtype.
        """
        # A block lives a few times over: the source rows, the result, one temporary of either, and the cast.
        row = math.prod(info.shape[1:]) * self.compute.itemsize * 4
        step = max(1, budget // max(row, 1))
        for start in range(0, info.shape[0], step):
            block = self.rows(expr, start, min(start + step, info.shape[0])).to(torch_dtype(info.dtype))
            if not torch.isfinite(block).all():
                raise ExecutionError(f"a value is not finite, or too large for {info.dtype}")
            yield block.contiguous()

    def whole(self, expr: Expr, info: TensorInfo) -> Tensor:
        return torch.cat(list(self.blocks(expr, info, 1 << 62)))

    def spread(self, expr: Expr) -> float:
        """Standard deviation of all values of an expression."""
        if expr not in self._spread:
            shape = expr.shape(self.scope)
            step = max(1, (1 << 22) // max(1, math.prod(shape[1:])))
            total, squares, count = 0.0, 0.0, math.prod(shape)
            for start in range(0, shape[0], step):
                block = self.rows(expr, start, min(start + step, shape[0])).double()
                total += float(block.sum())
                squares += float(block.square().sum())
            self._spread[expr] = math.sqrt(max(0.0, squares / count - (total / count) ** 2))
        return self._spread[expr]


@singledispatch
def evaluate(expr: Expr, ev: Evaluator, start: int, stop: int) -> Tensor:
    raise TypeError(f"no evaluator is registered for {type(expr).__name__}")


@evaluate.register
def _(expr: Source, ev: Evaluator, start: int, stop: int) -> Tensor:
    return ev.tensors.rows(expr.key, start, stop).to(ev.compute)


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
        return torch.cat([_run_rows(r, expr, ev) for r in runs])
    runs = list(axis.runs)
    inner = ev.rows(expr.of, start, stop)
    if len(runs) > MANY_RUNS:
        return _gathered(inner, expr.dim, runs, 0, expr, ev)
    parts = []
    for run in runs:
        if run.start is None:
            shape = list(inner.shape)
            shape[expr.dim] = run.length
            parts.append(torch.zeros(shape, dtype=ev.compute))
        else:
            parts.append(inner.narrow(expr.dim, run.start, run.length) * run.gain(expr.role, ev.quantity))
    return torch.cat(parts, expr.dim)


def _run_rows(run: Run, expr: Take, ev: Evaluator) -> Tensor:
    if run.start is None:
        return torch.zeros(run.length, *expr.shape(ev.scope)[1:], dtype=ev.compute)
    return ev.rows(expr.of, run.start, run.start + run.length) * run.gain(expr.role, ev.quantity)


def _gathered(inner: Tensor, dim: int, runs: list[Run], offset: int, expr: Take, ev: Evaluator) -> Tensor:
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
    total = ev.rows(expr.terms[0], start, stop) * expr.weights[0] ** power
    for term, weight in zip(expr.terms[1:], expr.weights[1:], strict=True):
        total = total.add(ev.rows(term, start, stop), alpha=weight**power)
    return total


@evaluate.register
def _(expr: Product, ev: Evaluator, start: int, stop: int) -> Tensor:
    if ev.quantity != "weight":
        return torch.zeros(stop - start, *expr.shape(ev.scope)[1:], dtype=ev.compute)
    result = ev.rows(expr.factors[0], start, stop)
    for factor in expr.factors[1:]:
        result = result * ev.rows(factor, start, stop)
    return result


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
def _(expr: Fill, ev: Evaluator, start: int, stop: int) -> Tensor:
    value = expr.value if ev.quantity == "weight" else 0.0  # a constant carries nothing of the source's gradient
    return torch.full((stop - start, *expr.size[1:]), value, dtype=ev.compute)


@evaluate.register
def _(expr: Noise, ev: Evaluator, start: int, stop: int) -> Tensor:
    row = math.prod(expr.size[1:])
    if ev.quantity != "weight":
        return torch.zeros(stop - start, *expr.size[1:], dtype=ev.compute)
    std = expr.std * (1.0 if expr.like is None else ev.spread(expr.like))
    first, last = start * row, stop * row
    chunks = [_noise_chunk(ev.seed, expr.key, c) for c in range(first // NOISE_CHUNK, -(-last // NOISE_CHUNK))]
    offset = first // NOISE_CHUNK * NOISE_CHUNK
    values = torch.from_numpy(np.concatenate(chunks)[first - offset : last - offset])
    return values.to(ev.compute).mul_(std).view(stop - start, *expr.size[1:])


def _noise_chunk(seed: int, key: str, chunk: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    digest = hashlib.blake2b(f"{seed}\0{key}\0{chunk}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
    return generator.standard_normal(NOISE_CHUNK, dtype=np.float32)


def raw_bytes(block: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, of any dtype, without a copy."""
    return block.view(torch.uint8).numpy().reshape(-1).data
