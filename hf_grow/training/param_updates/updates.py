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

from hf_grow.training.param_updates.masks import Mask, Selection, both, either, inverse, local, local_mask
from hf_grow.training.param_updates.parameter_map import parameters

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module, Parameter


@dataclass(frozen=True)
class LrFactors:
    """Multiples of the schedule's learning rate at one step."""

    every: float = 1.0
    new: float = 1.0


@dataclass(frozen=True)
class _Role:
    """What one parameter does in one phase, with its masks turned into what a step needs."""

    frozen: bool
    """None of it trains."""
    new: bool
    """All of it is new, as far as it trains."""
    kept: Selection | None
    """Entries that stay as they are."""
    lost: Selection | None
    """Entries that never train, in any phase: they have no gradient either."""
    scaled: Selection | None
    """New entries beside old ones."""


class ParamUpdates:
    """Masks, by parameter name: which entries train (at all), which are new, and which train in each phase.

    `freeze` first, once, before the optimizer is made; then `gradients` after every last backward, and `before`/`after` around each step.
    """

    def __init__(self, trains: Mapping[str, Mask], new: Mapping[str, Mask], phases: Sequence[Mapping[str, Mask]] = ()) -> None:
        self.trains, self.new = dict(trains), dict(new)
        self.phases = [{n: both(self.trains[n], phase[n]) for n in self.trains} for phase in phases]
        self._roles: dict[tuple[str, int | None], _Role] = {}
        self._held: list[tuple[Tensor, Selection, Tensor, float]] = []
        self._groups: list[dict[str, Any]] | None = None
        self.used: dict[Any, float] = {}
        """The learning rate of every parameter that moves in this step, between `before` and `after`."""

    def freeze(self, model: Module) -> None:
        """Parameters that never train need no gradient, and so no memory for one."""
        for name, p in parameters(model).items():
            if self.trains.get(name, True) is False:
                p.requires_grad_(False)

    def _role(self, name: str, p: Parameter, phase: int | None) -> _Role:
        """Made once for each phase: masks of a large model are not worked through at every step."""
        key = (name, phase)
        if key not in self._roles:
            now = (self.trains if phase is None else self.phases[phase]).get(name, True)
            new = self.new.get(name, False)

            def entries(mask: Mask) -> Selection | None:
                return None if isinstance(mask, bool) else Selection(local_mask(mask, p.data))

            scaled = both(new, now)
            alone = isinstance(scaled, bool) or (not isinstance(now, bool) and either(inverse(now), new) is True)
            self._roles[key] = _Role(
                frozen=now is False,
                new=scaled is not False and alone,
                kept=entries(inverse(now)),
                lost=entries(inverse(self.trains.get(name, True))),
                scaled=None if alone else entries(scaled),
            )
        return self._roles[key]

    def gradients(self, model: Module, phase: int | None) -> None:
        """Drops the gradients of whatever does not train in this phase: it neither moves nor counts when the norm is clipped.

        A tensor that is frozen for good in part loses those entries. In a mere phase it keeps them for its moments: a zero second moment beside an
        old step count would make its first updates several times too large.
        """
        import torch

        for name, p in parameters(model).items():
            if p.grad is None:
                continue
            role = self._role(name, p, phase)
            if role.frozen:
                p.grad = None
            elif role.lost is not None:
                gradient = local(p.grad)
                role.lost.put(gradient, torch.zeros_like(role.lost.take(gradient)))

    def before(self, model: Module, optimizer: Any, phase: int | None, rates: LrFactors) -> None:
        """Scales learning rates, and remembers entries whose update is to be another than the optimizer's."""
        assert not self._held and self._groups is None, "two steps at once"
        whole: dict[int, float] = {}
        for name, p in parameters(model).items():
            if p.grad is None:
                continue
            role = self._role(name, p, phase)
            whole[id(p)] = rates.new if role.new else 1.0
            if role.kept is not None:
                self._hold(p, role.kept, 0.0)
            if role.scaled is not None and rates.new != 1.0:
                self._hold(p, role.scaled, rates.new)
        if rates.every != 1.0 or any(f != 1.0 for f in whole.values()):
            self._groups = optimizer.param_groups
            optimizer.param_groups = [g for group in optimizer.param_groups for g in split(group, whole, rates.every)]
        self.used = {p: g["lr"] for g in optimizer.param_groups for p in g["params"] if p.grad is not None}

    def _hold(self, p: Parameter, chosen: Selection, factor: float) -> None:
        values = local(p.data)
        self._held.append((values, chosen, chosen.take(values), factor))

    def after(self, optimizer: Any) -> None:
        if self._groups is not None:
            optimizer.param_groups = self._groups
            self._groups = None
        for values, chosen, old, factor in self._held:
            now = values if chosen.dim < 0 else chosen.take(values)
            chosen.put(values, old.lerp_(now, factor) if factor else old)
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

    def copies(self, model: Module, *, warming: bool) -> int:
        """Values that one step remembers at most: frozen rows, and new ones beside old ones while they have a rate of their own (`warming`)."""
        total = 0
        for name in parameters(model):
            trains, new = self.trains.get(name, True), self.new.get(name, False)
            if not isinstance(trains, bool):
                total += trains.numel()
            scaled = both(new, trains) if warming and not isinstance(new, bool) else False
            total += 0 if isinstance(scaled, bool) else scaled.numel()
        return total


def split(group: Mapping[str, Any], factors: Mapping[int, float], every: float) -> list[dict[str, Any]]:
    """A parameter group as one for each different factor on its learning rate."""
    by_factor: dict[float, list[Any]] = {}
    for p in group["params"]:
        by_factor.setdefault(factors.get(id(p), 1.0) * every, []).append(p)
    return [{**group, "params": params, "lr": group["lr"] * factor} for factor, params in by_factor.items()]
