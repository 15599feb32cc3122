"""The source model beside the grown one: its losses on the named sets, and KL(source || model) on a few rows.

The source is in memory only while it computes. For KL its log-probabilities at those rows stay, which is rows * length * vocabulary * 4 bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def losses(model: PreTrainedModel, sets: Mapping[str, Any], collate: Any, batch: int) -> dict[str, float]:
    """Mean loss of each set in nats a token; computed as the trainer does, the mean over batches weighted by rows."""
    import torch

    model.eval()
    out = {}
    for name, rows in sets.items():
        total, count = 0.0, 0
        for start in range(0, len(rows), batch):
            inputs = collate([rows[i] for i in range(start, min(start + batch, len(rows)))])
            with torch.no_grad():
                found = model(**{k: v.to(model.device) for k, v in inputs.items()}, use_cache=False)
            total += float(found.loss) * len(inputs["input_ids"])
            count += len(inputs["input_ids"])
        out[name] = total / count
    return out


class SourceKL:
    """KL(source || model) in nats a token, averaged over all positions of some rows, summed over the vocabulary."""

    def __init__(self, source: PreTrainedModel, rows: Sequence[Mapping[str, Any]], collate: Any) -> None:
        self.inputs = [collate([row])["input_ids"] for row in rows]
        self.said = [self._log_probabilities(source, ids).cpu() for ids in self.inputs]

    @staticmethod
    def _log_probabilities(model: Any, ids: Tensor) -> Tensor:
        import torch

        with torch.no_grad():
            found: Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits.float().log_softmax(-1)
        return found

    def __call__(self, model: Any) -> float:
        was = model.training
        model.eval()
        total, count = 0.0, 0
        for ids, said in zip(self.inputs, self.said, strict=True):
            own = self._log_probabilities(model, ids)
            source = said.to(own.device)
            total += float((source.exp() * (source - own)).sum())
            count += ids.numel()
        model.train(was)
        return total / count
