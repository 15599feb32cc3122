"""Builds the penalty of a recipe's `regularizer` section for one model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_grow.errors import InputError
from hf_grow.growth.plan import GrowthPlan
from hf_grow.training.config.regularizer_options import PenaltyOptions
from hf_grow.training.param_updates.param_provenance import new_masks
from hf_grow.training.param_updates.parameter_map import ParameterRows, bare, parameter_map, parameters
from hf_grow.training.regularizers.importance_file import (
    ImportanceFile,
    check_same_model,
    encode_samples,
    model_fingerprint,
    open_importance,
    rows_fingerprint,
    sample_values,
)
from hf_grow.training.regularizers.penalty import STORAGE_DTYPES, Penalty, QuadraticPenalty
from hf_grow.training.regularizers.sharding import full_tensor
from hf_grow.training.regularizers.si import SynapticIntelligence
from hf_grow.training.regularizers.source_coordinates import SourceCoordinatePenalty

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_grow.training.param_updates.param_provenance import Mask
    from hf_grow.training.sharding.row_source import RowSource


def make_penalty(
    options: PenaltyOptions, model: PreTrainedModel, plan: GrowthPlan | None = None, weights: RowSource | None = None
) -> Penalty | None:
    """The penalty anchored at the current weights of ``model``; None for kind none.

    Args:
        options: the `regularizer` section.
        model: not wrapped, without adapters, with the weights that training starts from (on resume, before the checkpoint is loaded).
        plan: of a grown model, for `over: inherited` and `collapsed`.
        weights: of a model on the meta device; its anchors are those of `Penalty.take_anchors`.

    Raises InputError for a Fisher that is missing, damaged or of another model.
    """
    if options.kind == "none":
        return None
    files = [open_importance(f) for f in options.fisher]
    rows = parameter_map(model)
    storage = STORAGE_DTYPES[options.storage]
    if options.collapsed:
        return _source_coordinate_penalty(options, model, plan, rows, files[0])
    shapes = _shapes_on_disk(model, rows)
    fingerprint = None
    if files:
        fingerprint = model_fingerprint(model) if weights is None else rows_fingerprint(weights, rows)
    for i, file in enumerate(files):
        # Of several tasks, only the newest Fisher was estimated at the weights that training starts from.
        check_same_model(file, shapes, fingerprint if i == len(files) - 1 else None)
    free = _free_masks(options, model, plan)
    anchors = {n: full_tensor(p.detach()).to(dtype=storage, copy=True) for n, p in parameters(model).items()}
    proximal = options.form == "proximal"
    if options.kind == "si":
        importance = _importance_reader(files, 1.0, model, rows, free) if files else None
        collect = not files or options.consolidate_every is not None
        return SynapticIntelligence(
            options.lambda_, anchors, importance, xi=options.xi, every=options.consolidate_every, collect=collect,
            proximal=proximal, storage=storage,
        )  # fmt: skip
    if options.kind == "l2sp":
        mean = _mean_importance(files[0]) if files else 1.0
        return QuadraticPenalty(
            "l2sp", options.lambda_, anchors, lambda n: _masked_scalar(mean, free.get(n, False)),
            proximal=proximal, storage=storage, scalar_importance=options.over == "all",
        )  # fmt: skip
    importance = _importance_reader(files, options.decay, model, rows, free)
    return QuadraticPenalty(options.kind, options.lambda_, anchors, importance, proximal=proximal, storage=storage)


def penalty_bytes(options: PenaltyOptions, model: PreTrainedModel, plan: GrowthPlan | None = None) -> int:
    """Bytes that the penalty will hold for the whole model, from shapes alone (``model`` may be on the meta device)."""
    width = int(STORAGE_DTYPES[options.storage].itemsize)
    count: int = sum(p.numel() for p in model.parameters())
    if options.kind == "none":
        return 0
    if options.collapsed and plan is not None:
        return 2 * width * sum(math.prod(t.shape) for t in plan.source.tensors.values())
    if options.kind == "l2sp" and options.over == "all":
        return width * count
    tracks_path = options.kind == "si" and (not options.fisher or options.consolidate_every is not None)
    return (2 * width + (16 if tracks_path else 0)) * count


def _shapes_on_disk(model: PreTrainedModel, rows: Mapping[str, ParameterRows]) -> dict[str, tuple[int, ...]]:
    meta = {bare(n): torch.empty(p.shape, device="meta") for n, p in model.named_parameters()}
    return {n: tuple(r.of(meta[r.parameter]).shape) for n, r in rows.items()}


def _importance_reader(
    files: list[ImportanceFile], decay: float, model: PreTrainedModel, rows: Mapping[str, ParameterRows], free: Mapping[str, Mask]
) -> Callable[[str], Tensor]:
    """A function from a parameter's name to its F, read on call.

    Each older file counts ``decay`` times as much as the next (online EWC, Schwarz et al. 2018, arXiv 1805.06370); F is 0 where ``free`` is true.
    """
    shapes = {bare(n): p.shape for n, p in model.named_parameters()}
    on_disk: dict[str, list[str]] = {}
    for name, r in rows.items():
        on_disk.setdefault(r.parameter, []).append(name)

    def read(parameter: str) -> Tensor:
        fisher = torch.zeros(shapes[parameter])
        for name in on_disk[parameter]:
            part = rows[name].of(fisher)
            for file in files:
                part.mul_(decay).add_(file.read(name))
        mask = free.get(parameter, False)
        return fisher if mask is False else fisher.masked_fill_(torch.as_tensor(mask), 0.0)

    return read


def _free_masks(options: PenaltyOptions, model: PreTrainedModel, plan: GrowthPlan | None) -> dict[str, Mask]:
    """Entries without a penalty, by parameter."""
    if options.over == "all":
        return {}
    if plan is None:
        raise InputError("over: inherited needs growth.json, and the model has none.", hint="Use over: all.")
    return new_masks(model, plan)


def _masked_scalar(value: float, free: Mask) -> Tensor | float:
    if isinstance(free, bool):
        return 0.0 if free else value
    return torch.where(free, 0.0, value)


def _mean_importance(file: ImportanceFile) -> float:
    total = sum(float(file.read(n).double().sum()) for n in file.shapes)
    return total / sum(math.prod(s) for s in file.shapes.values())


def _source_coordinate_penalty(
    options: PenaltyOptions, model: PreTrainedModel, plan: GrowthPlan | None, rows: Mapping[str, ParameterRows], fisher: ImportanceFile
) -> Penalty:
    if plan is None:
        raise InputError("collapsed needs growth.json, and the model has none.", hint="Remove collapsed.")
    params = parameters(model)
    weights = {n: r.of(full_tensor(params[r.parameter].detach())) for n, r in rows.items()}
    penalty = SourceCoordinatePenalty(options.lambda_, plan, weights, rows, fisher, storage=STORAGE_DTYPES[options.storage])
    fingerprint = encode_samples({n: sample_values(a) for n, a in penalty.anchors.items()})
    check_same_model(fisher, penalty.shapes, fingerprint, computed=True)
    return penalty
