"""The source model beside the grown one: its losses on the named sets, and KL(source || model) on a few rows.

What a model forgot is what its source knew. A lossless growth begins with that; after one that changed the function the first evaluation is of a
model that has lost some already, so there the source is evaluated too. Where it cannot be had, that is told and recorded.

The source is in memory only while it computes. For KL its log-probabilities at those rows stay, which is rows * length * vocabulary * 4 bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hf_grow.checkpoint.source import open_source
from hf_grow.errors import GrowError, SourceError
from hf_grow.training.config.distill_options import Teacher
from hf_grow.training.distillation.distill import check_teacher
from hf_grow.training.distributed.launch import current_launch
from hf_grow.training.setup.checks import resolve
from hf_grow.training.setup.prepare import load_model
from hf_grow.training.setup.train_setup import Notify, TrainSetup

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from hf_grow.training.data import TrainData
    from hf_grow.training.trainer.state import Growing


def beside_the_source(checked: TrainSetup, data: TrainData, growing: Growing, notify: Notify, *, resumed: bool) -> None:
    """Loads the source of the growth for a moment, where its losses or its distribution are asked for.

    ``resumed``: the losses are in the checkpoint. Raises InputError where the recipe names the source and it cannot be had.
    """
    recipe, arguments = checked.recipe, checked.arguments
    asked = recipe.monitor.baseline
    changed = checked.plan is not None and not checked.plan.guarantee.lossless
    measured = bool(data.evals) and not resumed and (asked == "source" or (asked == "auto" and changed))
    if not (recipe.kl_rows or measured):
        return
    ref, revision = resolve(Teacher(), checked.plan)
    try:
        if asked == "auto" and not recipe.kl_rows:
            _check_source(checked, ref, revision)
        source = load_model(ref, revision, "auto", recipe.attn_implementation, notify).to(arguments.device)
    except GrowError as error:
        if asked == "source" or recipe.kl_rows:
            raise
        notify(
            f"The source cannot be measured: {error.message} Forgetting is told against the grown model at its start, which the growth had changed already."
        )
        return
    if measured:
        growing.source_losses = losses(source, data.evals, data.collator, arguments.per_device_eval_batch_size)
        growing.events.write("baseline", 0, losses=growing.source_losses, of=ref)
    if recipe.kl_rows:
        old = data.evals[recipe.old_set]
        growing.kl = SourceKL(source, [old[i] for i in range(min(recipe.kl_rows, len(old)))], data.collator)


def _check_source(checked: TrainSetup, ref: str, revision: str | None) -> None:
    """Raises SourceError where what lies at the source's place is not the checkpoint that was grown, as far as headers and sizes tell."""
    assert checked.plan is not None
    if current_launch().deepspeed:
        raise SourceError("DeepSpeed cuts every model that is loaded.")
    held = open_source(ref, revision=revision, weights=False)
    if dict(held.info.by_key) != dict(checked.plan.source.by_key):
        raise SourceError(f"{ref} is not the checkpoint that was grown.")
    check_teacher(ref, held.info.architecture.size("vocab"), checked.vocabulary, None)


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
