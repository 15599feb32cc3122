"""What a training cost so far: FLOPs (of matrix products: model/flops.py) and tokens by purpose, of all processes together.

    train        forward and backward passes of the model that trains
    recompute    what a backward pass computes again: checkpointed activations, the scores of fused attention
    teacher      forward passes of teachers, also those whose logits are kept
    evaluation   forward passes that measure: named sets, contributions of blocks, the source as a baseline
    sampling     text for self-replay
    discarded    all of these that a rollback threw away

Each process adds what it computes; `collect` adds up all of them. Whole numbers throughout, so that nothing depends on the order of addition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hf_grow.model.flops import Batch, Cost, ModelFlops, Window, row_pairs, skips_masked_pairs

if TYPE_CHECKING:
    from accelerate import Accelerator

PURPOSES = ("train", "recompute", "teacher", "evaluation", "sampling", "discarded")
TRAINING = ("train", "teacher")
"""What a step needs, however it is computed: the FLOPs of a training that logs and results name."""
MEASURES = ("flops", "tokens")
_HALF = 2**31
Counts = dict[str, dict[str, int]]


class Ledger:
    """Whole numbers by measure and purpose."""

    def __init__(self) -> None:
        self._collected, self._own = _zeros(), _zeros()

    def add(self, purpose: str, flops: int = 0, *, tokens: int = 0) -> None:
        """Adds what this process computed."""
        for measure, count in zip(MEASURES, (flops, tokens), strict=True):
            self._own[measure][purpose] += count

    def collect(self, sum_over_processes: Callable[[Sequence[int]], Sequence[int]]) -> None:
        """Adds up what all processes computed since the last call, which all of them must make."""
        places = [(m, p) for m in MEASURES for p in PURPOSES]
        for (m, p), count in zip(places, sum_over_processes([self._own[m][p] for m, p in places]), strict=True):
            self._collected[m][p] += count
        self._own = _zeros()

    def by_purpose(self, measure: str = "flops") -> dict[str, int]:
        """As of the last `collect`, without purposes that took none."""
        return {p: n for p, n in self._collected[measure].items() if n}

    @property
    def training(self) -> int:
        """FLOPs of TRAINING."""
        return sum(self._collected["flops"][p] for p in TRAINING)

    @property
    def total(self) -> int:
        """FLOPs of everything."""
        return sum(self._collected["flops"].values())

    def to_json(self) -> Counts:
        """What `load` takes: as of the last `collect`."""
        return {m: self.by_purpose(m) for m in MEASURES if self.by_purpose(m)}

    def load(self, saved: Mapping[str, Mapping[str, int]]) -> None:
        """Restores what `to_json` returned. What this process has added since the last `collect` is kept."""
        self._collected = {m: {p: int(saved.get(m, {}).get(p, 0)) for p in PURPOSES} for m in MEASURES}

    def roll_back(self, saved: Mapping[str, Mapping[str, int]]) -> None:
        """As `load`, and what was spent since counts as discarded."""
        spent = {m: sum(self._collected[m].values()) for m in MEASURES}
        self.load(saved)
        for m, total in spent.items():
            self._collected[m]["discarded"] += total - sum(self._collected[m].values())


def _zeros() -> Counts:
    return {m: dict.fromkeys(PURPOSES, 0) for m in MEASURES}


def sum_over_processes(accelerator: Accelerator, counts: Sequence[int]) -> list[int]:
    """Exact sums over all processes, of whole numbers below 2^93."""
    if accelerator.num_processes == 1:
        return list(counts)
    import torch

    digits = [(n // _HALF**2, n // _HALF % _HALF, n % _HALF) for n in counts]  # sums of many still fit 64 bits
    summed = accelerator.reduce(torch.tensor(digits, dtype=torch.int64, device=accelerator.device), reduction="sum")
    return [int(a) * _HALF**2 + int(b) * _HALF + int(c) for a, b, c in summed.tolist()]


@dataclass(frozen=True)
class TrainerFlops:
    """What a trainer's passes over a batch cost."""

    model: ModelFlops
    attention: str
    """The implementation."""
    teachers: Cost = field(default_factory=Cost)
    """Forward passes of teachers in memory."""

    @property
    def windows(self) -> frozenset[Window]:
        return self.model.windows | frozenset(self.teachers.pair)

    def batch(self, inputs: Mapping[str, Any]) -> Batch:
        """The positions of a batch, padding included, and the pairs whose scores are computed; where documents decide, as tensors."""
        return batch_of(inputs, self.attention, self.windows)

    def training(self, batch: Batch) -> int:
        """FLOPs of TRAINING on a batch."""
        return self.model.train.of(batch) + self.teachers.of(batch)

    def evaluated(self, ledger: Ledger, inputs: Mapping[str, Any]) -> None:
        """Books one forward pass that measures something."""
        self.spend(ledger, Batch(), self.batch(inputs))

    def spend(self, ledger: Ledger, trained: Batch, evaluated: Batch) -> None:
        """Books passes over these batches."""
        trained, evaluated = on_host(trained), on_host(evaluated)
        ledger.add("train", self.model.train.of(trained), tokens=trained.tokens)
        ledger.add("recompute", self.model.recompute.of(trained))
        ledger.add("evaluation", self.model.forward.of(evaluated), tokens=evaluated.tokens)
        if self.teachers != Cost():
            ledger.add("teacher", self.teachers.of(trained), tokens=trained.tokens)


def batch_of(inputs: Mapping[str, Any], attention: str, windows: frozenset[Window]) -> Batch:
    """What `Cost.of` needs to know of a model's inputs."""
    rows, length = inputs["input_ids"].shape
    if not skips_masked_pairs(attention) or not {"position_ids", "attention_mask"} & inputs.keys():
        return Batch(rows * length, row_pairs(rows, length, windows, attention))
    reach = inputs["position_ids"] + 1 if "position_ids" in inputs else inputs["attention_mask"].cumsum(-1) * inputs["attention_mask"]
    # Each position attends to those before it in its document, and to itself. Summed on the device, read when the ledger is.
    return Batch(rows * length, {w: (reach if w is None else reach.clamp(max=w)).sum() for w in windows})


def on_host(batch: Batch) -> Batch:
    """The same as numbers."""
    return Batch(batch.tokens, {w: int(n) for w, n in batch.pairs.items()})
