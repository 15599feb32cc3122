"""A teacher's distribution as random draws (Random Sampling Knowledge Distillation, arXiv 2503.16870): ragged arrays in .npy files.

    c_i ~ Multinomial(N, p)        p = softmax(z / T)        stored: the tokens i with c_i > 0, and c_i; p is taken to be c / N

E[c / N] = p, and the gradient of KL with respect to the student is linear in p: over the draws its mean is the gradient of the whole distribution.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_grow.errors import ExecutionError

if TYPE_CHECKING:
    from torch import Tensor

    Integers = np.ndarray[Any, np.dtype[np.integer[Any]]]

CHUNK = 1 << 24
"""Probabilities per chunk: 128 MB in fp64 for each of about three tensors."""


class SampledTokens:
    """starts.npy [rows + 1]: where each row begins in chosen.npy and counts.npy, which are flat; distinct.npy [rows, length]: tokens per position.

    Raises ValueError if they do not fit each other.
    """

    def __init__(self, folder: Path) -> None:
        self.starts = np.load(folder / "starts.npy", allow_pickle=False)
        self.distinct, self.token_ids, self.counts = (
            np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("distinct", "chosen", "counts")
        )
        if len(self.starts) != len(self.distinct) + 1 or {len(self.token_ids), len(self.counts)} != {int(self.starts[-1])}:
            raise ValueError("its files do not fit each other")

    def rows(self, numbers: list[int]) -> tuple[Integers, Integers]:
        """Counts and token ids [B, L, k] of rows; k is the largest number of tokens of a position, the others are filled with token 0, zero times."""
        distinct = np.stack([self.distinct[r] for r in numbers])
        used = np.arange(distinct.max()) < distinct[..., None]
        counts, token_ids = np.zeros(used.shape, np.int32), np.zeros(used.shape, np.int64)
        for out, flat in ((counts, self.counts), (token_ids, self.token_ids)):
            out[used] = np.concatenate([flat[self.starts[r] : self.starts[r + 1]] for r in numbers])
        return counts, token_ids


class SampledTokensWriter:
    """Writes them, row after row. The draws of a row depend on ``seed`` and the row's key alone, whatever is computed beside it."""

    def __init__(self, folder: Path, shape: tuple[int, int], vocabulary: int, samples: int, temperature: float, seed: int) -> None:
        self.folder, self.samples, self.temperature, self.seed = folder, samples, temperature, seed
        self.types = {"chosen": np.min_scalar_type(vocabulary - 1), "counts": np.min_scalar_type(samples)}
        self.files = {name: (folder / f"{name}.npy").open("wb") for name in self.types}
        self.distinct = np.lib.format.open_memmap(
            folder / "distinct.npy", mode="w+", dtype=np.dtype(np.min_scalar_type(min(samples, vocabulary))), shape=shape
        )
        self.starts, self.covered = [0], 0.0
        self._write_headers()

    def add(self, logits: Tensor, keys: list[bytes]) -> None:
        """The next rows, [B, L, V], and their keys."""
        for row, key in zip(logits, keys, strict=True):
            number = len(self.starts) - 1
            uniform = np.random.Generator(np.random.PCG64([self.seed, int.from_bytes(key, "big")])).random((len(row), self.samples))
            tokens, probability = draw(row, self.temperature, uniform)
            first = np.diff(tokens, axis=1, prepend=-1) != 0
            self.distinct[number] = first.sum(1)
            begins = np.flatnonzero(first)
            counts = np.diff(begins, append=first.size)  # a position's first draw begins a token, so none reaches into the next position
            for name, values in (("chosen", tokens[first]), ("counts", counts)):
                self.files[name].write(values.astype(self.types[name]).tobytes())
            self.starts.append(self.starts[-1] + len(begins))
            self.covered += float(probability[first].sum()) / len(row)

    def finish(self) -> dict[str, float]:
        """Closes the files. Returns the mean probability of a position's tokens, and their mean number."""
        self._write_headers()
        for file in self.files.values():
            file.close()
        self.distinct.flush()
        np.save(self.folder / "starts.npy", np.asarray(self.starts, np.int64), allow_pickle=False)
        return {"covered": self.covered / len(self.distinct), "distinct": self.starts[-1] / self.distinct.size}

    def _write_headers(self) -> None:
        """At the front of both files. NumPy leaves room for a longer first axis, so that the header of the empty array is as long as the last one."""
        for name, file in self.files.items():
            file.seek(0)
            header = {
                "descr": np.lib.format.dtype_to_descr(np.dtype(self.types[name])),
                "fortran_order": False,
                "shape": (self.starts[-1],),
            }
            np.lib.format.write_array_header_1_0(file, header)


def draw(logits: Tensor, temperature: float, uniform: np.ndarray[Any, Any]) -> tuple[Integers, np.ndarray[Any, Any]]:
    """Tokens [L, N] drawn from softmax(logits / temperature) [L, V] with uniform numbers from [0, 1), sorted, and their probabilities: in fp64.

    Raises ExecutionError for logits that are no distribution.
    """
    import torch

    if logits.device.type == "mps":
        logits = logits.cpu()  # it has no fp64
    step = max(1, CHUNK // logits.shape[-1])
    tokens, probabilities = [], []
    for start in range(0, len(logits), step):
        p = (logits[start : start + step].double() / temperature).softmax(-1)
        cumulative = p.cumsum(-1)
        total = cumulative[:, -1:]
        if not bool(total.isfinite().all()):
            raise ExecutionError("A teacher's logits are not finite.", hint="Try another `distill.dtype`, such as float32.")
        at = torch.from_numpy(uniform[start : start + step]).to(p.device) * total
        # Below the total, the first sum that is larger is that of a token with a probability above 0.
        at = at.minimum(total.nextafter(torch.zeros_like(total)))
        found = torch.searchsorted(cumulative, at, right=True).sort(-1).values
        tokens.append(found.cpu().numpy())
        probabilities.append(p.gather(-1, found).cpu().numpy())
    return np.concatenate(tokens), np.concatenate(probabilities)
