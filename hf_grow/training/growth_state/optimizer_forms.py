"""How optimizers keep their moments: read as plain moments of the parameter's shape, which growth maps, and written back in the same form.

    AdamW, Adam (also fused, amsgrad)   exp_avg, exp_avg_sq, max_exp_avg_sq
    AdamW 8-bit of bitsandbytes         state1, state2 as codes with scales (`block_quantized`); small tensors in fp32
    AdamW 8- and 4-bit of torchao       the same as tensor subclasses
    SGD with momentum, Muon             momentum_buffer
    Lion                                exp_avg
    Adafactor of torch, transformers    v as row and column means: v_ij = R_i C_j / mean(R)

Which form a parameter has is told by the names of its state, so one file may hold several (Muon for matrices, AdamW for the rest).

Adafactor. Where the map copies rows and columns with gains, the mapped v is of rank 1 again, v'_ij = (b_i a_j)^2 v_s(i)t(j), and its own row and column
means are R' and C': they give v' back exactly. Where a map mixes sources, v' is a sum that no R' and C' give; that is noticed, and refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_grow.checkpoint.torch_files import SubclassTensor
from hf_grow.errors import SourceError
from hf_grow.growth.tensormap import Quantity
from hf_grow.growth.tensors import RowTensor
from hf_grow.training.growth_state.block_quantized import Computed, Dequantized, quantized
from hf_grow.training.growth_state.optimizer_state import MemoryTensor

State = Mapping[str, Any]
"""What an optimizer keeps of one parameter."""
Moments = dict[str, RowTensor]
"""Tensors of the parameter's shape: exp_avg and momentum_buffer are averages of gradients, exp_avg_sq and max_exp_avg_sq of their squares."""
QUANTITIES: dict[str, Quantity] = {"exp_avg": "grad", "momentum_buffer": "grad", "exp_avg_sq": "grad2", "max_exp_avg_sq": "grad2"}
BNB = "__bnb_optimizer_quant_state__"
"""Where bitsandbytes keeps what FSDP shall not gather."""
RANK_1_ERROR = 1e-4
"""Relative to the largest value of a row, between fp32 roundings (1e-6) and what mixing does."""
_SCALARS = ("step", "RMS")


@dataclass(frozen=True)
class Form:
    """One way of keeping moments. ``read``: the moments of a parameter's state; ``write``: its state with other moments."""

    name: str
    required: frozenset[str]
    optional: frozenset[str]
    read: Callable[[State, tuple[int, ...]], Moments]
    write: Callable[[Moments, State], dict[str, Any]]


def form_of(state: State, name: str) -> Form:
    """The form of a parameter's state. Raises SourceError for one that cannot be grown, with the reason."""
    for form in FORMS:
        if form.required <= state.keys() <= form.required | form.optional | frozenset(_SCALARS):
            return form
    raise SourceError(
        f"The optimizer keeps {', '.join(sorted(map(str, state)))} of {name}: {_reason(state)}",
        hint="Grow with --optimizer-policy reset: the schedule and the data position continue, the moments start from zero.",
    )


def _reason(state: State) -> str:
    if "exp_avg" in state and "exp_avg_sq_row" in state:
        return "Adafactor's exp_avg (beta1) is an average of updates, not of gradients, and does not map as one."
    if BNB in state or "state1" in state:
        return "a single moment of bitsandbytes may be Lion's or RMSprop's, which map differently."
    return "there is no exact map for these. AdamW, SGD, Muon, Lion and Adafactor can be grown."


def read_moments(state: State, name: str, shape: tuple[int, ...]) -> Moments:
    """The moments of a parameter of this shape. Raises SourceError for another form, and for another shape."""
    found = form_of(state, name).read(state, shape)
    for key, value in found.items():
        if tuple(value.shape) != shape:
            raise SourceError(
                f"{key} of {name} has shape {list(value.shape)}, the parameter {list(shape)}.",
                hint="The state belongs to another model, or to an optimizer of projected gradients (GaLore, APOLLO), which cannot be grown.",
            )
    return found


def parameter_shape(state: State) -> tuple[int, ...] | None:
    """The shape of the parameter that a state belongs to, as far as the state tells."""
    held = state.get(BNB, state)
    for key in (*QUANTITIES, "variance", "state1"):
        if held.get(key) is not None:
            return tuple(held[key].shape)
    for row, column, dims in (("row_var", "col_var", 1), ("exp_avg_sq_row", "exp_avg_sq_col", 0)):
        if row in held and column in held:
            return (*held[row].shape[: len(held[row].shape) - dims], held[column].shape[-1])
    return None


def initial_state(shape: tuple[int, ...], like: State, name: str) -> dict[str, Any]:
    """The state of a parameter of this shape before the first step, in the form of `like`."""
    shape_of_like = parameter_shape(like)
    assert shape_of_like is not None
    zeros: Moments = {
        k: Computed(shape, v.dtype, lambda start, stop, d=v.dtype: torch.zeros(stop - start, *shape[1:], dtype=d))  # type: ignore[misc]
        for k, v in form_of(like, name).read(like, shape_of_like).items()
    }
    start = {k: MemoryTensor(torch.zeros(())) if hasattr(like[k], "rows") else 0 for k in _SCALARS if k in like}
    return {**write_state(zeros, like, name), **start}


def write_state(moments: Moments, like: State, name: str) -> dict[str, Any]:
    """A parameter's state with these moments, in the form and with the numbers of `like`."""
    return {**{k: like[k] for k in _SCALARS if k in like}, **form_of(like, name).write(moments, like)}


# ---- plain tensors, and tensor subclasses of torchao -------------------------------------------------------------------------------------


def _read_plain(state: State, shape: tuple[int, ...]) -> Moments:
    return {k: _dequantized(state[k]) for k in QUANTITIES if state.get(k) is not None}


def _dequantized(value: Any) -> RowTensor:
    if not isinstance(value, SubclassTensor):
        found: RowTensor = value
        return found
    if value.kind.__name__ not in ("OptimState8bit", "OptimState4bit"):
        raise SourceError(
            f"State of {value.kind.__name__} cannot be grown: only torchao's 8- and 4-bit states are read.",
            hint="Grow with --optimizer-policy reset.",
        )
    packed = value.kind.__name__ == "OptimState4bit"
    codes, scale, qmap = (value.parts[n] for n in ("codes", "scale", "qmap"))
    block = math.prod(value.shape) // scale.shape[0]
    return Dequantized(codes, scale, qmap.whole(), value.shape, block, packed)


def _write_plain(moments: Moments, like: State) -> dict[str, Any]:
    return {k: _quantized_like(v, like[k]) for k, v in moments.items()}


def _quantized_like(values: RowTensor, like: Any) -> Any:
    """A tensor subclass as torchao would have it; plain where its blocks do not fit."""
    if not isinstance(like, SubclassTensor):
        return values
    block, qmap = math.prod(like.shape) // like.parts["scale"].shape[0], like.parts["qmap"].whole()
    if math.prod(values.shape) % block:
        return values
    packed = like.kind.__name__ == "OptimState4bit"
    codes, scale = quantized(values, qmap, block, packed=packed)
    context = [torch.Size(values.shape) if isinstance(c, torch.Size) else c for c in like.context]
    return SubclassTensor(like.kind, {"codes": codes, "scale": scale, "qmap": like.parts["qmap"]}, context, values.shape, like.dtype)


# ---- bitsandbytes ------------------------------------------------------------------------------------------------------------------------

_BNB_NAMES = {"state1": "exp_avg", "state2": "exp_avg_sq"}


def _read_bnb(state: State, shape: tuple[int, ...]) -> Moments:
    held: State = state.get(BNB, state)
    found: Moments = {}
    if not held.keys() >= _BNB_NAMES.keys() or not held.keys() <= _BNB_KEYS:
        raise SourceError(
            f"bitsandbytes keeps {', '.join(sorted(held))}: {_reason(state)}",
            hint="Only the state of AdamW can be grown. Grow with --optimizer-policy reset.",
        )
    for key, name in _BNB_NAMES.items():
        value = held[key]
        if value.dtype == torch.uint8:
            found[name] = Dequantized(
                value, held[f"absmax{key[-1]}"], held[f"qmap{key[-1]}"].whole(), tuple(value.shape), _bnb_block(held, key)
            )
        else:
            found[name] = value
    return found


_BNB_KEYS = {f"{part}{i}" for part in ("state", "absmax", "qmap") for i in "12"} | {"step"}


def _bnb_block(held: State, key: str) -> int:
    """Values with one scale: a power of two, of which the last block may have fewer."""
    return int(1 << math.ceil(math.log2(math.prod(held[key].shape) / held[f"absmax{key[-1]}"].shape[0])))


def _write_bnb(moments: Moments, like: State) -> dict[str, Any]:
    held: Mapping[str, Any] = like.get(BNB, like)
    out: dict[str, Any] = {}
    for key, name in _BNB_NAMES.items():
        if held[key].dtype == torch.uint8:
            qmap = held[f"qmap{key[-1]}"]
            codes, scale = quantized(moments[name], qmap.whole(), _bnb_block(held, key))
            out |= {key: codes, f"qmap{key[-1]}": qmap, f"absmax{key[-1]}": scale}
        else:
            out[key] = moments[name]
    return {BNB: out} if BNB in like else out


# ---- Adafactor ---------------------------------------------------------------------------------------------------------------------------


def _factored(row: str, column: str, keep: bool) -> tuple[Callable[..., Moments], Callable[..., dict[str, Any]]]:
    """``keep``: whether the means keep the dimension that they are over."""

    def read(state: State, shape: tuple[int, ...]) -> Moments:
        rows, columns = state[row], state[column]
        means = (*shape[:-1], 1) if keep else shape[:-1], (*shape[:-2], 1, shape[-1]) if keep else (*shape[:-2], shape[-1])
        if len(shape) < 2 or (tuple(rows.shape), tuple(columns.shape)) != means:
            raise SourceError(f"Adafactor's means have shapes {list(rows.shape)} and {list(columns.shape)}, the parameter {list(shape)}.")
        wide = torch.promote_types(rows.dtype, torch.float32)  # a product rounded to bf16 is no longer of rank 1
        r, c = rows.whole().to(wide).reshape(*shape[:-1], 1), columns.whole().to(wide).reshape(*shape[:-2], 1, shape[-1])
        # Not the product of both first: of means of tiny squares it underflows.
        scaled = r / r.mean(-2, keepdim=True).clamp(min=torch.finfo(r.dtype).tiny)

        def product(start: int, stop: int) -> Tensor:
            values: Tensor = scaled[start:stop] * (c[start:stop] if len(shape) > 2 else c)
            return values

        return {"exp_avg_sq": Computed(shape, wide, product)}

    def write(moments: Moments, like: State) -> dict[str, Any]:
        r, c = _means(moments["exp_avg_sq"])
        shaped = (r, c) if keep else (r.squeeze(-1), c.squeeze(-2))
        return {key: MemoryTensor(mean.to(like[key].dtype)) for key, mean in zip((row, column), shaped, strict=True)}

    return read, write


def _means(v: RowTensor) -> tuple[Tensor, Tensor]:
    """Row and column means of a v of rank 1, in its last two dimensions. Raises SourceError where it is not of rank 1."""
    rows, columns = [], []
    step = max(1, (1 << 22) // max(1, math.prod(v.shape[1:])))
    blocks = [(i, min(i + step, v.shape[0])) for i in range(0, v.shape[0], step)]
    for start, stop in blocks:
        block = v.rows(start, stop).double()
        rows.append(block.mean(-1, keepdim=True))
        columns.append(block.mean(-2, keepdim=True) if len(v.shape) > 2 else block.sum(0, keepdim=True) / v.shape[0])
    r = torch.cat(rows)
    c = torch.cat(columns) if len(v.shape) > 2 else torch.stack(columns).sum(0)
    overall = r.mean(-2, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    for start, stop in blocks:
        block = v.rows(start, stop).double()
        factors = (c, overall) if len(v.shape) == 2 else (c[start:stop], overall[start:stop])
        given = r[start:stop] * factors[0] / factors[1]
        if bool(((block - given).abs() > RANK_1_ERROR * block.amax(-1, keepdim=True)).any()):
            raise SourceError(
                "Adafactor's row and column means cannot be grown: this growth mixes several sources in one tensor.",
                hint="Grow by copies (--symmetry none), or with --optimizer-policy reset.",
            )
    return r, c


def _read_unfactored(state: State, shape: tuple[int, ...]) -> Moments:
    return {"exp_avg_sq": state["variance"]}


def _write_unfactored(moments: Moments, like: State) -> dict[str, Any]:
    return {"variance": moments["exp_avg_sq"]}


def _form(name: str, required: str, functions: tuple[Any, Any], optional: str = "") -> Form:
    return Form(name, frozenset(required.split()), frozenset(optional.split()), *functions)


FORMS = (
    _form("AdamW", "exp_avg exp_avg_sq", (_read_plain, _write_plain), "max_exp_avg_sq"),
    _form("Lion", "exp_avg", (_read_plain, _write_plain)),
    _form("SGD or Muon", "momentum_buffer", (_read_plain, _write_plain)),
    _form("AdamW 8-bit", BNB, (_read_bnb, _write_bnb)),
    _form("AdamW 8-bit", "state1 state2", (_read_bnb, _write_bnb), "qmap1 qmap2 absmax1 absmax2"),
    _form("Adafactor", "row_var col_var", _factored("row_var", "col_var", True)),
    _form("Adafactor", "variance", (_read_unfactored, _write_unfactored)),
    _form("Adafactor", "exp_avg_sq_row exp_avg_sq_col", _factored("exp_avg_sq_row", "exp_avg_sq_col", False)),
    _form("Adafactor", "exp_avg_sq", (_read_plain, _write_plain)),
)
