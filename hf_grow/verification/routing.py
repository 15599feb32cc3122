"""Router statistics of mixture-of-experts models on a text: entropy, expert load, and top-k agreement before and after growth.

Entropy is that of the softmax over all E experts, in nats, averaged over tokens: log E for a uniform router, 0 for a one-hot one. The load of an
expert is its share of a layer's tokens * top_k assignments. Agreement is the share of a token's experts in the grown model whose origin (the old
expert they copy) the old model chose for that token in the layer the new layer comes from; an expert without an origin never agrees.

The choice follows the models (transformers, modeling_mixtral.py and modeling_qwen3_moe.py): softmax in fp32, then topk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hf_grow.growth.plan import GrowthPlan
from hf_grow.model.architecture import Architecture

if TYPE_CHECKING:
    from torch import Tensor


class Routing:
    """Router choices of one model, collected window by window. Dense layers have no router and are not listed."""

    def __init__(self, architecture: Architecture) -> None:
        self.experts = architecture.size("experts")
        self.top_k = architecture.top_k
        self.layers = [i for i in range(architecture.layers) if architecture.is_sparse(i)] if architecture.is_moe else []
        self.tokens = 0
        self._entropy = [0.0] * len(self.layers)
        self._chosen: list[list[Tensor]] = [[] for _ in self.layers]

    def __bool__(self) -> bool:
        return bool(self.layers)

    def add(self, router_logits: Sequence[Tensor]) -> None:
        """Adds one window: router logits [tokens, experts], one tensor per sparse layer, in order."""
        import torch

        for at, logits in enumerate(router_logits):
            probabilities = logits.reshape(-1, self.experts).softmax(-1, dtype=torch.float32)
            self._chosen[at].append(probabilities.topk(self.top_k, dim=-1).indices.to(torch.int32))
            self._entropy[at] += float(torch.special.entr(probabilities.double()).sum())
        self.tokens += self._chosen[0][-1].shape[0]

    def chosen(self, layer: int) -> Tensor:
        """Expert indices [tokens, top_k] chosen in a sparse layer."""
        import torch

        return torch.cat(self._chosen[self.layers.index(layer)])

    def measure(self) -> dict[str, Any]:
        """The statistics as plain JSON; the keys are listed in docs/growth-json.md."""
        by_layer = [self._measure_layer(at) for at in range(len(self.layers))]
        loads = [(share, layer["layer"], expert) for layer in by_layer for expert, share in enumerate(layer["load"])]
        entropy = sum(layer["entropy"] for layer in by_layer) / len(by_layer)
        return {
            "experts": self.experts,
            "top_k": self.top_k,
            "tokens": self.tokens,
            "entropy": entropy,
            "entropy_share": entropy / math.log(self.experts) if self.experts > 1 else None,
            "most_loaded": _load_entry(max(loads, key=lambda load: load[0])),
            "least_loaded": _load_entry(min(loads, key=lambda load: load[0])),
            "load_variation": sum(layer["load_variation"] for layer in by_layer) / len(by_layer),
            "dead": [[layer, expert] for share, layer, expert in loads if share == 0],
            "layers": by_layer,
        }

    def _measure_layer(self, at: int) -> dict[str, Any]:
        chosen = self.chosen(self.layers[at])
        load = chosen.flatten().bincount(minlength=self.experts).double() / chosen.numel()
        # Coefficient of variation: the mean load is 1 / E.
        variation = float(load.std(correction=0)) * self.experts
        return {"layer": self.layers[at], "entropy": self._entropy[at] / self.tokens, "load_variation": variation, "load": load.tolist()}


def _load_entry(load: tuple[float, int, int]) -> dict[str, Any]:
    share, layer, expert = load
    return {"share": share, "layer": layer, "expert": expert}


def expert_origins(plan: GrowthPlan) -> dict[int, dict[int, int]]:
    """Target layer -> expert -> the source expert it is made from; experts made from anything else are left out.

    Taken from the expressions: the first expert tensor of the main source that one of the expert's tensors reads.
    """
    sources = plan.source.architecture.tensors
    origins: dict[int, dict[int, int]] = {}
    for name, entry in plan.architecture.tensors.items():
        if entry.expert < 0 or entry.expert in origins.get(entry.layer, {}):
            continue
        read = (sources[s.name] for s in plan.growth.tensors[name].sources() if not s.checkpoint and s.name in sources)
        first = next((source.expert for source in read if source.expert >= 0), None)
        if first is not None:
            origins.setdefault(entry.layer, {})[entry.expert] = first
    return origins


def agreement(plan: GrowthPlan | None, old: Routing, new: Routing) -> dict[str, Any] | None:
    """Top-k agreement on the same tokens; None without a plan, or if no expert comes from an expert.

    ``inherited`` is the mean over layers that are the first copy of their source layer: a repeated or added block gets a different input, so
    its router need not agree.
    """

    if plan is None:
        return None
    layers = []
    for layer, experts in sorted(expert_origins(plan).items()):
        origin = plan.growth.layers[layer]
        if origin.sources[0] not in old.layers:
            continue
        agrees = _agrees(old.chosen(origin.sources[0]), new.chosen(layer), _origin_indices(experts, new.experts))
        layers.append({"layer": layer, "source": origin.sources[0], "new": origin.new, "share": float(agrees.double().mean())})
    if not layers:
        return None
    inherited = [entry["share"] for entry in layers if not entry["new"]]
    return {
        "mean": sum(entry["share"] for entry in layers) / len(layers),
        "inherited": sum(inherited) / len(inherited) if inherited else None,
        "layers": layers,
    }


def _origin_indices(origins: Mapping[int, int], experts: int) -> Tensor:
    """The source expert of each expert, int32 [experts]; -1 without one."""
    import torch

    indices = torch.full((experts,), -1, dtype=torch.int32)
    indices[list(origins)] = torch.tensor(list(origins.values()), dtype=torch.int32)
    return indices


def _agrees(old: Tensor, new: Tensor, origins: Tensor) -> Tensor:
    """Whether the origin of each new choice is among the old choices of that token, bool [tokens, top_k]."""
    return (origins[new.long()][:, :, None] == old[:, None, :]).any(-1)


def unaffected_tokens(lengths: Sequence[int], old: Routing, new: Routing, plan: GrowthPlan | None) -> tuple[Tensor, int] | None:
    """A mask of the tokens before the first changed router choice of their window, bool [tokens], and the number of windows with such a change.

    Rounding can decide between two experts with nearly equal logits, and the large difference that follows is not an error. ``plan`` is None if
    both are the same model. Returns None if the choices cannot be compared, or none differs.
    """
    import torch

    if not old or not new:
        return None
    same = torch.ones(old.tokens, dtype=torch.bool)
    for layer in new.layers:
        origin = layer if plan is None else plan.growth.layers[layer].sources[0]
        if plan is not None and (plan.growth.layers[layer].new or origin not in old.layers):
            continue
        if plan is None:
            origins = torch.arange(new.experts, dtype=torch.int32)
        else:
            origins = _origin_indices(expert_origins(plan).get(layer, {}), new.experts)
        same &= _agrees(old.chosen(origin), new.chosen(layer), origins).all(-1)
    windows = [window.long().cumprod(0).bool() for window in torch.split(same, list(lengths))]
    changed = sum(not bool(window.all()) for window in windows)
    return (torch.cat(windows), changed) if changed else None


def compare_routers(plan: GrowthPlan | None, old: Routing, new: Routing) -> dict[str, Any] | None:
    """The metric `experts` of the report; None if neither model has experts."""
    if not old and not new:
        return None
    return {
        "old": old.measure() if old else None,
        "new": new.measure() if new else None,
        "agreement": agreement(plan, old, new) if old and new else None,
    }
