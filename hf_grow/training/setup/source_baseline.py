"""The source of the growth as a baseline: its losses on the named sets, and KL(source || model) on a few rows.

After a lossless growth the grown model before training is the same baseline; after any other growth the source is loaded and evaluated. It is in
memory only for that; for KL its log-probabilities on those rows are kept: rows * length * vocabulary * 4 bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hf_grow.checkpoint.source import open_source
from hf_grow.errors import GrowError, SourceError
from hf_grow.model.flops import count_flops
from hf_grow.training.config.distill_options import Teacher
from hf_grow.training.data.document_masking import forward_arguments
from hf_grow.training.distillation.distill import check_teacher
from hf_grow.training.distributed.launch import current_launch
from hf_grow.training.setup.model_setup import frozen_model
from hf_grow.training.setup.option_checks import resolve_teacher
from hf_grow.training.setup.train_setup import Notify, TrainSetup
from hf_grow.training.sharding.sharded_model import shard_frozen
from hf_grow.training.trainer.ledger import Ledger, TrainerFlops

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, TrainingArguments

    from hf_grow.training.data import TrainData
    from hf_grow.training.trainer.events import EventLog


def measure_source(
    setup: TrainSetup, data: TrainData, events: EventLog, ledger: Ledger, notify: Notify, accelerator: Any, *, resumed: bool
) -> tuple[dict[str, float], SourceKL | None]:
    """Loads the source model temporarily if its losses on the named sets or its distribution are needed; returns both.

    Under FSDP2 it is sharded as the model is (`shard_frozen`). ``resumed``: the losses are in the checkpoint. Raises InputError where the options name the source and it cannot be loaded.
    """
    options, arguments = setup.options, setup.arguments
    wanted = options.monitor.baseline
    changed = setup.plan is not None and not setup.plan.guarantee.lossless
    measured = bool(data.evals) and not resumed and (wanted == "source" or (wanted == "auto" and changed))
    if not (options.kl_rows or measured):
        return {}, None
    ref, revision = resolve_teacher(Teacher(), setup.plan)
    try:
        if wanted == "auto" and not options.kl_rows:
            _check_source(setup, ref, revision)
        sharded = current_launch().sharing == "fsdp2"
        source, weights = frozen_model(ref, revision, "auto", options.attn_implementation, notify, sharded=sharded)
    except GrowError as error:
        if wanted == "source" or options.kl_rows:
            raise
        notify(f"The source cannot be evaluated: {error.message} The baseline of forgetting is the grown model before training.")
        return {}, None
    if weights is None:
        source.to(arguments.device)
    else:
        shard_frozen(source, weights, accelerator)
    flops = TrainerFlops(count_flops(source.config.to_dict()), source.config._attn_implementation)

    def seen(inputs: Mapping[str, Any]) -> None:
        flops.evaluated(ledger, inputs)

    losses: dict[str, float] = {}
    if measured:
        losses = mean_losses(source, data.evals, data.collator, arguments, seen)
        events.write("baseline", 0, losses=losses, of=ref)
    if not options.kl_rows:
        return losses, None
    old = data.evals[options.old_set]
    kl = SourceKL(source, [old[i] for i in range(min(options.kl_rows, len(old)))], data.collator, arguments.device)
    for inputs in kl.inputs:
        seen(inputs)
    return losses, kl


def _check_source(setup: TrainSetup, ref: str, revision: str | None) -> None:
    """Raises SourceError if the checkpoint at `ref` is not the source of the growth, judging by headers and file sizes."""
    assert setup.plan is not None
    if current_launch().deepspeed:
        raise SourceError("DeepSpeed shards every model that is loaded.")
    source = open_source(ref, revision=revision, weights=False)
    if dict(source.info.by_key) != dict(setup.plan.source.by_key):
        raise SourceError(f"{ref} is not the checkpoint that was grown.")
    check_teacher(ref, source.info.architecture.size("vocab"), setup.vocabulary, None)


def mean_losses(
    model: PreTrainedModel,
    sets: Mapping[str, Any],
    collate: Any,
    arguments: TrainingArguments,
    seen: Callable[[Mapping[str, Any]], None] = lambda inputs: None,
) -> dict[str, float]:
    """Mean loss of each set in nats per token, as Trainer computes it: over the tokens of a batch of all processes, then over batches by their rows.

    ``seen`` gets every batch.
    """
    import torch

    model.eval()
    batch, out = arguments.per_device_eval_batch_size, {}
    for name, rows in sets.items():
        total = 0.0
        for start in range(0, len(rows), batch * arguments.world_size):
            stop = min(start + batch * arguments.world_size, len(rows))
            parts = [collate([rows[i] for i in range(at, min(at + batch, stop))]) for at in range(start, stop, batch)]
            tokens = sum(int((part["labels"][:, 1:] != -100).sum()) for part in parts)
            for part in parts:
                inputs = {k: v.to(arguments.device) for k, v in part.items()}
                inputs |= {"use_cache": False, "num_items_in_batch": tokens, **forward_arguments(model.config, inputs.get("position_ids"))}
                seen(part)
                with torch.no_grad():
                    total += float(model(**inputs).loss) * (stop - start)
        out[name] = total / len(rows)
    return out


class SourceKL:
    """KL(source || model) in nats per token: summed over the vocabulary, averaged over all positions of some rows."""

    def __init__(self, source: PreTrainedModel, rows: Sequence[Mapping[str, Any]], collate: Any, device: Any) -> None:
        self.device = device
        self.inputs = [{k: v for k, v in collate([row]).items() if k in ("input_ids", "position_ids")} for row in rows]
        self.source_log_probs = [self._log_probs(source, inputs).cpu() for inputs in self.inputs]

    def _log_probs(self, model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        import torch

        own = {k: v.to(self.device) for k, v in inputs.items()}
        with torch.no_grad():
            logits: Tensor = model(**{**own, "use_cache": False, **forward_arguments(model.config, own.get("position_ids"))}).logits
        return logits.float().log_softmax(-1)

    def __call__(self, model: Any) -> float:
        was_training = model.training
        model.eval()
        total, count = 0.0, 0
        for inputs, log_probs in zip(self.inputs, self.source_log_probs, strict=True):
            own = self._log_probs(model, inputs)
            source = log_probs.to(own.device)
            total += float((source.exp() * (source - own)).sum())
            count += inputs["input_ids"].numel()
        model.train(was_training)
        return total / count
