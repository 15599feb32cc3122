"""What happens around one optimizer step: who moves, and how far.

Adam is blind to the scale of a gradient, so a learning rate for some rows of a tensor cannot be had by scaling gradients. But the step of AdamW
(decay included) is linear in its learning rate, so scaling the *update* of some entries, p = p_old + s (p_new - p_old), is exactly a learning
rate s times as large for them. s = 0 keeps them bit for bit: neither decay nor old moments move them.

Parameters that are wholly new get a parameter group of their own, for the length of the step only: what is saved keeps Trainer's two groups,
which `carry` and every other tool can read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_grow.training.masks import Mask, Selection, both, either, inverse, local, local_mask
from hf_grow.training.places import parameters

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module, Parameter


@dataclass(frozen=True)
class Rates:
    """Multiples of the schedule's learning rate at one step."""

    every: float = 1.0
    new: float = 1.0


class Updates:
    """Masks, by parameter name: which entries train (at all), which are new, and which train in each phase.

    `settle` first, once, before the optimizer is made; then `gradients` after every last backward, and `before`/`after` around each step.
    """

    def __init__(self, trains: Mapping[str, Mask], new: Mapping[str, Mask], phases: Sequence[Mapping[str, Mask]] = ()) -> None:
        self.trains, self.new = dict(trains), dict(new)
        self.phases = [{n: both(self.trains[n], phase[n]) for n in self.trains} for phase in phases]
        self._selections: dict[tuple[str, str, int | None], Selection] = {}
        self._held: list[tuple[Tensor, Selection, Tensor, float]] = []
        self._groups: list[dict[str, Any]] | None = None
        self.used: dict[Any, float] = {}
        """The learning rate of every parameter that moves in this step, between `before` and `after`."""

    def settle(self, model: Module) -> None:
        """Parameters that never train need no gradient, and so no memory for one."""
        for name, p in parameters(model).items():
            if self.trains.get(name, True) is False:
                p.requires_grad_(False)

    def _training(self, phase: int | None) -> Mapping[str, Mask]:
        return self.trains if phase is None else self.phases[phase]

    def _selection(self, name: str, kind: str, phase: int | None, mask: Tensor, p: Parameter) -> Selection:
        key = (name, kind, phase)
        if key not in self._selections:
            self._selections[key] = Selection(local_mask(mask, p.data))
        return self._selections[key]

    def gradients(self, model: Module, phase: int | None) -> None:
        """Drops the gradients of whatever does not train in this phase: it neither moves nor counts when the norm is clipped.

        A tensor that is frozen for good in part loses those entries. In a mere phase it keeps them for its moments: a zero second moment beside an
        old step count would make its first updates several times too large.
        """
        import torch

        now = self._training(phase)
        for name, p in parameters(model).items():
            if p.grad is None or name not in now or now[name] is True:
                continue
            if now[name] is False:
                p.grad = None
                continue
            never = inverse(self.trains[name])
            if not isinstance(never, bool):
                chosen = self._selection(name, "never", None, never, p)
                gradient = local(p.grad)
                chosen.put(gradient, torch.zeros_like(chosen.take(gradient)))

    def before(self, model: Module, optimizer: Any, phase: int | None, rates: Rates) -> None:
        """Scales learning rates, and remembers entries whose update is to be another than the optimizer's."""
        assert not self._held and self._groups is None, "two steps at once"
        whole: dict[int, float] = {}
        now = self._training(phase)
        for name, p in parameters(model).items():
            if p.grad is None or name not in now:
                continue
            new, frozen = self.new.get(name, False), inverse(now[name])
            whole[id(p)] = rates.new if new is True else 1.0
            if not isinstance(frozen, bool):
                self._hold(p, self._selection(name, "frozen", phase, frozen, p), 0.0)
            scaled = both(new, inverse(frozen)) if rates.new != 1.0 and not isinstance(new, bool) else False
            if not isinstance(scaled, bool):
                self._hold(p, self._selection(name, "new", phase, scaled, p), rates.new)
            elif scaled:
                whole[id(p)] = rates.new
        if rates.every != 1.0 or any(f != 1.0 for f in whole.values()):
            self._groups = optimizer.param_groups
            optimizer.param_groups = [g for group in optimizer.param_groups for g in split(group, whole, rates.every)]
        self.used = {p: g["lr"] for g in optimizer.param_groups for p in g["params"] if p.grad is not None}

    def _hold(self, p: Parameter, chosen: Selection, factor: float) -> None:
        values = local(p.data)
        self._held.append((values, chosen, chosen.take(values), factor))

    def after(self, optimizer: Any) -> None:
        import torch

        if self._groups is not None:
            optimizer.param_groups = self._groups
            self._groups = None
        for values, chosen, old, factor in self._held:
            chosen.put(values, torch.lerp(old, chosen.take(values), factor) if factor else old)
        self._held.clear()
        self.used = {}

    def describe(self, model: Module) -> list[tuple[str, int, int]]:
        """(what, tensors, parameters) of old, new, partly new and frozen parameters, for people."""
        counts: dict[str, list[int]] = {}
        for name, p in parameters(model).items():
            trains, new = self.trains.get(name, True), self.new.get(name, False)
            kinds = "new" if new is True else "old" if new is False else "old with new rows"
            if trains is False:
                kinds = f"{kinds}, frozen"
            elif trains is not True:
                kinds = f"{kinds}, partly frozen"
            entry = counts.setdefault(kinds, [0, 0])
            entry[0] += 1
            entry[1] += p.numel()
        return [(kind, *found) for kind, found in counts.items()]  # type: ignore[misc]

    def copies(self, model: Module) -> int:
        """Bytes that one step remembers at most, while new rows have a rate of their own or rows are frozen."""
        total = 0
        for name, p in parameters(model).items():
            marked = either(self.new.get(name, False), inverse(self.trains.get(name, True)))
            if not isinstance(marked, bool) and self.trains.get(name, True) is not False:
                total += int(marked.sum()) * p.element_size()
        return total


def split(group: Mapping[str, Any], factors: Mapping[int, float], every: float) -> list[dict[str, Any]]:
    """A parameter group as one for each different factor on its learning rate."""
    by_factor: dict[float, list[Any]] = {}
    for p in group["params"]:
        by_factor.setdefault(factors.get(id(p), 1.0) * every, []).append(p)
    return [{**group, "params": params, "lr": group["lr"] * factor} for factor, params in by_factor.items()]
