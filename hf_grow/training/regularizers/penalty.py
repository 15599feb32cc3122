"""The penalty 1/2 lambda sum F (w - w*)^2: its gradient, its proximal step, its value. EWC (Kirkpatrick et al. 2017, arXiv 1612.00796).

The gradient lambda F (w - w*) is added to p.grad once an optimizer step, after the last backward: no graph, no second backward, right under
gradient accumulation (a term in the loss would count once a micro-batch), and under DDP, whose processes have averaged their gradients by
then and add the same. Sharded parameters (FSDP2: DTensor) get F and w* sharded alike, so that every process works on its own rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_grow.errors import InputError
from hf_grow.training.param_updates.parameter_map import parameters
from hf_grow.training.regularizers.importance_file import full_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK = 1 << 18
"""Values worked on at a time on a CPU: they stay in the cache between operations."""
STORAGE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LearningRate = float | Mapping[Tensor, float]


class Penalty(ABC):
    """What the trainer knows. A training loop calls, in this order: attach once, after the model is on its devices and wrapped; then for each
    step add_gradient after the last backward and before clipping, before_step and after_step around optimizer.step."""

    name = ""

    @abstractmethod
    def attach(self, model: nn.Module) -> None:
        """Binds to the parameters of `model`. Called again, it binds to those of another wrapping of the same model."""

    @abstractmethod
    def add_gradient(self, scale: float = 1.0) -> None:
        """p.grad += scale * d(penalty)/dp; `scale` is the GradScaler's, if there is one."""

    def before_step(self) -> None:  # noqa: B027 (nothing by default)
        """Just before optimizer.step."""

    def after_step(self, lr: LearningRate, settle: Callable[[], None] = lambda: None) -> None:
        """Just after optimizer.step, with its learning rate, or one for each parameter.

        ``settle`` is called once: it puts back what must not move. A proximal step comes before it, what looks at the step that was done after.
        """
        settle()

    @abstractmethod
    def value(self) -> float:
        """The penalty at the current weights. Where parameters are sharded, every process must ask."""

    def finish(self, folder: Path, model: PreTrainedModel) -> None:  # noqa: B027 (nothing by default)
        """When training is over: writes into `folder`, where the trained `model` goes, what a later run may read. Every process must call."""

    @abstractmethod
    def nbytes(self) -> int:
        """Bytes it holds for the whole model, all processes together. Needs no `attach`."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs. Where parameters are sharded, every process must ask."""
        return {"name": self.name}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises InputError for the state of another penalty."""
        if state.get("name") != self.name:
            raise InputError(f"The checkpoint was saved with penalty {state.get('name')!r}, the recipe asks for {self.name!r}.")


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor on the parameter's device, sharded as the parameter is."""
    if not hasattr(parameter, "placements"):
        return tensor.to(parameter.device)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)

    mesh, placements = parameter.device_mesh, parameter.placements
    # Every process has the whole: no one sends anything. The copy lets go of it.
    shard = distribute_tensor(tensor.to(parameter.device), mesh, placements, src_data_rank=None)
    return DTensor.from_local(shard.to_local().clone(), mesh, placements, shape=tensor.shape, stride=tensor.stride())


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, sharing its memory."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part.detach()


def chunks(tensors: tuple[Tensor | float, ...]) -> Iterator[tuple[Any, ...]]:
    """Equal tensors (numbers pass) in pieces that fit the cache of a CPU; whole on an accelerator, where a launch costs more."""
    held = [t for t in tensors if isinstance(t, Tensor)]
    if held[0].device.type != "cpu" or held[0].numel() <= CHUNK or not all(t.is_contiguous() for t in held):
        yield tensors
        return
    flat = [t.view(-1) if isinstance(t, Tensor) else t for t in tensors]
    for start in range(0, held[0].numel(), CHUNK):
        yield tuple(t[start : start + CHUNK] if isinstance(t, Tensor) else t for t in flat)


@dataclass
class HeldParameter:
    """One parameter with its importance (a tensor, or one number) and its anchor."""

    parameter: nn.Parameter
    importance: Tensor | float
    anchor: Tensor


class AnchoredPenalty(Penalty):
    """A penalty that holds weights near those that training started from; a run is only resumed near the same ones."""

    anchors: dict[str, Tensor]
    """w*, whole tensors by name."""

    def state_dict(self) -> dict[str, Any]:
        from hf_grow.training.regularizers.importance_file import encode_samples, sample_values

        # Anchors are the weights that training starts from, which a resumed run loads first as well; this tells whether they are the same.
        return super().state_dict() | {"anchors": encode_samples({n: sample_values(a) for n, a in self.anchors.items()})}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        if state["anchors"] != self.state_dict()["anchors"]:
            raise InputError(
                "The run to be resumed was held near other weights than these.",
                hint="Make the penalty from the model that the run started from, before the checkpoint is loaded.",
            )


class QuadraticPenalty(AnchoredPenalty):
    """1/2 lambda sum F (w - w*)^2 over parameters.

    ``anchors``: w* by bare parameter name, whole tensors. ``importance``: gives F of a parameter, whole, when it is attached.
    """

    def __init__(
        self,
        name: str,
        strength: float,
        anchors: dict[str, Tensor],
        importance: Callable[[str], Tensor | float],
        *,
        proximal: bool = False,
        storage: torch.dtype = torch.float32,
        even: bool = False,
    ) -> None:
        """``even``: F is one number, for `nbytes`."""
        self.name, self.strength, self.proximal, self.storage, self.even = name, strength, proximal, storage, even
        self.anchors, self.importance = anchors, importance
        self.held: dict[str, HeldParameter] = {}

    def attach(self, model: nn.Module) -> None:
        found = parameters(model)
        unknown = [n for n, p in found.items() if p.requires_grad and n not in self.anchors]
        if unknown:
            raise InputError(
                f"The penalty holds no anchor for {unknown[0]} ({len(unknown)} such parameters).",
                hint="Adapters and other new modules cannot be held near weights that they did not have; train without a penalty.",
            )
        if any(hasattr(p, "ds_id") for p in found.values()):
            raise InputError("Penalties do not work under DeepSpeed, which keeps the gradients to itself.", hint="Use FSDP2 or DDP.")
        self.held = {n: self._hold(n, found[n]) for n in self.anchors if n in found}

    def _hold(self, name: str, p: nn.Parameter) -> HeldParameter:
        anchor = shard_like(full_tensor(self.anchors[name]), p)
        self.anchors[name] = anchor  # one copy, wherever it lies now
        importance = self.importance(name)
        if isinstance(importance, Tensor):
            importance = shard_like(importance.to(self.storage), p)
        return HeldParameter(p, importance, anchor)

    def add_gradient(self, scale: float = 1.0) -> None:
        if not self.proximal:
            self._add(scale)

    @torch.no_grad()
    def _add(self, scale: float) -> None:
        weight = self.strength * scale
        for h in self.held.values():
            if not h.parameter.requires_grad:
                continue
            if h.parameter.grad is None:
                h.parameter.grad = torch.zeros_like(h.parameter)
            of = h.importance
            parts = (local(h.parameter.grad), local(h.parameter), local(h.anchor), local(of) if isinstance(of, Tensor) else of)
            for grad, p, anchor, f in chunks(parts):
                away = _difference(p, anchor)
                if isinstance(f, float):
                    grad.add_(away, alpha=weight * f)
                elif grad.dtype == away.dtype == f.dtype:
                    grad.addcmul_(f, away, value=weight)
                else:
                    grad.add_(away.mul_(f), alpha=weight)

    def after_step(self, lr: LearningRate, settle: Callable[[], None] = lambda: None) -> None:
        if self.proximal:
            self._pull(lr)
        settle()

    @torch.no_grad()
    def _pull(self, lr: LearningRate) -> None:
        """w <- (w + t w*) / (1 + t) with t = lr lambda F, the proximal operator of lr times the penalty."""
        for h in self.held.values():
            rate = lr if isinstance(lr, int | float) else lr.get(h.parameter, 0.0)
            if not h.parameter.requires_grad or not rate:
                continue
            of = h.importance
            for p, anchor, f in chunks((local(h.parameter), local(h.anchor), local(of) if isinstance(of, Tensor) else of)):
                back = _difference(p, anchor)
                if isinstance(f, float):
                    t = rate * self.strength * f
                    p.sub_(back, alpha=t / (1 + t))
                else:
                    t = f.to(back.dtype) * (rate * self.strength)
                    p.sub_(back.mul_(t).div_(t.add_(1)))

    @torch.no_grad()
    def value(self) -> float:
        if not self.held:
            return 0.0
        terms = []
        for h in self.held.values():
            of = h.importance
            p = local(h.parameter)
            total = torch.zeros((), dtype=torch.float64 if p.dtype == torch.float64 else torch.float32, device=p.device)
            for w, anchor, f in chunks((p, local(h.anchor), local(of) if isinstance(of, Tensor) else of)):
                away = _difference(w, anchor)
                total += (away * away * f).sum()
            terms.append(_sum_over_shards(total, h.parameter))
        return 0.5 * self.strength * float(torch.stack(terms).double().sum())

    def term(self) -> Tensor:
        """The penalty as a differentiable number, for a loss of one's own: add it once an optimizer step, not once a micro-batch."""
        return sum(
            (0.5 * self.strength * (h.importance * (h.parameter - h.anchor).square()).sum() for h in self.held.values()),
            start=torch.zeros(()),
        )

    def nbytes(self) -> int:
        count = sum(a.numel() for a in self.anchors.values())
        return sum(a.numel() * a.element_size() for a in self.anchors.values()) + (0 if self.even else count * self.storage.itemsize)


def _difference(p: Tensor, anchor: Tensor) -> Tensor:
    """w - w*, at least in fp32: differences of bf16 weights would be rounded once more."""
    return p - anchor if p.element_size() >= 4 else p.float() - anchor.float()


def _sum_over_shards(total: Tensor, parameter: Tensor) -> Tensor:
    """The sum over the processes that hold different rows of a parameter; replicas count once."""
    if not hasattr(parameter, "placements"):
        return total
    from torch.distributed.tensor import DTensor, Partial, Replicate

    assert isinstance(parameter, DTensor)

    kinds = [Partial() if p.is_shard() else Replicate() for p in parameter.placements]
    whole: Tensor = DTensor.from_local(total, parameter.device_mesh, kinds).full_tensor()
    return whole
