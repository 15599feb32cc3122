"""`pytest --perturb SEED`: arithmetic as on a processor that nobody has.

Which way a product, a sum or an exponential is rounded is the business of a processor's vector width, its library and the number of threads. Here
every result of these operations in torch is moved by up to one unit in its last place, sums also by one of the results beside it; which way follows
from the seed, the shapes, the place and the number itself. So the same computation twice in one process gives the same bits, and another shape,
order or batch does not. A test that passes with several seeds asserts nothing that rounding decides. Processes that a test starts are not
perturbed. `--perturb-by N` makes it N units.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

# Each has a form that writes into a given tensor, which stays as it was and does the work.
OPERATIONS = {
    "mm": "out", "addmm": "out", "bmm": "out", "baddbmm": "out", "silu": "out", "_softmax": "out", "_log_softmax": "out", "exp": "out",
    "cos": "out", "sin": "out", "rsqrt": "out", "mean.dim": "out", "sum.dim_IntList": "IntList_out",
}  # fmt: skip
SUMS = {"mm", "addmm", "bmm", "baddbmm", "mean", "sum"}
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_kept: list[torch.library.Library] = []


def moved(result: Tensor, key: int, units: float, sums: bool) -> Tensor:
    """`result` in other last bits. Numbers of few bits stay: whole numbers and their halves come out alike everywhere."""
    flat = result.reshape(-1)
    size, eps = result.element_size(), torch.finfo(result.dtype).eps
    mantissa = flat.view(BITS[size]).long() & (round(1 / eps) - 1)
    few = mantissa & ((1 << (round(1 / eps).bit_length() // 2)) - 1) == 0
    # Any mixing of bits will do; whole numbers overflow silently.
    mixed = mantissa * 0x9E3779B1 + torch.arange(flat.numel()) * 0x27D4EB2F + key * 0x85EBCA77
    mixed = (mixed ^ (mixed >> 15)) * 0x2545F491
    mixed = mixed ^ (mixed >> 13)
    by = ((mixed >> 7) % 5 - 2).to(result.dtype) / 2
    finite = torch.where(flat.isfinite(), flat, 0).double()
    scale = finite.abs()
    if size == 2:  # such sums are kept in more bits and rounded once, so that few of them come out otherwise, and by one unit
        by, few, units = torch.where((mixed >> 17) % 8 == 0, by, 0), flat == 0, 1.0
    elif sums:  # of terms that may be larger than they
        scale = scale + finite.norm() / flat.numel() ** 0.5
    return torch.where(few | ~flat.isfinite(), flat, flat + (units * eps * scale).to(result.dtype) * by).reshape(result.shape)


def install(seed: int, units: float) -> None:
    """Puts other kernels in the place of torch's own, for this process."""
    busy = False

    def replace(name: str, out: str) -> None:
        base = name.partition(".")[0]
        plain = getattr(getattr(torch.ops.aten, base), out)

        def kernel(*args: Any, **options: Any) -> Tensor:
            nonlocal busy
            outer, busy = not busy, True
            try:
                with torch._C.DisableTorchFunction():  # tests/support/exact.py would change the dtypes asked for here
                    given = [a for a in args if isinstance(a, Tensor)]
                    dtype = options.get("dtype") or (given[0].dtype if given[0].is_floating_point() else _of_whole_numbers(base))
                    result: Tensor = plain(*args, out=torch.empty(0, dtype=dtype), **options)
                    if not outer or not result.is_floating_point() or not result.numel():
                        return result
                    key = seed
                    for n in (n for tensor in given for n in tensor.shape):
                        key = (key * 31 + n) % 2**20
                    return moved(result, key, units, base in SUMS)
            finally:
                busy = not outer

        _kept[0].impl(name, kernel, "CPU")

    _kept.append(torch.library.Library("aten", "IMPL"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that kernels are replaced is what this is for
        for name, out in OPERATIONS.items():
            replace(name, out)


def _of_whole_numbers(operation: str) -> torch.dtype:
    return torch.int64 if operation in ("sum", "mean", "mm") else torch.get_default_dtype()
