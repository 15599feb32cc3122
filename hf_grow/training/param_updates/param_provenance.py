"""Which parameters, and which of their rows, are new in a grown model, according to its growth plan.

New is what reads no source (a router, a pad), what repeats a source that stands first elsewhere (later copies of rows, of heads, of experts,
of whole layers), and every block that growth added. The rest is inherited. Under AKI rows taken from the layer above are new as well.
Masks are by the names in memory: False where all of a parameter is inherited, True where all of it is new, else a bool tensor of its shape.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hf_grow.checkpoint.reader import GROWTH
from hf_grow.common.safe_files import read_json
from hf_grow.errors import InputError
from hf_grow.growth.plan import GrowthPlan
from hf_grow.model.architecture import Architecture, Entry
from hf_grow.training.param_updates.masks import inverse
from hf_grow.training.param_updates.parameter_map import bare, parameter_map

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from torch import Tensor
    from transformers import PreTrainedModel

    from hf_grow.checkpoint.reader import Checkpoint
    from hf_grow.growth.entry_provenance import Indices

    Mask = bool | Tensor

PARTS = ("new", "old", "new_layers", "routers", "new_experts", "old_experts", "embeddings", "norms", "head")
"""The named parts that `train`, `freeze` and learning rates accept."""


def load_plan(folder: Path) -> GrowthPlan | None:
    """The plan in a folder's growth.json; None for a model that was not grown. Raises SourceError for a damaged file."""
    path = folder / GROWTH
    return GrowthPlan.from_json(read_json(path, "")) if path.is_file() else None


def check_fits(plan: GrowthPlan, checkpoint: Checkpoint) -> None:
    """Raises InputError if the tensors in growth.json are not those of the checkpoint."""
    here = {n: tuple(t.shape) for n, t in checkpoint.tensors.items() if n in checkpoint.info.architecture.tensors}
    there = {n: tuple(plan.targets[n].shape) for n in plan.architecture.tensors}
    if here != there:
        odd = sorted(n for n in here.keys() | there.keys() if here.get(n) != there.get(n))
        raise InputError(
            f"growth.json is of another model: {len(odd)} tensors differ, such as {odd[0]}.",
            hint="Remove it to take the model for one that was not grown, or copy the right one.",
        )


def new_masks(model: PreTrainedModel, plan: GrowthPlan | None) -> dict[str, Mask]:
    """Mask of new entries of every parameter. Without a plan nothing is new. Raises InputError if the plan is for another model."""
    return _in_memory(model, new_on_disk(plan) if plan is not None else dict.fromkeys(parameter_map(model), False))


def new_on_disk(plan: GrowthPlan) -> dict[str, Mask]:
    """The same by names on disk, without a model. Equal layers share their masks: one byte per weight would be 13 GB for 13B."""
    claims: dict[str, list[Indices]] = {}
    made: dict[Any, Mask] = {}
    return {name: _mask(plan, name, claims, made) for name in plan.targets}


def _mask(plan: GrowthPlan, name: str, claims: dict[str, list[Indices]], made: dict[Any, Mask]) -> Mask:
    """``made``: cache of masks by the vectors they are computed from, which are the same in equal layers."""
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
        earlier = claims.setdefault(piece.source, [])
        overlaps = [tuple(torch.isin(index, taken) for index, taken in zip(piece.index, claim, strict=True)) for claim in earlier]
        steps.append((first, [o for o in overlaps if all(bool(v.any()) for v in o)]))
        earlier.append(tuple(index[kept] for index, kept in zip(piece.index, first, strict=True)))
    key = tuple(tuple(v.numpy().tobytes() for v in vectors) for first, overlaps in steps for vectors in (first, *overlaps))
    sizes = tuple(len(overlaps) for _, overlaps in steps)
    if (sizes, key) not in made:
        made[sizes, key] = _outside(steps)
    return made[sizes, key]


def _outside(steps: Sequence[tuple[Indices, Sequence[Indices]]]) -> Mask:
    """Entries outside the first blocks, minus overlaps with them."""
    from hf_grow.growth.entry_provenance import outer

    old: Tensor | None = None
    for first, overlaps in steps:
        mask = outer(first)
        for overlap in overlaps:
            mask &= ~outer(overlap)
        old = mask if old is None else old | mask
    if old is None or not old.any():
        return True
    return False if bool(old.all()) else ~old


def _layer(plan: GrowthPlan, key: str) -> int:
    """The layer index of a source tensor in its checkpoint; -1 outside the blocks."""
    label, _, name = key.rpartition("::")
    source = plan.source.donors[label] if label else plan.source
    return source.architecture.tensors[name].layer


class _Shared:
    """Returns one shared tensor for equal masks; it must not be changed."""

    def __init__(self) -> None:
        self.known: dict[tuple[int, ...], list[Tensor]] = {}

    def __call__(self, mask: Mask) -> Mask:
        import torch

        if isinstance(mask, bool):
            return mask
        alike = self.known.setdefault(tuple(mask.shape), [])
        for other in alike:
            if torch.equal(mask, other):
                return other
        alike.append(mask)
        return mask


def _in_memory(model: PreTrainedModel, on_disk: Mapping[str, Mask]) -> dict[str, Mask]:
    """Masks by names on disk -> by names in memory."""
    import torch

    found: dict[str, list[tuple[str, Mask]]] = {}
    where = parameter_map(model)
    for name, place in where.items():
        if name not in on_disk:
            raise InputError(f"The growth plan knows no tensor {name}.", hint="Is its growth.json that of another model?")
        found.setdefault(place.parameter, []).append((name, on_disk[name]))
    shapes = {bare(n): p.shape for n, p in model.named_parameters()}
    out: dict[str, Mask] = {}
    fused = _Shared()
    for parameter, members in found.items():
        if len(members) == 1 and not isinstance(members[0][1], bool) and members[0][1].shape == shapes[parameter]:
            out[parameter] = members[0][1]
            continue
        if all(m is members[0][1] and isinstance(m, bool) for _, m in members):
            out[parameter] = members[0][1]
            continue
        whole = torch.zeros(shapes[parameter], dtype=torch.bool)
        for name, mask in members:
            part = where[name].of(whole)
            if not isinstance(mask, bool) and mask.shape != part.shape:
                raise InputError(
                    f"{name} has shape {list(part.shape)} here, {list(mask.shape)} in the growth plan.",
                    hint="Is its growth.json that of another model?",
                )
            part.copy_(torch.as_tensor(mask))
        out[parameter] = fused(whole)
    return out


def parts(model: PreTrainedModel, plan: GrowthPlan | None) -> dict[str, dict[str, Mask]]:
    """The named parts of a model (PARTS): for each the parameters that have something in it, True or a mask.

    With tied embeddings the head is the embedding. Experts are the FFNs of a mixture; a shared expert is none of them.
    """
    entries = Architecture(model.config.to_dict()).tensors if plan is None else plan.architecture.tensors
    new: dict[str, Mask] = new_on_disk(plan) if plan is not None else dict.fromkeys(entries, False)
    opposite = {id(m): inverse(m) for m in new.values()}
    old = {name: opposite[id(m)] for name, m in new.items()}
    added = [o.new or o.identity for o in plan.growth.layers] if plan is not None else []

    def chosen(where: Mapping[str, bool], masks: Mapping[str, Mask] | None = None) -> dict[str, Mask]:
        masked = {n: (True if masks is None else masks[n]) if inside else False for n, inside in where.items()}
        return {n: m for n, m in _in_memory(model, masked).items() if m is not False}

    every = dict.fromkeys(entries, True)
    expert = {n: e.expert >= 0 for n, e in entries.items()}
    kinds = {n: _kind(e) for n, e in entries.items()}
    tied = "lm_head.weight" not in entries
    return {
        "new": chosen(every, new),
        "old": chosen(every, old),
        "new_layers": chosen({n: e.layer >= 0 and bool(added) and added[e.layer] for n, e in entries.items()}),
        "routers": chosen({n: k == "router" for n, k in kinds.items()}),
        "new_experts": chosen(expert, new),
        "old_experts": chosen(expert, old),
        "embeddings": chosen({n: k == "embedding" for n, k in kinds.items()}),
        "norms": chosen({n: k == "norm" for n, k in kinds.items()}),
        "head": chosen({n: k == "head" or (tied and k == "embedding") for n, k in kinds.items()}),
    }


def _kind(entry: Entry) -> str:
    dims = entry.spec.dims
    if dims[0].role == "norm":
        return "norm"
    if any("vocab" in d.axes for d in dims):
        return "head" if dims[0].role == "out" else "embedding"
    return "router" if any("experts" in d.axes for d in dims) else ""
