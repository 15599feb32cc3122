"""Config keys that describe single layers, for a new list of layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_grow.growth.growth import LayerOrigin
from hf_grow.model.architecture import Architecture


def rederived(arch: Architecture, layers: Sequence[LayerOrigin]) -> dict[str, Any]:
    """Values of per-layer config keys (layer_types, mlp_only_layers, max_window_layers) for a new list of layers."""
    n, first = arch.layers, [o.sources[0] for o in layers]
    out: dict[str, Any] = {}
    types = arch.config.get("layer_types") or _window_types(arch)
    if types:
        out["layer_types"] = types = [types[i] for i in first]
    if "mlp_only_layers" in arch.family.defaults:
        # The period decoder_sparse_step rarely fits a new order of layers; a list of the dense ones always does.
        out["mlp_only_layers"] = [t for t, i in enumerate(first) if not arch.is_sparse(i)]
        out["decoder_sparse_step"] = 1
    window = arch.get("max_window_layers")
    if window is not None:
        if types and "sliding_attention" in types:
            out["max_window_layers"] = types.index("sliding_attention")
        else:
            out["max_window_layers"] = len(layers) if window >= n else sum(i < window for i in first)
    return out


def _window_types(arch: Architecture) -> list[str] | None:
    """layer_types of a config without that key: sliding attention from max_window_layers on."""
    window = arch.get("max_window_layers")
    if window is None or not arch.get("use_sliding_window") or arch.get("sliding_window") is None:
        return None
    return ["full_attention" if i < window else "sliding_attention" for i in range(arch.layers)]
