"""From options to a penalty on one model."""

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
    full_tensor,
    model_fingerprint,
    open_importance,
    sample_values,
)
from hf_grow.training.regularizers.penalty import STORAGE_DTYPES, Penalty, QuadraticPenalty
from hf_grow.training.regularizers.si import SynapticIntelligence
from hf_grow.training.regularizers.source_coordinates import SourceCoordinatePenalty

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_grow.training.param_updates.param_provenance import Mask


def make_penalty(options: PenaltyOptions, model: PreTrainedModel, plan: GrowthPlan | None = None) -> Penalty | None:
    """The penalty that holds `model` near its present weights; None for kind none.

    ``model`` is bare (not wrapped, no adapters), with the weights that training starts from: also where a run is resumed, make it before
    the checkpoint is loaded. ``plan``: of a grown model; for `over: inherited` and `collapsed`. Raises InputError for a Fisher that is
    missing, damaged or of another model.
    """
    if options.kind == "none":
        return None
    where = parameter_map(model)
    storage = STORAGE_DTYPES[options.storage]
    files = [open_importance(f) for f in options.fisher]
    if options.collapsed:
        return _source_coordinate_penalty(options, model, plan, where, files[0])
    shapes = _shapes(model, where)
    identity = model_fingerprint(model) if files else None
    for i, file in enumerate(files):
        # Of several tasks, only the newest Fisher was taken where training starts.
        check_same_model(file, shapes, identity if i == len(files) - 1 else None)
    masks = _masks(options, model, plan)
    anchors = {n: full_tensor(p.detach()).to(storage, copy=True) for n, p in parameters(model).items()}
    proximal = options.form == "proximal"
    if options.kind == "si":
        importance = _importance_reader(files, 1.0, model, where, masks) if files else None
        collect = not files or options.consolidate_every is not None
        return SynapticIntelligence(
            options.lambda_, anchors, importance, xi=options.xi, every=options.consolidate_every, collect=collect,
            proximal=proximal, storage=storage,
        )  # fmt: skip
    if options.kind == "l2sp":
        even = _mean_importance(files[0]) if files else 1.0
        return QuadraticPenalty(
            "l2sp", options.lambda_, anchors, lambda n: _masked_scalar(even, masks.get(n, False)),
            proximal=proximal, storage=storage, even=options.over == "all",
        )  # fmt: skip
    read = _importance_reader(files, options.decay, model, where, masks)
    return QuadraticPenalty(options.kind, options.lambda_, anchors, read, proximal=proximal, storage=storage)


def penalty_bytes(options: PenaltyOptions, model: PreTrainedModel, plan: GrowthPlan | None = None) -> int:
    """What the penalty will hold, from shapes alone (a model on the meta device will do), all processes together."""
    one = int(STORAGE_DTYPES[options.storage].itemsize)
    count: int = sum(p.numel() for p in model.parameters())
    if options.kind == "none":
        return 0
    if options.collapsed and plan is not None:
        return 2 * one * sum(math.prod(t.shape) for t in plan.source.tensors.values())
    if options.kind == "l2sp" and options.over == "all":
        return one * count
    collects = options.kind == "si" and (not options.fisher or options.consolidate_every is not None)
    return (2 * one + (16 if collects else 0)) * count


def _shapes(model: PreTrainedModel, where: Mapping[str, ParameterRows]) -> dict[str, tuple[int, ...]]:
    meta = {bare(n): torch.empty(p.shape, device="meta") for n, p in model.named_parameters()}
    return {n: tuple(place.of(meta[place.parameter]).shape) for n, place in where.items()}


def _importance_reader(
    files: list[ImportanceFile], decay: float, model: PreTrainedModel, where: Mapping[str, ParameterRows], masks: Mapping[str, Mask]
) -> Callable[[str], Tensor]:
    """F of one parameter in memory, read when it is asked for: older tasks count less by `decay` (Schwarz et al. 2018, arXiv 1805.06370)."""
    shapes = {bare(n): p.shape for n, p in model.named_parameters()}
    members: dict[str, list[str]] = {}
    for name, place in where.items():
        members.setdefault(place.parameter, []).append(name)

    def read(parameter: str) -> Tensor:
        whole = torch.zeros(shapes[parameter])
        for name in members[parameter]:
            part = where[name].of(whole)
            for file in files:
                part.mul_(decay).add_(file.read(name))
        mask = masks.get(parameter, False)
        return whole if mask is False else whole.masked_fill_(torch.as_tensor(mask), 0.0)

    return read


def _masks(options: PenaltyOptions, model: PreTrainedModel, plan: GrowthPlan | None) -> dict[str, Mask]:
    if options.over == "all":
        return {}
    if plan is None:
        raise InputError("over: inherited needs to know what is new, and the model has no growth.json.", hint="Use over: all.")
    return new_masks(model, plan)


def _masked_scalar(value: float, mask: Mask) -> Tensor | float:
    if isinstance(mask, bool):
        return 0.0 if mask else value
    return torch.where(mask, 0.0, value)


def _mean_importance(file: ImportanceFile) -> float:
    total = sum(float(file.read(n).double().sum()) for n in file.shapes)
    return total / sum(math.prod(s) for s in file.shapes.values())


def _source_coordinate_penalty(
    options: PenaltyOptions, model: PreTrainedModel, plan: GrowthPlan | None, where: Mapping[str, ParameterRows], fisher: ImportanceFile
) -> Penalty:
    if plan is None:
        raise InputError("collapsed needs the growth plan, and the model has no growth.json.", hint="Leave collapsed out.")
    held = parameters(model)
    weights = {n: place.of(full_tensor(held[place.parameter].detach())) for n, place in where.items()}
    penalty = SourceCoordinatePenalty(options.lambda_, plan, weights, where, fisher, storage=STORAGE_DTYPES[options.storage])
    shapes = {n: tuple(s) for n, s in penalty.shapes.items()}
    check_same_model(fisher, shapes, encode_samples({n: sample_values(a) for n, a in penalty.anchors.items()}), close=True)
    return penalty
