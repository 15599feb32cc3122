"""Distillation teachers: models in memory, or cached on disk: top-k logits, or draws from their distribution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_grow.checkpoint.source import open_source
from hf_grow.errors import InputError
from hf_grow.model.flops import Cost, count_flops
from hf_grow.training.config.distill_options import DistillOptions
from hf_grow.training.distillation.distill import Distiller, ModelTeacher
from hf_grow.training.distillation.logit_cache import write_logit_cache
from hf_grow.training.distributed.launch import current_launch
from hf_grow.training.setup.model_setup import frozen_model, load_model
from hf_grow.training.setup.option_checks import resolve_teacher
from hf_grow.training.setup.train_setup import Notify, TrainSetup
from hf_grow.training.trainer.ledger import Ledger, batch_of, on_host


def make_distiller(setup: TrainSetup, data: Any, ledger: Ledger, notify: Notify) -> tuple[Distiller | None, Cost, list[dict[str, Any]]]:
    """Returns the distiller, what a forward pass of the teachers in memory costs, and the facts of one event per teacher."""
    options = setup.options.distill
    if options is None:
        return None, Cost(), []
    teachers: list[Any] = []
    cost, events = Cost(), []
    for i, teacher in enumerate(options.teachers):
        ref, revision = resolve_teacher(teacher, setup.plan)
        if not options.cached:
            attention = setup.options.attn_implementation
            teachers.append(ModelTeacher(*frozen_model(ref, revision, options.dtype, attention, notify, sharded=_sharded(options))))
            cost += count_flops(open_source(ref, revision=revision, weights=False).info.config).forward
            events.append({"model": ref, "cache": "", "covered": 1.0})
            continue
        folder = _cache_folder(options, setup.out, i)
        cache = _logit_cache(setup, options, i, data, folder, ledger, notify)
        teachers.append(cache)
        events.append({"model": ref, "cache": str(folder), "covered": cache.meta.get("covered")})
    return Distiller(options, teachers), cost, events


def _sharded(options: DistillOptions) -> bool:
    return current_launch().sharing == "fsdp2" if options.shard is None else options.shard


def _cache_folder(options: DistillOptions, out: Path, number: int) -> Path:
    return (Path(options.cache) if options.cache else out / "teacher-logits") / f"teacher-{number}"


def _logit_cache(setup: TrainSetup, options: DistillOptions, number: int, data: Any, folder: Path, ledger: Ledger, notify: Notify) -> Any:
    if not hasattr(data.train, "__len__"):
        raise InputError(
            f"distill.{options.cached} does not work with a streamed dataset: the teacher's logits are computed before the training.",
            hint=f"Remove {options.cached}.",
        )
    ref, revision = resolve_teacher(options.teachers[number], setup.plan)
    source = open_source(ref, revision=revision, weights=False)
    identity = f"{ref}@{revision or ''} {sorted((f, str(sorted(facts.items()))) for f, facts in source.files.items())}"
    if not folder.is_dir():
        what = f"{options.samples} draws from its distribution" if options.samples else f"its {options.top_k} largest logits"
        notify(f"{ref} is run on the training text; {what} per position are written to {folder}.")
    model = load_model(ref, revision, options.dtype, setup.options.attn_implementation, notify)
    model.to(setup.arguments.device)
    rows = Collated(data.train, data.collator)
    new = not folder.is_dir()
    cache = write_logit_cache(
        model, rows, folder, top_k=options.top_k, dtype=options.cache_dtype, samples=options.samples, temperature=options.temperature,
        seed=number, identity=identity,
    )  # fmt: skip
    if new:
        cost, attention = count_flops(source.info.config).forward, model.config._attn_implementation
        for row in data.train:
            batch = on_host(batch_of(data.collator([row]), attention, frozenset(cost.pair)))
            ledger.add("teacher", cost.of(batch), tokens=batch.tokens)
    return cache


@dataclass(frozen=True)
class Collated(Sequence[Mapping[str, Any]]):
    """Rows with the input ids (and positions) that the trainer sees: padded by the collator."""

    rows: Any
    collate: Any

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        batch = self.collate([self.rows[int(index)]])
        return {k: batch[k][0].numpy() for k in ("input_ids", "position_ids") if k in batch}
