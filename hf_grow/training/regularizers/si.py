"""Synaptic intelligence (Zenke, Poole and Ganguli 2017, arXiv 1703.04200): importance from the path that training takes.

Along the path omega -= g dw adds up what each weight did for the loss; after a task, F += 2 max(omega, 0) / (distance^2 + xi), where
distance is how far the weight went. The paper's c sum Omega d^2 is 1/2 lambda sum F d^2 with F = 2 Omega and c = lambda: for a quadratic loss
that is trained to its minimum, F is its second derivative. g is the gradient of the task's loss alone, without the penalty's own part and
before clipping; negative omega is no importance.

Costs, while the path is collected: gradient, weights before the step, omega, weights at the start, each as large as the model, besides F and
w*. With a file of importances and no `consolidate_every` nothing is collected, and it costs what EWC does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_grow.training.regularizers.fisher import by_names_on_disk
from hf_grow.training.regularizers.importance_file import full_tensor, model_fingerprint, write_importance
from hf_grow.training.regularizers.penalty import LearningRate, Penalty, QuadraticPenalty, chunks, local, shard_like

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IMPORTANCE_FILE = "importance.safetensors"
_SAVED_TENSORS = ("omega", "start")


class SynapticIntelligence(QuadraticPenalty):
    """``every``: consolidate after so many steps. ``collect``: whether the path is followed at all."""

    def __init__(
        self,
        strength: float,
        anchors: dict[str, Tensor],
        importance: Callable[[str], Tensor | float] | None,
        *,
        xi: float,
        every: int | None = None,
        collect: bool = True,
        proximal: bool = False,
        storage: torch.dtype = torch.float32,
    ) -> None:
        def nothing_yet(name: str) -> Tensor:
            return torch.zeros(self.anchors[name].shape, dtype=storage)

        super().__init__("si", strength, anchors, importance or nothing_yet, proximal=proximal, storage=storage)
        self.xi, self.every, self.collect, self.steps = xi, every, collect, 0
        self.path: dict[str, dict[str, Tensor]] = {}

    def attach(self, model: nn.Module) -> None:
        before = self.state_dict() if self.held else None  # bound to another wrapping: its path goes on
        super().attach(model)
        if self.collect:
            self.path = {
                n: {
                    "omega": torch.zeros_like(h.parameter, dtype=_accumulation_dtype(h.parameter)).detach(),
                    "start": h.parameter.detach().clone(),
                    "gradient": torch.zeros_like(h.parameter).detach(),
                    "before": h.parameter.detach().clone(),
                }
                for n, h in self.held.items()
            }
        if before is not None:
            self.load_state_dict(before)

    @torch.no_grad()
    def add_gradient(self, scale: float = 1.0) -> None:
        for n, kept in self.path.items():
            grad = self.held[n].parameter.grad
            if grad is None:
                local(kept["gradient"]).zero_()
                continue
            own = local(kept["gradient"])
            own.copy_(local(grad))
            if scale != 1.0:  # under a GradScaler, an overflow is a step that will be skipped
                own.div_(scale).nan_to_num_(0.0, 0.0, 0.0)
        super().add_gradient(scale)

    @torch.no_grad()
    def before_step(self) -> None:
        for n, kept in self.path.items():
            local(kept["before"]).copy_(local(self.held[n].parameter))

    @torch.no_grad()
    def after_step(self, lr: LearningRate, settle: Callable[[], None] = lambda: None) -> None:
        super().after_step(lr, settle)
        for n, kept in self.path.items():
            tensors = (local(kept["omega"]), local(kept["gradient"]), local(self.held[n].parameter), local(kept["before"]))
            for omega, grad, p, before in chunks(tensors):
                omega.sub_(grad * (p - before))
        self.steps += 1
        if self.every and self.path and self.steps % self.every == 0:
            self.consolidate()

    @torch.no_grad()
    def consolidate(self) -> None:
        """The path since the last time becomes importance, the weights reached become the anchor, a new path begins."""
        for n, kept in self.path.items():
            h = self.held[n]
            assert isinstance(h.importance, Tensor)
            p, start, omega = local(h.parameter), local(kept["start"]), local(kept["omega"])
            distance = (p - start).to(omega.dtype)
            local(h.importance).add_(2 * omega.clamp(min=0) / (distance * distance + self.xi))
            start.copy_(p)
            omega.zero_()
            local(h.anchor).copy_(p)

    def importances(self) -> dict[str, Tensor]:
        """F by parameter name, whole tensors on the CPU. Where parameters are sharded, every process must ask."""
        return {n: full_tensor(h.importance).cpu() for n, h in self.held.items() if isinstance(h.importance, Tensor)}

    def finish(self, folder: Path, model: PreTrainedModel) -> None:
        """Consolidates, and writes FILE: the `fisher` of a later run that begins at these weights."""
        if not self.collect:
            return
        self.consolidate()
        found, identity = self.importances(), model_fingerprint(model)
        if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
            return
        tensors = dict(by_names_on_disk(model, found))
        facts = {"kind": "si", "steps": self.steps, "xi": self.xi, "model": str(folder), "sample": identity}
        write_importance(folder / IMPORTANCE_FILE, {n: tuple(t.shape) for n, t in tensors.items()}, iter(tensors.items()), facts)

    def nbytes(self) -> int:
        count = sum(a.numel() for a in self.anchors.values())
        return super().nbytes() + (4 * 4 * count if self.collect else 0)

    def state_dict(self) -> dict[str, Any]:
        state = {"name": self.name, "steps": self.steps}
        if self.collect:
            state["anchor"] = {n: full_tensor(h.anchor).cpu().clone() for n, h in self.held.items()}
            state["importance"] = {n: t.clone() for n, t in self.importances().items()}
            state["path"] = {n: {k: full_tensor(kept[k]).cpu().clone() for k in _SAVED_TENSORS} for n, kept in self.path.items()}
        else:
            state |= super().state_dict()
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if not self.collect:
            super().load_state_dict(state)
            return
        Penalty.load_state_dict(self, state)  # the anchors come with the state
        self.steps = int(state["steps"])
        for n, h in self.held.items():
            assert isinstance(h.importance, Tensor)
            for own, saved in (
                (h.anchor, state["anchor"][n]),
                (h.importance, state["importance"][n]),
                *((self.path[n][k], state["path"][n][k]) for k in _SAVED_TENSORS),
            ):
                local(own).copy_(local(shard_like(saved, h.parameter)))


def _accumulation_dtype(p: Tensor) -> torch.dtype:
    """Sums of many small terms are not kept in 16 bits."""
    return p.dtype if p.element_size() >= 4 else torch.float32
