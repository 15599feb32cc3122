"""Which parameters, and which of their rows, are new in a grown model, according to its growth plan.

New are entries without a source (routers, padding), later copies of a source entry (rows, heads, experts, whole layers), and every block that growth
added. The rest is inherited. Under AKI rows taken from the layer above are new as well.
Masks are by the names in memory: False where all of a parameter is inherited, True where all of it is new, else a RowMask.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hf_grow.checkpoint.reader import GROWTH
from hf_grow.common.safe_files import read_json
from hf_grow.errors import InputError
from hf_grow.growth.plan import GrowthPlan
from hf_grow.model.architecture import Architecture, Entry
from hf_grow.training.param_updates.masks import Mask, RowMask, both, either, inverse, product_mask, stacked_mask
from hf_grow.training.param_updates.parameter_map import bare, parameter_map

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from transformers import PreTrainedModel

    from hf_grow.checkpoint.reader import Checkpoint
    from hf_grow.growth.entry_provenance import Indices


PARTS = ("new", "old", "new_layers", "routers", "new_experts", "old_experts", "embeddings", "norms", "head")
"""The named parts that `train`, `freeze` and learning rates accept."""


def load_plan(folder: Path) -> GrowthPlan | None:
    """The plan in a folder's growth.json; None for a model that was not grown. Raises SourceError for a damaged file."""
    path = folder / GROWTH
    return GrowthPlan.from_json(read_json(path, "")) if path.is_file() else None


def check_plan_matches(plan: GrowthPlan, checkpoint: Checkpoint) -> None:
    """Raises InputError if the tensors in growth.json are not those of the checkpoint."""
    stored = {n: tuple(t.shape) for n, t in checkpoint.tensors.items() if n in checkpoint.info.architecture.tensors}
    planned = {n: tuple(plan.targets[n].shape) for n in plan.architecture.tensors}
    if stored != planned:
        differing = sorted(n for n in stored.keys() | planned.keys() if stored.get(n) != planned.get(n))
        raise InputError(
            f"growth.json belongs to another model: {len(differing)} tensors differ, such as {differing[0]}.",
            hint="Copy the right one, or remove it to train the model as one that was not grown.",
        )


def new_masks(model: PreTrainedModel, plan: GrowthPlan | None) -> dict[str, Mask]:
    """Mask of new entries of every parameter. Without a plan nothing is new. Raises InputError if the plan is for another model."""
    return _in_memory(model, new_on_disk(plan) if plan is not None else dict.fromkeys(parameter_map(model), False))


def new_on_disk(plan: GrowthPlan) -> dict[str, Mask]:
    """The same by names on disk, without a model. Equal layers share their masks."""
    claimed: dict[str, list[Indices]] = {}
    cache: dict[Any, Mask] = {}
    return {name: _mask(plan, name, claimed, cache) for name in plan.targets}


def _mask(plan: GrowthPlan, name: str, claimed: dict[str, list[Indices]], cache: dict[Any, Mask]) -> Mask:
    """The mask of one tensor.

    ``claimed``: blocks of each source tensor that earlier tensors hold. ``cache``: masks by the vectors they are computed from.
    """
    import torch

    from hf_grow.growth.entry_provenance import trace

    entry = plan.architecture.tensors[name]
    origin = plan.growth.layers[entry.layer] if entry.layer >= 0 else None
    if origin is not None and (origin.new or origin.identity):
        return True
    steps: list[tuple[Indices, list[Indices]]] = []
    for piece in trace(plan, name):
        if origin is not None and _layer(plan, piece.source) not in (-1, *origin.sources):
            continue
        first = piece.first()
        earlier = claimed.setdefault(piece.source, [])
        overlaps = [tuple(torch.isin(a, b) for a, b in zip(piece.index, block, strict=True)) for block in earlier]
        steps.append((first, [o for o in overlaps if all(bool(v.any()) for v in o)]))
        earlier.append(tuple(index[kept] for index, kept in zip(piece.index, first, strict=True)))
    key = tuple(tuple(v.numpy().tobytes() for v in vectors) for first, overlaps in steps for vectors in (first, *overlaps))
    sizes = tuple(len(overlaps) for _, overlaps in steps)
    if (sizes, key) not in cache:
        cache[sizes, key] = _new_entries(steps)
    return cache[sizes, key]


def _new_entries(steps: Sequence[tuple[Indices, Sequence[Indices]]]) -> Mask:
    """Entries outside the first blocks, minus overlaps with them."""
    old: Mask = False
    for first, overlaps in steps:
        mask = product_mask(first)
        for overlap in overlaps:
            mask = both(mask, inverse(product_mask(overlap)))
        old = either(old, mask)
    return inverse(old)


def _layer(plan: GrowthPlan, key: str) -> int:
    """The layer index of a source tensor in its checkpoint; -1 outside the blocks."""
    label, _, name = key.rpartition("::")
    source = plan.source.donors[label] if label else plan.source
    return source.architecture.tensors[name].layer


def _in_memory(model: PreTrainedModel, on_disk: Mapping[str, Mask]) -> dict[str, Mask]:
    """Masks by names on disk -> by names in memory."""
    by_parameter: dict[str, list[tuple[str, Mask, int]]] = {}
    rows = parameter_map(model)
    shapes = {bare(n): p.shape for n, p in model.named_parameters()}
    if missing := [name for name in rows if name not in on_disk]:
        raise InputError(f"The growth plan has no tensor {missing[0]}.", hint="Check that growth.json belongs to this model.")
    for name, row_range in sorted(rows.items(), key=lambda item: item[1].start):
        mask, count = on_disk[name], row_range.stop - row_range.start
        shape = (count, *shapes[row_range.parameter][1:][-1:])
        if isinstance(mask, RowMask) and (len(mask.kinds), mask.lines.shape[1]) != (*shape, 1)[:2]:
            raise InputError(
                f"{name} has shape {list(shape)} in the model, but {list(mask.shape)} in the growth plan.",
                hint="Check that growth.json belongs to this model.",
            )
        by_parameter.setdefault(row_range.parameter, []).append((name, mask, count))
    masks: dict[str, Mask] = {}
    shared: dict[Any, Mask] = {}
    for parameter, members in by_parameter.items():
        found = [mask for _, mask, _ in members]
        key = (shapes[parameter], *(mask if isinstance(mask, bool) else id(mask) for mask in found), *(count for _, _, count in members))
        if key not in shared:
            only, shape = found[0], tuple(shapes[parameter])
            whole = len(found) == 1 and (isinstance(only, bool) or only.shape == shape)
            shared[key] = only if whole else stacked_mask([(mask, count) for _, mask, count in members], shape)
        masks[parameter] = shared[key]
    return masks


def parts(model: PreTrainedModel, plan: GrowthPlan | None) -> dict[str, dict[str, Mask]]:
    """The named parts of a model (PARTS): for each the parameters that have something in it, True or a mask.

    With tied embeddings the head is the embedding. Experts are the FFNs of a mixture; a shared expert is none of them.
    """
    entries = Architecture(model.config.to_dict()).tensors if plan is None else plan.architecture.tensors
    new: dict[str, Mask] = new_on_disk(plan) if plan is not None else dict.fromkeys(entries, False)
    inverses = {id(m): inverse(m) for m in new.values()}  # shared like the masks
    old = {name: inverses[id(m)] for name, m in new.items()}
    added = [o.new or o.identity for o in plan.growth.layers] if plan is not None else []

    def part(members: Mapping[str, bool], masks: Mapping[str, Mask] | None = None) -> dict[str, Mask]:
        masked = {n: (True if masks is None else masks[n]) if member else False for n, member in members.items()}
        return {n: m for n, m in _in_memory(model, masked).items() if m is not False}

    all_tensors = dict.fromkeys(entries, True)
    expert = {n: e.expert >= 0 for n, e in entries.items()}
    kinds = {n: _kind(e) for n, e in entries.items()}
    tied = "lm_head.weight" not in entries
    return {
        "new": part(all_tensors, new),
        "old": part(all_tensors, old),
        "new_layers": part({n: e.layer >= 0 and bool(added) and added[e.layer] for n, e in entries.items()}),
        "routers": part({n: k == "router" for n, k in kinds.items()}),
        "new_experts": part(expert, new),
        "old_experts": part(expert, old),
        "embeddings": part({n: k == "embedding" for n, k in kinds.items()}),
        "norms": part({n: k == "norm" for n, k in kinds.items()}),
        "head": part({n: k == "head" or (tied and k == "embedding") for n, k in kinds.items()}),
    }


def _kind(entry: Entry) -> str:
    dims = entry.spec.dims
    if dims[0].role == "norm":
        return "norm"
    if any("vocab" in d.axes for d in dims):
        return "head" if dims[0].role == "out" else "embedding"
    return "router" if any("experts" in d.axes for d in dims) else ""
