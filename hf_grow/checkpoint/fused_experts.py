"""Reads experts that are stored fused, as transformers 5 holds them in memory and mergekit writes them.

One tensor holds the gate and up projections of all experts of a layer, [experts, 2 * expert_inter, hidden], and another their down projections. Each
expert's matrix is a contiguous byte range of it, so the per-expert tensors are addressed without copying.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hf_grow.checkpoint.safetensors_header import TensorLocation
from hf_grow.errors import SourceError
from hf_grow.model.families import FAMILIES


def unfuse_experts(config: Mapping[str, Any], tensors: Mapping[str, TensorLocation], ref: str) -> dict[str, TensorLocation]:
    """The tensors with fused experts split into the per-expert names of the families table.

    Raises SourceError for fused tensors of the wrong shape, or if a tensor is stored both fused and separately.
    """
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    patterns = (
        [(re.compile(re.escape(name).replace(r"\{layer\}", r"(\d{1,6})")), parts) for name, parts in family.fused.items()] if family else []
    )
    out: dict[str, TensorLocation] = {}
    for name, stored in tensors.items():
        match, parts = next(((m, parts) for pattern, parts in patterns if (m := pattern.fullmatch(name))), (None, ()))
        for own, piece in _split(stored, name, parts, match[1], ref) if match else [(name, stored)]:
            if own in out or (own != name and own in tensors):
                raise SourceError(
                    f"{ref} contains {own} twice: separately, and in the fused {name}.",
                    hint="Two layouts were mixed; save the model again.",
                )
            out[own] = piece
    return out


def _split(stored: TensorLocation, name: str, parts: tuple[str, ...], layer: str, ref: str) -> list[tuple[str, TensorLocation]]:
    if "{expert}" not in parts[0]:
        return [(parts[0].format(layer=layer), stored)]
    if len(stored.shape) != 3 or not all(stored.shape) or stored.shape[1] % len(parts):
        raise SourceError(
            f"{ref}: {name} has shape {list(stored.shape)}; fused experts have [experts, {len(parts)} * rows, columns].",
            hint="Load it with the transformers version that wrote it, and save it again with save_pretrained.",
        )
    experts, rows, columns = stored.shape
    step = (stored.stop - stored.start) // (experts * len(parts))
    return [
        (part.format(layer=layer, expert=expert), replace(stored, shape=(rows // len(parts), columns), start=start, stop=start + step))
        for expert in range(experts)
        for at, part in enumerate(parts)
        for start in [stored.start + (expert * len(parts) + at) * step]
    ]
