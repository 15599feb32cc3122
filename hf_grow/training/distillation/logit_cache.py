"""Teacher outputs on disk, for distillation without the teacher in memory: top-k logits, or tokens sampled from its distribution (`sampled_tokens`).

Memory-mapped .npy files, found by a hash of each row of token ids, so that any order and mixture of rows is served. Top-k logits are stored relative
to the largest of their position. With k = vocabulary size nothing is left out; with less, the gradient is that of another distribution.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_grow.common.safe_files import read_json, to_json
from hf_grow.errors import ExecutionError, InputError, SourceError
from hf_grow.training.data.document_masking import forward_arguments
from hf_grow.training.distillation.sampled_tokens import SampledTokens, SampledTokensWriter

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_FORMAT = 1


class LogitCache:
    """keys.npy [rows], meta.json, and the files of `TopKLogits` or `SampledTokens`. Raises InputError if one cannot be read."""

    def __init__(self, folder: Path) -> None:
        try:
            self.meta = read_json(folder / "meta.json")
            keys = np.load(folder / "keys.npy", allow_pickle=False)
            self.outputs = SampledTokens(folder) if "samples" in self.meta else TopKLogits(folder)
        except (SourceError, OSError, ValueError) as error:
            raise InputError(
                f"The teacher's logits in {folder} cannot be read: {error}.", hint="Delete the folder; the logits are then computed again."
            ) from None
        self.folder = folder
        self.index = {bytes(key): i for i, key in enumerate(keys)}

    def prepare(self, accelerator: Any) -> None:
        """Nothing: each batch is read from disk."""

    def __call__(self, input_ids: Tensor, position_ids: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits, or counts of draws, and token ids [B, L, k] of rows [B, L]. Raises ExecutionError for a row that is not in the cache."""
        import torch

        try:
            rows = [
                self.index[key] for key in hash_rows(input_ids.cpu().numpy(), None if position_ids is None else position_ids.cpu().numpy())
            ]
        except KeyError:
            raise ExecutionError(
                f"{self.folder} has no logits for a training row.",
                hint="The data changed since: delete the folder to compute the logits again.",
            ) from None
        values, token_ids = self.outputs.rows(rows)
        return torch.from_numpy(values).to(input_ids.device), torch.from_numpy(token_ids).to(input_ids.device, torch.int64)

    @contextmanager
    def in_chunks(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Iterator[Callable[[Tensor], tuple[Tensor, Tensor]]]:
        """The same, [n, k], of positions that are numbered through all rows."""
        values, token_ids = (found.flatten(0, 1) for found in self(input_ids, position_ids) if found is not None)
        yield lambda positions: (values[positions], token_ids[positions])


class TopKLogits:
    """logits.npy and chosen.npy (token ids) [rows, length, k]."""

    def __init__(self, folder: Path) -> None:
        self.logits, self.token_ids = (np.load(folder / f"{n}.npy", mmap_mode="r", allow_pickle=False) for n in ("logits", "chosen"))

    def rows(self, numbers: list[int]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Logits and token ids [B, L, k] of rows."""
        return np.stack([self.logits[r] for r in numbers]), np.stack([self.token_ids[r] for r in numbers])


class TopKLogitsWriter:
    """Writes them, row after row."""

    def __init__(self, folder: Path, shape: tuple[int, int], k: int, dtype: str) -> None:
        self.logits, self.token_ids = (
            np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=np.dtype(of), shape=(*shape, k))
            for name, of in (("logits", dtype), ("chosen", "int32"))
        )
        self.done, self.covered = 0, 0.0

    def add(self, logits: Tensor, keys: list[bytes]) -> None:
        """The next rows, [B, L, V], and their keys."""
        logits, rows = logits.float(), slice(self.done, self.done + len(logits))
        top = logits.topk(self.logits.shape[-1], dim=-1)
        self.covered += float((top.values.logsumexp(-1) - logits.logsumexp(-1)).exp().mean(-1).sum())
        self.logits[rows] = (top.values - top.values[..., :1]).cpu().numpy()
        self.token_ids[rows] = top.indices.cpu().numpy()
        self.done = rows.stop

    def finish(self) -> dict[str, float]:
        """Returns the mean probability of a position's tokens."""
        self.logits.flush()
        self.token_ids.flush()
        return {"covered": self.covered / self.done}


def hash_rows(input_ids: np.ndarray[Any, Any], position_ids: np.ndarray[Any, Any] | None) -> list[bytes]:
    """A key for each row: of its token ids, and of their positions where attention stays within documents."""
    rows = input_ids if position_ids is None else np.concatenate([input_ids, position_ids], axis=1)
    return [hashlib.blake2b(row.astype("<i8").tobytes(), digest_size=16).digest() for row in rows]


def write_logit_cache(
    model: PreTrainedModel,
    rows: Sequence[Mapping[str, Any]],
    folder: Path,
    *,
    top_k: int | None = None,
    dtype: str = "float16",
    samples: int | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    identity: str,
    batch: int = 8,
    progress: Callable[[int], None] = lambda rows: None,
) -> LogitCache:
    """Runs the teacher over all rows once; an existing folder of the same rows, teacher and settings is used.

    Args:
        model: the teacher.
        rows: {"input_ids": [length]}, all of one length; also "position_ids" where attention stays within documents.
        folder: appears when it is complete.
        top_k: logits per position, stored in ``dtype``, float16 or float32.
        samples: tokens drawn per position from softmax(z / ``temperature``), in place of top_k; the draws of a row are those of its text and ``seed``.
        identity: names the teacher and its weights.
        batch: rows per forward pass.
        progress: called with the number of rows done.

    Raises InputError if the folder holds logits of other rows, of another teacher or with other settings.
    """
    import torch

    vocabulary = model.config.vocab_size
    data_hash = hashlib.blake2b(digest_size=16)
    for ids, positions in _batches(rows, 256):
        data_hash.update(ids.astype("<i8").tobytes())
        if positions is not None:
            data_hash.update(positions.astype("<i8").tobytes())
    meta: dict[str, Any] = {"format": _FORMAT, "teacher": identity, "rows": len(rows), "data": data_hash.hexdigest()}
    if samples is not None:
        meta |= {"samples": samples, "temperature": temperature, "seed": seed}
    else:
        assert top_k is not None
        meta |= {"top_k": min(top_k, vocabulary), "dtype": dtype}
    if folder.exists():
        cache = LogitCache(folder)
        if {key: cache.meta.get(key) for key in meta} == meta:
            return cache
        raise InputError(
            f"{folder} contains logits of another teacher, other data or other settings.", hint="Delete it, or set another `distill.cache`."
        )
    shape = (len(rows), len(rows[0]["input_ids"]))
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    writer: SampledTokensWriter | TopKLogitsWriter
    if samples is not None:
        writer = SampledTokensWriter(partial, shape, vocabulary, samples, temperature, seed)
    else:
        writer = TopKLogitsWriter(partial, shape, meta["top_k"], dtype)
    keys: list[bytes] = []
    model.eval()
    for ids, positions in _batches(rows, batch):
        documents = forward_arguments(model.config, None if positions is None else torch.from_numpy(positions).to(model.device))
        with torch.no_grad():
            logits = model(**{"input_ids": torch.from_numpy(ids).to(model.device), "use_cache": False, **documents}).logits
        keys += (found := hash_rows(ids, positions))
        writer.add(logits, found)
        progress(len(ids))
    facts = writer.finish()
    np.save(partial / "keys.npy", np.frombuffer(b"".join(keys), dtype="V16"), allow_pickle=False)
    (partial / "meta.json").write_text(to_json({**meta, **facts}, indent=None))
    partial.rename(folder)
    return LogitCache(folder)


def _batches(rows: Sequence[Mapping[str, Any]], size: int) -> Iterable[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any] | None]]:
    """Token ids of up to ``size`` rows at a time, int64 [n, length], and their positions if the rows have them."""
    for start in range(0, len(rows), size):
        some = [rows[i] for i in range(start, min(start + size, len(rows)))]
        ids, positions = ([np.asarray(r[k], dtype=np.int64) for r in some if k in r] for k in ("input_ids", "position_ids"))
        yield np.stack(ids), np.stack(positions) if positions else None
