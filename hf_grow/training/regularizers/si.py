"""Synaptic intelligence (Zenke, Poole and Ganguli 2017, arXiv 1703.04200): importance from the training path.

Along the path omega -= g dw, each weight's contribution to the decrease of the loss. After a task F += 2 max(omega, 0) / (distance^2 + xi), where
distance is how far the weight moved. The paper's c sum Omega d^2 equals 1/2 lambda sum F d^2 with F = 2 Omega and c = lambda; for a quadratic loss
trained to its minimum, F is its second derivative. g is the gradient of the task loss alone, without the penalty's and before clipping.

While the path is followed, four more tensors of the model's size are kept: gradient, weights before the step, omega, and weights at the start.
With a file of importances and without `consolidate_every` no path is followed, and the cost is that of EWC.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_grow.training.distributed.processes import ALONE
from hf_grow.training.param_updates.parameter_map import parameter_map, shapes_on_disk
from hf_grow.training.param_updates.shards import full_tensor, is_first_holder, is_sharded, local, local_window, processes, shard_like
from hf_grow.training.regularizers.fisher import Part, accumulation_dtype
from hf_grow.training.regularizers.importance_file import model_fingerprint, write_importance_rows
from hf_grow.training.regularizers.penalty import LearningRate, Penalty, QuadraticPenalty, chunks
from hf_grow.training.sharding.local_rows import by_parameter, held_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IMPORTANCE_FILE = "importance.safetensors"
_SAVED = ("omega", "start")
"""What of the path a resumed run needs."""


class SynapticIntelligence(QuadraticPenalty):
    """QuadraticPenalty whose F comes from the path.

    Args beyond those of `QuadraticPenalty`:
        importance: F of earlier tasks; None for none.
        xi: damping.
        every: steps between consolidations; None for one at the end.
        collect: whether the path is followed.
    """

    def __init__(
        self,
        strength: float,
        anchors: dict[str, Tensor],
        importance: Callable[[str, nn.Parameter], Tensor | float] | None,
        *,
        xi: float,
        every: int | None = None,
        collect: bool = True,
        proximal: bool = False,
        storage: torch.dtype = torch.float32,
    ) -> None:
        def zeros(name: str, p: nn.Parameter) -> Tensor:
            return torch.zeros_like(p, dtype=storage).detach()

        super().__init__("si", strength, anchors, importance or zeros, proximal=proximal, storage=storage)
        self.xi, self.every, self.collect, self.steps = xi, every, collect, 0
        self.path: dict[str, dict[str, Tensor]] = {}

    def attach(self, model: nn.Module) -> None:
        super().attach(model)
        if self.collect:
            self.path = {n: self._path(n, h.parameter) for n, h in self.held.items()}

    def _path(self, name: str, p: nn.Parameter) -> dict[str, Tensor]:
        """A path that begins, or of another wrapping: the one that continues."""
        if name in self.path:
            return {k: shard_like(t, p) for k, t in self.path[name].items()}
        return {
            "omega": torch.zeros_like(p, dtype=accumulation_dtype(p)).detach(),
            "start": p.detach().clone(),
            "gradient": torch.zeros_like(p).detach(),
            "before": p.detach().clone(),
        }

    @torch.no_grad()
    def add_gradient(self, scale: float = 1.0) -> None:
        for n, path in self.path.items():
            gradient, grad = local(path["gradient"]), self.held[n].parameter.grad
            if grad is None:
                gradient.zero_()
                continue
            gradient.copy_(local(grad))
            if scale != 1.0:  # a GradScaler skips the step of an overflow
                gradient.div_(scale).nan_to_num_(0.0, 0.0, 0.0)
        super().add_gradient(scale)

    @torch.no_grad()
    def before_step(self) -> None:
        for n, path in self.path.items():
            local(path["before"]).copy_(local(self.held[n].parameter))

    @torch.no_grad()
    def after_step(self, lr: LearningRate, restore_frozen: Callable[[], None] = lambda: None) -> None:
        super().after_step(lr, restore_frozen)
        for n, path in self.path.items():
            tensors = (local(path["omega"]), local(path["gradient"]), local(self.held[n].parameter), local(path["before"]))
            for omega, grad, p, before in chunks(tensors):
                omega.sub_(grad * (p - before))
        self.steps += 1
        if self.every and self.path and self.steps % self.every == 0:
            self.consolidate()

    @torch.no_grad()
    def consolidate(self) -> None:
        """Adds the importance of the path so far to F, moves the anchor to the current weights, and starts a new path."""
        for n, path in self.path.items():
            h = self.held[n]
            assert isinstance(h.importance, Tensor)
            p, start, omega = local(h.parameter), local(path["start"]), local(path["omega"])
            distance = (p - start).to(omega.dtype)
            local(h.importance).add_(2 * omega.clamp(min=0) / (distance * distance + self.xi))
            start.copy_(p)
            omega.zero_()
            local(h.anchor).copy_(p)

    def finish(self, folder: Path, model: PreTrainedModel) -> None:
        """Consolidates, and writes IMPORTANCE_FILE: the `fisher` of a later run that starts from these weights."""
        if not self.collect:
            return
        self.consolidate()
        metadata = {"kind": "si", "steps": self.steps, "xi": self.xi, "model": str(folder), "sample": model_fingerprint(model)}
        shapes, together = shapes_on_disk(model, parameter_map(model)), any(is_sharded(h.importance) for h in self.held.values())
        if together or processes().index == 0:
            write_importance_rows(
                folder / IMPORTANCE_FILE, shapes, self._on_disk(model), metadata, processes=processes() if together else ALONE
            )

    def _on_disk(self, model: PreTrainedModel) -> Iterator[Part]:
        """What this process writes of F: the rows that it holds, if it is the first of those that hold them."""
        for parameter, places in by_parameter(parameter_map(model)).items():
            f: Any = self.held[parameter].importance
            if is_sharded(f) and any(p.is_shard() and not p.is_shard(0) for p in f.placements):
                f = full_tensor(f)  # no whole rows; one parameter at a time
            if is_first_holder(f):
                yield from held_rows(local(f), f.shape, local_window(f), places)

    def nbytes(self) -> int:
        return super().nbytes() + (4 * 4 * sum(a.numel() for a in self.anchors.values()) if self.collect else 0)

    def state_dict(self) -> dict[str, Any]:
        # While the path is followed, the anchors move: they are among the tensors.
        return {**(Penalty.state_dict(self) if self.collect else super().state_dict()), "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if not self.collect:
            super().load_state_dict(state)
            return
        Penalty.load_state_dict(self, state)
        self.steps = int(state["steps"])

    def tensors(self) -> dict[str, Tensor]:
        if not self.collect:
            return {}
        found: dict[str, Any] = {}
        for n, h in self.held.items():
            found |= {f"anchor.{n}": h.anchor, f"importance.{n}": h.importance, **{f"{k}.{n}": self.path[n][k] for k in _SAVED}}
        return found

    def whole_state(self) -> dict[str, Any]:
        state = self.state_dict()
        if not self.collect:
            return state
        whole = {key: full_tensor(t).cpu().clone() for key, t in self.tensors().items()}
        state |= {k: {n: whole[f"{k}.{n}"] for n in self.held} for k in ("anchor", "importance")}
        return {**state, "path": {n: {k: whole[f"{k}.{n}"] for k in _SAVED} for n in self.held}}

    def load_whole_state(self, state: Mapping[str, Any]) -> None:
        self.load_state_dict(state)
        if self.collect:
            tensors = {f"{k}.{n}": t for k in ("anchor", "importance") for n, t in state[k].items()}
            self.load_tensors(tensors | {f"{k}.{n}": path[k] for n, path in state["path"].items() for k in _SAVED})
