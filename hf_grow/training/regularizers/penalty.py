"""The quadratic penalty 1/2 lambda sum F (w - w*)^2: gradient, proximal step and value. EWC (Kirkpatrick et al. 2017, arXiv 1612.00796).

The gradient lambda F (w - w*) is added to p.grad once per optimizer step, after the last backward pass: no graph and no second backward pass, exact
under gradient accumulation (a loss term would count once per micro-batch), and under DDP, whose processes have averaged their gradients by then
and add the same. For sharded parameters (FSDP2) F and w* are sharded alike: every process holds, reads and computes its own part, and nothing is
gathered. The value, for a log, takes one all-reduce.
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
from hf_grow.training.param_updates.shards import holders, is_sharded, local, shard_like, sum_over_processes
from hf_grow.training.regularizers.importance_file import encode_samples, sample_values

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK = 1 << 18
"""Values per operation on a CPU, so that they stay in its cache."""
STORAGE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LearningRate = float | Mapping[Tensor, float]
"""One learning rate, or one per parameter (0 where there is none)."""


class Penalty(ABC):
    """A regularizer as a training loop sees it.

    The loop calls `attach` once, after the model was moved and wrapped. In each optimizer step it calls `add_gradient` after the last backward pass
    and before clipping, then `before_step` and `after_step` around optimizer.step.
    """

    name = ""
    moves_weights = False
    """Whether `after_step` moves the weights, before it calls ``restore_frozen``."""

    def take_anchors(self, model: nn.Module) -> None:  # noqa: B027 (nothing by default)
        """Clones the local shards of the weights that training starts from; for a penalty that was made on the meta device."""

    @abstractmethod
    def attach(self, model: nn.Module) -> None:
        """Binds to the parameters of ``model``. A second call binds to another wrapping of the same model."""

    @abstractmethod
    def add_gradient(self, scale: float = 1.0) -> None:
        """p.grad += scale * d(penalty)/dp. ``scale``: that of the GradScaler, if there is one."""

    def before_step(self) -> None:  # noqa: B027 (nothing by default)
        """Called just before optimizer.step."""

    def after_step(self, lr: LearningRate, restore_frozen: Callable[[], None] = lambda: None) -> None:
        """Called just after optimizer.step, with its learning rate.

        Calls ``restore_frozen`` once, which restores entries that must not move: after a proximal step, and before whatever reads the new weights.
        """
        restore_frozen()

    @abstractmethod
    def value(self) -> float:
        """The penalty at the current weights. One all-reduce for sharded parameters."""

    def finish(self, folder: Path, model: PreTrainedModel) -> None:  # noqa: B027 (nothing by default)
        """Called at the end of training, by every process: writes to ``folder`` what a later training of ``model`` can read."""

    @abstractmethod
    def nbytes(self) -> int:
        """Bytes held for the whole model, over all processes; does not need `attach`."""

    # A resumed run needs `state_dict` and `tensors`. A checkpoint of one file per process keeps them apart; penalty.pt is `whole_state`.

    def state_dict(self) -> dict[str, Any]:
        """What of the state is no tensor, as JSON data. At most one all-reduce for sharded parameters."""
        return {"name": self.name}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises InputError for the state of another penalty."""
        if state.get("name") != self.name:
            raise InputError(f"The checkpoint was saved with penalty {state.get('name')!r}, but the recipe has {self.name!r}.")

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the state, by keys that end in a parameter's name: those in use, not copies, sharded as the parameters are."""
        return {}

    @torch.no_grad()
    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over what `tensors` returned: whole tensors, or sharded as they are here. Raises InputError for those of another penalty."""
        own = self.tensors()
        if differing := sorted(own.keys() ^ tensors.keys()):
            raise InputError(
                f"The state of the penalty in the checkpoint is another model's: {differing[0]} ({len(differing)} such tensors).",
                hint="Resume with the model and the regularizer that the run started with.",
            )
        for key, tensor in own.items():
            local(tensor).copy_(local(shard_like(tensors[key], tensor)))

    def whole_state(self) -> dict[str, Any]:
        """Both in one, with whole tensors on the CPU. Gathers sharded ones: every process must call."""
        return self.state_dict()

    def load_whole_state(self, state: Mapping[str, Any]) -> None:
        self.load_state_dict(state)


def chunks(tensors: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Tensors of one shape (numbers pass) in chunks that fit the cache of a CPU; unsplit on an accelerator, where kernel launches cost more."""
    first, *others = (t for t in tensors if isinstance(t, Tensor))
    if first.device.type != "cpu" or first.numel() <= CHUNK or not all(t.is_contiguous() for t in (first, *others)):
        yield tensors
        return
    flat = [t.view(-1) if isinstance(t, Tensor) else t for t in tensors]
    for start in range(0, first.numel(), CHUNK):
        yield tuple(t[start : start + CHUNK] if isinstance(t, Tensor) else t for t in flat)


def at_least_fp32(tensor: Tensor) -> Tensor:
    return tensor if tensor.element_size() >= 4 else tensor.float()


@dataclass
class HeldParameter:
    """One parameter, its importance (a tensor, or one number) and its anchor."""

    parameter: nn.Parameter
    importance: Tensor | float
    anchor: Tensor

    def local_chunks(self, *more: Tensor) -> Iterator[tuple[Any, ...]]:
        """(parameter, anchor, importance, *more) in chunks of this process's shard."""
        importance = local(self.importance) if isinstance(self.importance, Tensor) else self.importance
        return chunks((local(self.parameter), local(self.anchor), importance, *(local(t) for t in more)))


class AnchoredPenalty(Penalty):
    """A penalty on the distance from the weights that training starts from; a run can be resumed only with the same ones."""

    anchors: dict[str, Tensor]
    """w* by name, sharded as the parameter is (before `attach`, perhaps not yet)."""

    read_anchor: Callable[[str, nn.Parameter], Tensor] | None = None
    """w* of a parameter, given its bare name and itself, sharded as it is. None: the weights that training starts from."""

    @torch.no_grad()
    def take_anchors(self, model: nn.Module) -> None:
        for name, p in parameters(model).items():
            if name in self.anchors:
                anchor = p.detach() if self.read_anchor is None else self.read_anchor(name, p)
                self.anchors[name] = anchor.to(self.anchors[name].dtype, copy=self.read_anchor is None)

    def state_dict(self) -> dict[str, Any]:
        # Not the anchors, which a resumed run loads as its initial weights, but a fingerprint of them.
        return super().state_dict() | {"anchors": encode_samples(sample_values({n: (a, None) for n, a in self.anchors.items()}))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        if state["anchors"] != self.state_dict()["anchors"]:
            raise InputError(
                "The penalty of the checkpoint is anchored to other weights.",
                hint="Make the penalty from the model that the run started from, before the checkpoint is loaded.",
            )


class QuadraticPenalty(AnchoredPenalty):
    """1/2 lambda sum F (w - w*)^2 over all parameters with an anchor.

    Args:
        name: of the penalty, checked on resume.
        strength: lambda.
        anchors: w* by bare parameter name, whole or sharded as the parameter is.
        importance: F of a parameter, given its bare name and itself: whole, sharded as it is, or one number for all entries. Called by `attach`.
        proximal: decoupled form: a proximal step after the optimizer's, instead of a gradient.
        storage: dtype of F.
        scalar_importance: whether F is one number per parameter, for `nbytes`.
    """

    def __init__(
        self,
        name: str,
        strength: float,
        anchors: dict[str, Tensor],
        importance: Callable[[str, nn.Parameter], Tensor | float],
        *,
        proximal: bool = False,
        storage: torch.dtype = torch.float32,
        scalar_importance: bool = False,
    ) -> None:
        self.name, self.strength = name, strength
        self.proximal = self.moves_weights = proximal
        self.storage, self.scalar_importance = storage, scalar_importance
        self.anchors, self.importance = anchors, importance
        self.held: dict[str, HeldParameter] = {}

    def attach(self, model: nn.Module) -> None:
        params = parameters(model)
        unknown = [n for n, p in params.items() if p.requires_grad and n not in self.anchors]
        if unknown:
            raise InputError(
                f"The penalty has no anchor for {unknown[0]} ({len(unknown)} such parameters).",
                hint="Adapters and other new modules have no old weights: train them without a penalty.",
            )
        if any(hasattr(p, "ds_id") for p in params.values()):
            raise InputError("Penalties are not supported with DeepSpeed, which does not expose gradients.", hint="Use FSDP2 or DDP.")
        self.held = {n: self._hold(n, params[n]) for n in self.anchors if n in params}

    def _hold(self, name: str, p: nn.Parameter) -> HeldParameter:
        self.anchors[name] = shard_like(self.anchors[name], p)  # no second copy on another device
        earlier = self.held.get(name)  # of another wrapping
        importance = self.importance(name, p) if earlier is None else earlier.importance
        if isinstance(importance, Tensor):
            importance = shard_like(importance.to(self.storage), p)
        return HeldParameter(p, importance, self.anchors[name])

    @torch.no_grad()
    def add_gradient(self, scale: float = 1.0) -> None:
        if self.proximal:
            return
        weight = self.strength * scale
        for h in self.held.values():
            if not h.parameter.requires_grad:
                continue
            if h.parameter.grad is None:
                h.parameter.grad = torch.zeros_like(h.parameter)
            for p, anchor, f, grad in h.local_chunks(h.parameter.grad):
                difference = _difference(p, anchor)
                if isinstance(f, float):
                    grad.add_(difference, alpha=weight * f)
                elif grad.dtype == difference.dtype == f.dtype:
                    grad.addcmul_(f, difference, value=weight)
                else:
                    grad.add_(difference.mul_(f), alpha=weight)

    def after_step(self, lr: LearningRate, restore_frozen: Callable[[], None] = lambda: None) -> None:
        if self.proximal:
            self._proximal_step(lr)
        restore_frozen()

    @torch.no_grad()
    def _proximal_step(self, lr: LearningRate) -> None:
        """w <- (w + t w*) / (1 + t) with t = lr lambda F: the proximal operator of lr times the penalty."""
        for h in self.held.values():
            rate = lr if isinstance(lr, int | float) else lr.get(h.parameter, 0.0)
            if not h.parameter.requires_grad or not rate:
                continue
            for p, anchor, f in h.local_chunks():
                difference = _difference(p, anchor)
                if isinstance(f, float):
                    t = rate * self.strength * f
                    p.sub_(difference, alpha=t / (1 + t))
                else:
                    t = f.to(difference.dtype) * (rate * self.strength)
                    p.sub_(difference.mul_(t).div_(t.add_(1)))

    @torch.no_grad()
    def value(self) -> float:
        if not self.held:
            return 0.0
        terms = []
        sharded = any(is_sharded(h.parameter) for h in self.held.values())
        for h in self.held.values():
            p = local(h.parameter)
            total = torch.zeros((), dtype=torch.float64 if p.dtype == torch.float64 else torch.float32, device=p.device)
            for w, anchor, f in h.local_chunks():
                difference = _difference(w, anchor)
                total += (difference * difference * f).sum()
            terms.append(total.double() / holders(h.parameter) if sharded else total.double())
        return 0.5 * self.strength * float(sum_over_processes(torch.stack(terms).sum(), (h.parameter for h in self.held.values())))

    def term(self) -> Tensor:
        """The penalty as a differentiable scalar, for a custom loss; add it once per optimizer step, not per micro-batch."""
        return sum(
            (0.5 * self.strength * (h.importance * (h.parameter - h.anchor).square()).sum() for h in self.held.values()),
            start=torch.zeros(()),
        )

    def nbytes(self) -> int:
        importance = 0 if self.scalar_importance else self.storage.itemsize
        return sum(a.numel() * (a.element_size() + importance) for a in self.anchors.values())


def _difference(p: Tensor, anchor: Tensor) -> Tensor:
    """w - w* in at least fp32: bf16 would round it once more."""
    return p - anchor if p.element_size() >= 4 else p.float() - anchor.float()
