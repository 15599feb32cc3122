"""What the routers of a mixture of experts do on a text: how sure they are, how evenly they spread, and whether growth changed their choice.

Entropy is that of the whole softmax over E experts, in nats, averaged over tokens: log E where the router knows nothing, 0 where it is certain.
The load of an expert is its share of the tokens * top_k places that a layer has to give. Agreement is the share of the experts that the grown
model chooses for a token whose origin, the old expert that they copy, the old model chose for that token in the layer that the new one comes
from. An expert without an origin never agrees.

The choice is made as the models make it (transformers, modeling_mixtral.py and modeling_qwen3_moe.py): softmax in fp32, then topk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hf_grow.growth.plan import GrowthPlan
from hf_grow.model.architecture import Architecture

if TYPE_CHECKING:
    from torch import Tensor


class Routing:
    """The choices of one model, gathered window by window. Dense layers of a mixed model have no router and do not appear."""

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
        """The logits [tokens, experts] of one window, one tensor a sparse layer in order, as a model gives them."""
        import torch

        for at, logits in enumerate(router_logits):
            probabilities = logits.reshape(-1, self.experts).softmax(-1, dtype=torch.float32)
            self._chosen[at].append(probabilities.topk(self.top_k, dim=-1).indices.to(torch.int32))
            self._entropy[at] += float(torch.special.entr(probabilities.double()).sum())
        self.tokens += self._chosen[0][-1].shape[0]

    def chosen(self, layer: int) -> Tensor:
        """The experts [tokens, top_k] that a sparse layer chose."""
        import torch

        return torch.cat(self._chosen[self.layers.index(layer)])

    def measure(self) -> dict[str, Any]:
        """The measurements as plain JSON; see docs/growth-json.md for the keys."""
        by_layer = [self._measure_layer(at) for at in range(len(self.layers))]
        loads = [(share, layer["layer"], expert) for layer in by_layer for expert, share in enumerate(layer["load"])]
        entropy = sum(layer["entropy"] for layer in by_layer) / len(by_layer)
        return {
            "experts": self.experts,
            "top_k": self.top_k,
            "tokens": self.tokens,
            "entropy": entropy,
            "entropy_share": entropy / math.log(self.experts) if self.experts > 1 else None,
            "most_loaded": _place(max(loads, key=lambda load: load[0])),
            "least_loaded": _place(min(loads, key=lambda load: load[0])),
            "load_variation": sum(layer["load_variation"] for layer in by_layer) / len(by_layer),
            "dead": [[layer, expert] for share, layer, expert in loads if share == 0],
            "layers": by_layer,
        }

    def _measure_layer(self, at: int) -> dict[str, Any]:
        chosen = self.chosen(self.layers[at])
        load = chosen.flatten().bincount(minlength=self.experts).double() / chosen.numel()
        # Standard deviation over the experts, in units of the even share 1 / E.
        variation = float(load.std(correction=0)) * self.experts
        return {"layer": self.layers[at], "entropy": self._entropy[at] / self.tokens, "load_variation": variation, "load": load.tolist()}


def _place(load: tuple[float, int, int]) -> dict[str, Any]:
    share, layer, expert = load
    return {"share": share, "layer": layer, "expert": expert}


def expert_origins(plan: GrowthPlan) -> dict[int, dict[int, int]]:
    """Target layer -> expert -> the expert of the source that it is made from; experts made from anything else are left out.

    Read off the expressions: the first expert's tensor of the main source that one of the expert's own tensors reads.
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
    """Top-k agreement on the tokens that both saw; None without a plan, or where no layer of experts comes from one.

    `inherited` is the mean over the layers that are the first appearance of their source: a repeated or added block sees another input,
    so its router has no choice to keep.
    """
    import torch

    if plan is None:
        return None
    found = []
    for layer, experts in sorted(expert_origins(plan).items()):
        origin = plan.growth.layers[layer]
        if origin.sources[0] not in old.layers:
            continue
        of = torch.full((new.experts,), -1, dtype=torch.int32)
        of[list(experts)] = torch.tensor(list(experts.values()), dtype=torch.int32)
        mapped = of[new.chosen(layer).long()]
        kept = (mapped[:, :, None] == old.chosen(origin.sources[0])[:, None, :]).any(-1)
        found.append({"layer": layer, "source": origin.sources[0], "new": origin.new, "share": float(kept.double().mean())})
    if not found:
        return None
    inherited = [f["share"] for f in found if not f["new"]]
    return {
        "mean": sum(f["share"] for f in found) / len(found),
        "inherited": sum(inherited) / len(inherited) if inherited else None,
        "layers": found,
    }


def settled_tokens(lengths: Sequence[int], old: Routing, new: Routing, plan: GrowthPlan | None) -> tuple[Tensor, int] | None:
    """Tokens [all windows] before the first of their window for which a router chose otherwise, and the number of windows that have such a token.

    A choice between two experts that are nearly even is decided by rounding, and what follows from it is not. `plan` is None where both are one
    model. None where the choices cannot be compared, or none differs.
    """
    import torch

    if not old or not new:
        return None
    same = torch.ones(old.tokens, dtype=torch.bool)
    for layer in new.layers:
        origin = layer if plan is None else plan.growth.layers[layer].sources[0]
        if plan is not None and (plan.growth.layers[layer].new or origin not in old.layers):
            continue
        of = torch.arange(new.experts, dtype=torch.int32)
        if plan is not None:
            experts = expert_origins(plan).get(layer, {})
            of = torch.full((new.experts,), -1, dtype=torch.int32)
            of[list(experts)] = torch.tensor(list(experts.values()), dtype=torch.int32)
        same &= (of[new.chosen(layer).long()][:, :, None] == old.chosen(origin)[:, None, :]).any(-1).all(-1)
    windows = [window.long().cumprod(0).bool() for window in torch.split(same, list(lengths))]
    changed = sum(not bool(window.all()) for window in windows)
    return (torch.cat(windows), changed) if changed else None


def compare_routing(plan: GrowthPlan | None, old: Routing, new: Routing) -> dict[str, Any] | None:
    """What `verify` reports as `experts`: None where neither model has experts."""
    if not old and not new:
        return None
    return {
        "old": old.measure() if old else None,
        "new": new.measure() if new else None,
        "agreement": agreement(plan, old, new) if old and new else None,
    }
