"""Builds the penalty of a recipe's `regularizer` section for one model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_grow.errors import InputError
from hf_grow.growth.plan import GrowthPlan
from hf_grow.training.config.regularizer_options import PenaltyOptions
from hf_grow.training.param_updates.param_provenance import new_masks
from hf_grow.training.param_updates.parameter_map import ParameterRows, parameter_map, parameters, shapes_on_disk
from hf_grow.training.param_updates.selection import Selection
from hf_grow.training.param_updates.shards import as_sharded, local
from hf_grow.training.regularizers.importance_file import (
    DecayedImportances,
    ImportanceFile,
    check_same_model,
    encode_samples,
    model_fingerprint,
    open_importance,
    rows_fingerprint,
    sample_values,
)
from hf_grow.training.regularizers.origin import PenaltyOrigin
from hf_grow.training.regularizers.penalty import STORAGE_DTYPES, Penalty, QuadraticPenalty
from hf_grow.training.regularizers.si import SynapticIntelligence
from hf_grow.training.regularizers.source_coordinates import SourceCoordinatePenalty, whole_parameters
from hf_grow.training.sharding.local_rows import by_parameter, local_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_grow.training.param_updates.masks import Mask
    from hf_grow.training.sharding.row_source import RowSource


def make_penalty(
    options: PenaltyOptions,
    model: PreTrainedModel,
    plan: GrowthPlan | None = None,
    weights: RowSource | None = None,
    origin: PenaltyOrigin | None = None,
) -> Penalty | None:
    """The penalty anchored at the current weights of ``model``; None for kind none.

    Args:
        options: the `regularizer` section.
        model: not wrapped, without adapters, with the weights that training starts from (on resume, before the checkpoint is loaded).
        plan: of a grown model, for `over: inherited` and `collapsed`.
        weights: of a model on the meta device; its anchors are those of `Penalty.take_anchors`.
        origin: of a model that was grown at load, or in stages of one run: anchors and importances of the smaller model are grown as they are read.

    Raises InputError for a Fisher that is missing, damaged or of another model.
    """
    if options.kind == "none":
        return None
    files = [open_importance(f) for f in options.fisher]
    importances: list[RowSource] = [*files]
    rows = parameter_map(model)
    storage = STORAGE_DTYPES[options.storage]
    if options.collapsed:
        return _source_coordinate_penalty(options, model, plan, rows, files[0])
    shapes = shapes_on_disk(model, rows)
    fingerprint = None
    if files:
        fingerprint = model_fingerprint(model) if weights is None else rows_fingerprint(weights, rows)
    for i, file in enumerate(files):
        # Of several tasks, only the newest Fisher was estimated at the weights that training starts from.
        newest = i == len(files) - 1
        if origin is not None and origin.holds(file):
            importances[i] = origin.grown_importances(file, newest)
        else:
            first = origin is not None and not origin.plans and file.metadata["sample"] == rows_fingerprint(origin.weights, rows)
            check_same_model(file, shapes, fingerprint if newest and not first else None)
    free = _free_masks(options, model, plan)
    anchors = {n: p.detach().to(dtype=storage, copy=True) for n, p in parameters(model).items()}
    proximal = options.form == "proximal"
    penalty: QuadraticPenalty
    if options.kind == "si":
        importance = _importance_reader(DecayedImportances(importances), rows, free, storage) if files else None
        collect = not files or options.consolidate_every is not None
        penalty = SynapticIntelligence(
            options.lambda_, anchors, importance, xi=options.xi, every=options.consolidate_every, collect=collect,
            proximal=proximal, storage=storage,
        )  # fmt: skip
    elif options.kind == "l2sp":
        mean = _mean_importance(importances[0]) if files else 1.0
        penalty = QuadraticPenalty(
            "l2sp", options.lambda_, anchors, lambda n, p: _masked_scalar(mean, free.get(n, False), p),
            proximal=proximal, storage=storage, scalar_importance=options.over == "all",
        )  # fmt: skip
    else:
        importance = _importance_reader(DecayedImportances(importances, options.decay), rows, free, storage)
        penalty = QuadraticPenalty(options.kind, options.lambda_, anchors, importance, proximal=proximal, storage=storage)
    if origin is not None and (anchor_rows := origin.anchors()) is not None:
        places = by_parameter(rows)
        penalty.read_anchor = lambda n, p: local_tensor(p, places[n], anchor_rows, p.dtype, local(p).device)
        if weights is None:
            penalty.take_anchors(model)
    return penalty


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


def _importance_reader(
    source: RowSource, rows: Mapping[str, ParameterRows], free: Mapping[str, Mask], storage: torch.dtype
) -> Callable[[str, nn.Parameter], Tensor]:
    """A function from a parameter, by its name, to its F: each process reads the rows of its own shard. F is 0 where ``free`` is true."""
    places = by_parameter(rows)

    def read(name: str, p: nn.Parameter) -> Tensor:
        fisher = local_tensor(p, places[name], source, storage, local(p).device)
        mask = free.get(name, False)
        if mask is True:
            local(fisher).zero_()
        elif mask is not False:
            Selection(mask.local(p), local(p).device).fill(local(fisher), 0.0)
        return fisher

    return read


def _free_masks(options: PenaltyOptions, model: PreTrainedModel, plan: GrowthPlan | None) -> dict[str, Mask]:
    """Entries without a penalty, by parameter."""
    if options.over == "all":
        return {}
    if plan is None:
        raise InputError("over: inherited needs growth.json, and the model has none.", hint="Use over: all.")
    return new_masks(model, plan)


def _masked_scalar(value: float, free: Mask, p: nn.Parameter) -> Tensor | float:
    if isinstance(free, bool):
        return 0.0 if free else value
    part = torch.full(local(p).shape, value, device=local(p).device)
    Selection(free.local(p), part.device).fill(part, 0.0)
    return as_sharded(part, p)


def _mean_importance(source: RowSource) -> float:
    total = sum(float(source.rows(n, 0, source.shape(n)[0]).double().sum()) for n in source.names())
    return total / sum(math.prod(source.shape(n)) for n in source.names())


def _source_coordinate_penalty(
    options: PenaltyOptions, model: PreTrainedModel, plan: GrowthPlan | None, rows: Mapping[str, ParameterRows], fisher: ImportanceFile
) -> Penalty:
    if plan is None:
        raise InputError("collapsed needs growth.json, and the model has none.", hint="Remove collapsed.")
    params = whole_parameters(model)
    weights = {n: r.of(params[r.parameter].detach()) for n, r in rows.items()}
    penalty = SourceCoordinatePenalty(options.lambda_, plan, weights, rows, fisher, storage=STORAGE_DTYPES[options.storage])
    fingerprint = encode_samples(sample_values({n: (a, None) for n, a in penalty.anchors.items()}))
    check_same_model(fisher, penalty.shapes, fingerprint, computed=True)
    return penalty
