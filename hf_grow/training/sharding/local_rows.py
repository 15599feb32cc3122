"""Reading the part of a parameter that this process holds from a RowSource."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hf_grow.errors import ExecutionError, SourceError
from hf_grow.training.param_updates.parameter_map import ParameterRows
from hf_grow.training.param_updates.shards import Window, as_sharded, local, local_window
from hf_grow.training.sharding.row_source import RowSource, row_step

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Places = Mapping[str, ParameterRows]
"""Name on disk -> its place in a parameter (`parameter_map`)."""


def by_parameter(places: Places) -> Mapping[str, Places]:
    """Parameter name -> the tensors on disk that it holds."""
    found: dict[str, dict[str, ParameterRows]] = {}
    for name, place in places.items():
        found.setdefault(place.parameter, {})[name] = place
    return found


def whole_parameters(shapes: Mapping[str, Sequence[int]]) -> dict[str, ParameterRows]:
    """The places of tensors that are stored as they are held: whole, under the parameter's name."""
    return {n: ParameterRows(n, 0, math.prod(s if len(s) == 1 else s[:-1])) for n, s in shapes.items()}


def read_local(out: Tensor, shape: Sequence[int], window: Window, places: Places, source: RowSource) -> Tensor:
    """Fills `out`, the part `window` of a parameter of shape `shape`, with the rows that it holds; returns it.

    ``places``: of this parameter's tensors on disk. Memory: one block of rows. Raises SourceError if the source lacks a tensor or has another shape.
    """
    if out.numel() == 0:
        return out
    columns = window[-1] if len(shape) > 1 else range(1)
    matrix = out.view(-1, len(columns))
    _check_shapes(shape, places, source)
    for at, name, start, stop in local_parts(shape, window, places):
        read_rows(matrix[at : at + stop - start], name, start, stop, columns, source)
    return out


def _check_shapes(shape: Sequence[int], places: Places, source: RowSource) -> None:
    """Raises SourceError if a tensor is missing, or has not exactly the rows and columns of its place."""
    columns = shape[-1] if len(shape) > 1 else 1
    for name, place in places.items():
        if name not in source.names():
            raise SourceError(f"The weights lack {name}; it would be random.")
        stored = source.shape(name)
        width = stored[-1] if len(stored) > 1 else 1
        if (math.prod(stored) // max(1, width), width) != (place.stop - place.start, columns):
            raise SourceError(f"{name} has shape {list(stored)}, which is not that of the model.")


def fill_tensors(tensors: Mapping[str, Tensor], places: Places, source: RowSource) -> None:
    """Fills this process's part of every tensor, in place. Raises as `read_local`."""
    import torch

    of = by_parameter(places)
    with torch.no_grad():
        for name, tensor in tensors.items():
            read_local(local(tensor), tensor.shape, local_window(tensor), of[name], source)


def local_parts(shape: Sequence[int], window: Window, places: Places) -> Iterator[tuple[int, str, int, int]]:
    """What the part `window` of a parameter consists of: its row (as a matrix of its columns), and rows [start, stop) of a tensor on disk."""
    at = 0
    for start, stop in _row_runs(shape, window):
        filled = 0
        for name, place in places.items():
            low, high = max(start, place.start), min(stop, place.stop)
            if low < high:
                yield at + low - start, name, low - place.start, high - place.start
                filled += high - low
        if filled != stop - start:
            raise ExecutionError(f"Rows {start} to {stop} of a parameter {list(shape)} are not covered by {', '.join(places)}.")
        at += stop - start


def _row_runs(shape: Sequence[int], window: Window) -> Iterator[tuple[int, int]]:
    """Runs of rows of a parameter, as a matrix of its last dimension (a vector: entries), that the window covers."""
    leading = len(shape) - 1 if len(shape) > 1 else 1
    whole = leading  # dimensions from `whole` on are complete
    while whole > 1 and len(window[whole - 1]) == shape[whole - 1]:
        whole -= 1
    unit = math.prod(shape[whole:leading])
    last = window[whole - 1]

    def starts(dim: int, base: int) -> Iterator[int]:
        if dim == whole - 1:
            yield base
            return
        for i in window[dim]:
            yield from starts(dim + 1, (base + i) * shape[dim + 1])

    for base in starts(0, 0):
        yield (base + last.start) * unit, (base + last.stop) * unit


def read_rows(out: Tensor, name: str, start: int, stop: int, columns: range, source: RowSource) -> None:
    """Rows [start, stop) of a tensor on disk, as a matrix of its last dimension, into `out`."""
    shape = source.shape(name)
    width = shape[-1] if len(shape) > 1 else 1
    inner = math.prod(shape[1:-1]) if len(shape) > 2 else 1
    step = row_step(shape)
    for low in range(start // inner, -(-stop // inner), step):
        high = min(low + step, -(-stop // inner))
        block = source.rows(name, low, high).reshape(-1, width)
        first, last = max(start, low * inner), min(stop, high * inner)
        part = block[first - low * inner : last - low * inner, columns.start : columns.stop]
        out[first - start : last - start].copy_(part)


def local_tensor(like: Any, places: Places, source: RowSource, dtype: torch.dtype, device: Any) -> Tensor:
    """A new tensor, sharded as `like` is (plain where it is plain), with the values of `source`."""
    import torch

    window = local_window(like)
    held = torch.empty([len(r) for r in window], dtype=dtype, device=device)
    return as_sharded(read_local(held, like.shape, window, places, source), like)


def held_rows(held: Tensor, shape: Sequence[int], window: Window, places: Places) -> Iterator[tuple[str, int, Tensor]]:
    """(name on disk, first row, rows) of what a process holds of a parameter of shape `shape`, sharded along dimension 0 (FSDP2): views of `held`."""
    if any(len(kept) != length for kept, length in zip(window[1:], shape[1:], strict=True)):
        raise ExecutionError(f"A shard of {list(shape)} is sharded along another dimension than the first.")
    matrix = held.view(-1, shape[-1]) if len(shape) > 1 else held
    first = window[0].start * math.prod(shape[1:-1])
    for name, place in places.items():
        low, high = max(first, place.start), min(first + len(matrix), place.stop)
        if low < high:
            yield name, low - place.start, matrix[low - first : high - first]
