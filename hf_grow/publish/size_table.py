"""Sizes and costs of source and target, as the terminal and the card show them."""

from __future__ import annotations

from hf_grow.common.units import format_bytes
from hf_grow.growth.plan import GrowthPlan
from hf_grow.model.param_count import format_count


def size_rows(plan: GrowthPlan) -> list[tuple[str, str, str]]:
    """Rows (label, source, target) below the numbers of layers and parameters."""
    old, new = plan.sizes
    rows = []
    if plan.source.architecture.is_moe or plan.architecture.is_moe:
        rows.append(("active parameters", format_count(old.active), format_count(new.active)))
    rows.append(("weights on disk", format_bytes(plan.source.nbytes), format_bytes(plan.nbytes)))
    if more := len(plan.source.donors):
        rows.append((f"weights of {more} further source{'s' * (more > 1)}", format_bytes(plan.source_nbytes - plan.source.nbytes), ""))
    rows.append(("forward FLOPs per token", format_count(old.flops), format_count(new.flops)))
    rows.append(("KV cache per token (16 bit)", _kibibytes(2 * old.kv_values), _kibibytes(2 * new.kv_values)))
    return rows


def _kibibytes(nbytes: int) -> str:
    return f"{nbytes / 1024:.3f}".rstrip("0").rstrip(".") + " KiB"
