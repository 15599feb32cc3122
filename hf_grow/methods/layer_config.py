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
    types = arch.get("layer_types") or (arch.layer_types if arch.get("use_sliding_window") else None)
    if types:
        out["layer_types"] = [types[i] for i in first]
    if "mlp_only_layers" in arch.family.defaults:
        # The period decoder_sparse_step rarely fits a new order of layers; a list of the dense ones always does.
        out["mlp_only_layers"] = [t for t, i in enumerate(first) if not arch.is_sparse(i)]
        out["decoder_sparse_step"] = 1
    window = arch.get("max_window_layers")
    if window is not None:
        out["max_window_layers"] = len(layers) if window >= n else sum(i < window for i in first)
        sliding = [t for t, kind in enumerate(out.get("layer_types", ())) if kind == "sliding_attention"]
        if sliding:
            # For readers that derive layer_types: families let windows begin at this layer, or end before it.
            config = {**arch.config, "num_hidden_layers": len(layers), **out}
            ends = (sliding[0], sliding[-1] + 1)
            same = (end for end in ends if derives_layer_types(Architecture({**config, "max_window_layers": end})))
            out["max_window_layers"] = next(same, ends[0])
    return out


def derives_layer_types(target: Architecture) -> bool:
    """Whether the family's config class would derive the same layer_types if the key were missing."""
    return Architecture({**target.config, "layer_types": None}).layer_types == target.layer_types
