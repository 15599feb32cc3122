"""Distillation from the previous stage: the source checkpoint teaches the grown model (Hinton et al. 2015, arXiv 1503.02531).

    L = (1 - alpha) CE + alpha T^2 sum_i w_i KL(p_i^T || q^T)        p^T = softmax(z / T), summed over the vocabulary, averaged over tokens

The teacher is in memory, or has spoken beforehand: its top-k logits at every position of the training rows lie on disk (plain .npy files,
memory-mapped), found again by a hash of the row, so that any order and mixture of rows will do. With a cache p is the softmax over the k kept
logits; with k = vocabulary nothing is left out.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_grow.common.safe_files import read_json, to_json
from hf_grow.errors import ExecutionError, InputError, SourceError
from hf_grow.training.config.distill_options import DistillOptions

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from transformers import PreTrainedModel

_FORMAT = 1


def check_teacher(name: str, vocabulary: int, own: int, same_words: bool | None) -> None:
    """Raises InputError if the logits of a teacher and of the model do not speak of the same tokens. `same_words` is None where unknown."""
    if vocabulary != own:
        raise InputError(
            f"Teacher {name} has a vocabulary of {vocabulary} tokens, the model one of {own}; their logits cannot be compared.",
            hint="Distil from a teacher with the same tokenizer, such as the source of the growth.",
        )
    if same_words is False:
        raise InputError(
            f"Teacher {name} has another tokenizer: the same numbers mean other tokens.", hint="Take one with the same tokenizer."
        )


class Distiller:
    """The teachers' part of the loss, for a batch; each is a function of input ids [B, L] to (logits [B, L, V or k], chosen [B, L, k] or None)."""

    def __init__(self, options: DistillOptions, teachers: Sequence[Callable[[Tensor], tuple[Tensor, Tensor | None]]]) -> None:
        total = sum(t.weight for t in options.teachers)
        self.alpha, self.temperature = options.alpha, options.temperature
        self.teachers = [(t.weight / total, speak) for t, speak in zip(options.teachers, teachers, strict=True)]

    def loss(self, logits: Tensor, input_ids: Tensor, labels: Tensor, tokens: Tensor | int | float | None) -> Tensor:
        """Summed over the positions that have a label and divided by `tokens`, or by their number here where that is None."""
        import torch

        from hf_grow.training.distillation.kl_divergence import summed_kl_divergence

        counted = torch.zeros_like(labels, dtype=torch.bool)
        counted[:, :-1] = labels[:, 1:] != -100
        total: Any = 0
        for weight, speak in self.teachers:
            said, chosen = speak(input_ids)
            total = total + weight * summed_kl_divergence(logits, said, self.temperature, counted, chosen)
            del said, chosen  # before the next one speaks
        found: Tensor = total / (counted.sum() if tokens is None else tokens)
        return found


def teacher_from_model(model: PreTrainedModel) -> Callable[[Tensor], tuple[Tensor, Tensor | None]]:
    """A teacher that computes; it is put where its first batch lies."""
    import torch

    model.eval().requires_grad_(False)

    def speak(ids: Tensor) -> tuple[Tensor, Tensor | None]:
        if model.device != ids.device:
            model.to(ids.device)
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits, None

    return speak


class LogitCache:
    """A teacher's top-k logits at every position of some rows: keys.npy [rows], logits.npy and chosen.npy [rows, length, k], meta.json."""

    def __init__(self, folder: Path) -> None:
        import numpy as np

        try:
            self.meta = read_json(folder / "meta.json")
            self.keys = np.load(folder / "keys.npy", allow_pickle=False)
            self.logits = np.load(folder / "logits.npy", mmap_mode="r", allow_pickle=False)
            self.chosen = np.load(folder / "chosen.npy", mmap_mode="r", allow_pickle=False)
        except (SourceError, OSError, ValueError) as error:
            raise InputError(
                f"The teacher's logits in {folder} cannot be read: {error}.", hint="Remove the folder; they are written again."
            ) from None
        self.folder = folder
        self.at = {bytes(key): i for i, key in enumerate(self.keys)}

    def __call__(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        import numpy as np
        import torch

        try:
            rows = [self.at[hash_row(row)] for row in ids.cpu().numpy()]
        except KeyError:
            raise ExecutionError(
                f"{self.folder} has no logits for a training row.", hint="The data changed since they were written: remove the folder."
            ) from None
        logits, chosen = np.stack([self.logits[r] for r in rows]), np.stack([self.chosen[r] for r in rows])
        return torch.from_numpy(logits).to(ids.device), torch.from_numpy(chosen).to(ids.device, torch.int64)


def hash_row(row: np.ndarray[Any, Any]) -> bytes:
    return hashlib.blake2b(row.astype("<i8").tobytes(), digest_size=16).digest()


def write_logit_cache(
    model: PreTrainedModel,
    rows: Sequence[Mapping[str, Any]],
    folder: Path,
    *,
    top_k: int,
    dtype: str,
    identity: str,
    batch: int = 8,
    progress: Callable[[int], None] = lambda rows: None,
) -> LogitCache:
    """Lets the teacher read all rows ({"input_ids": [length]}, all of one length) once. A folder that fits is taken as it is.

    Raises InputError for a folder of other rows or of another teacher (`identity` names it).
    """
    import numpy as np
    import torch

    k = min(top_k, model.config.vocab_size)
    rows_hash = hashlib.blake2b(digest_size=16)
    for batch_rows in _batches(rows, 256):
        rows_hash.update(batch_rows.astype("<i8").tobytes())
    meta = {"format": _FORMAT, "teacher": identity, "rows": len(rows), "top_k": k, "dtype": dtype, "data": rows_hash.hexdigest()}
    if folder.exists():
        found = LogitCache(folder)
        if {key: found.meta.get(key) for key in meta} == meta:
            return found
        raise InputError(f"{folder} holds logits of another teacher, data or setting.", hint="Remove it, or name another `distill.cache`.")
    length = len(rows[0]["input_ids"])
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    kinds = (("logits", np.dtype(dtype)), ("chosen", np.dtype(np.int32)))
    files = [np.lib.format.open_memmap(partial / f"{n}.npy", mode="w+", dtype=t, shape=(len(rows), length, k)) for n, t in kinds]
    keys, covered, at = [], 0.0, 0
    model.eval()
    for ids in _batches(rows, batch):
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(ids).to(model.device), use_cache=False).logits.float()
        top = logits.topk(k, dim=-1)
        covered += float((top.values.logsumexp(-1) - logits.logsumexp(-1)).exp().mean(-1).sum())
        files[0][at : at + len(ids)] = (top.values - top.values[..., :1]).cpu().numpy()
        files[1][at : at + len(ids)] = top.indices.cpu().numpy()
        keys += [hash_row(row) for row in ids]
        at += len(ids)
        progress(len(ids))
    for file in files:
        file.flush()
    np.save(partial / "keys.npy", np.frombuffer(b"".join(keys), dtype="V16"), allow_pickle=False)
    (partial / "meta.json").write_text(to_json({**meta, "covered": covered / len(rows)}, indent=None))
    partial.rename(folder)
    return LogitCache(folder)


def _batches(rows: Sequence[Mapping[str, Any]], size: int) -> Iterable[np.ndarray[Any, Any]]:
    import numpy as np

    for start in range(0, len(rows), size):
        yield np.stack([np.asarray(rows[i]["input_ids"], dtype=np.int64) for i in range(start, min(start + size, len(rows)))])
