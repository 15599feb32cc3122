"""Freezing and learning-rate multipliers, per parameter and per row.

Adam is blind to the scale of a gradient, so scaling gradients cannot give some rows of a tensor another learning rate. But the update of AdamW
(decay included) is linear in the learning rate, so scaling the *update* of some entries, p = p_old + s (p_new - p_old), is exactly a learning
rate s times as large for them. s = 0 keeps them bit for bit: neither weight decay nor old moments move them.

Parameters that are wholly new lie in parameter groups of their own, of kind "new" (`name_groups`), whose learning rate is multiplied in each step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_grow.training.param_updates.masks import Mask, RowMask, both, either, inverse
from hf_grow.training.param_updates.parameter_map import bare, parameters
from hf_grow.training.param_updates.selection import Selection
from hf_grow.training.param_updates.shards import local

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module, Parameter

    _Batch = list[tuple[Parameter, list[tuple[Selection, float]]]]
    """Parameters, and what of each is copied, with the factor of its update."""

GROUP_KIND = "hf_grow_kind"
"""Key of a parameter group that `name_groups` made; not `name`, which an optimizer that the user passes may use."""
NEW, OLD = "new", "old"
"""Its values."""
STEPPED_BY_PARAMETER = frozenset({"adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"})
"""Trainer's names of the optimizers for which `steps_by_parameter` is true."""
COPY_BYTES = 256 << 20
"""Most bytes that are copied at a time, unless one parameter has more."""


@dataclass(frozen=True)
class LrFactors:
    """Multiples of the schedule's learning rate in one step: of all parameters, and further of new ones."""

    all: float = 1.0
    new: float = 1.0


@dataclass(frozen=True)
class _Selections:
    """The entries of one parameter that a step of one phase restores, masks or scales."""

    frozen: bool
    """No entry trains."""
    kept: Selection | None
    """Entries that do not train in this phase."""
    untrained: Selection | None
    """Entries that train in no phase: they get no gradient either."""
    scaled: Selection | None
    """New entries of a parameter that is not wholly new."""


class ParamUpdates:
    """Which entries of which parameters train (at all, and in each phase), and which are new.

    ``trains``, ``new``, ``phases``: masks by parameter name. Call `freeze` once, before the optimizer is made, and `name_groups` once after it;
    then `mask_gradients` after every last backward, and `before_step` and `after_step` around each optimizer step.
    """

    def __init__(self, trains: Mapping[str, Mask], new: Mapping[str, Mask], phases: Sequence[Mapping[str, Mask]] = ()) -> None:
        self.trains, self.new = dict(trains), dict(new)
        self.phases = [{n: both(self.trains[n], phase[n]) for n in self.trains} for phase in phases]
        self._cache: dict[tuple[str, int | None], _Selections] = {}
        self._held: list[tuple[Tensor, Selection, list[Tensor], float]] = []
        self._batches: list[_Batch] = []
        """Of the step that comes, if it has several."""
        self._groups: list[dict[str, Any]] = []
        """The optimizer's parameter groups while it steps a batch."""
        self._hooked: Any = None
        self._lr: list[float] | None = None
        self._unsplit: list[tuple[int, list[tuple[int, int]]]] = []
        """For each group before `name_groups`: its first group after it, and the (group, position) of its parameters."""
        self.step_lr: dict[Any, float] = {}
        """The learning rate of every parameter that has a gradient, between `before_step` and `after_step`."""

    def freeze(self, model: Module) -> None:
        """Parameters that never train need no gradient, and no memory for one."""
        for name, p in parameters(model).items():
            if self.trains.get(name, True) is False:
                p.requires_grad_(False)

    def name_groups(self, model: Module, optimizer: Any) -> None:
        """Splits parameter groups into one of old and one of wholly new parameters, told by GROUP_KIND."""
        if any(GROUP_KIND in group for group in optimizer.param_groups):
            return
        names = {id(p): n for n, p in model.named_parameters()}
        groups: list[dict[str, Any]] = []
        self._unsplit = []
        for group in optimizer.param_groups:
            own = {kind: {**group, GROUP_KIND: kind, "params": []} for kind in (OLD, NEW)}
            order = []
            for p in group["params"]:
                name = NEW if self._wholly_new(bare(names[id(p)])) else OLD
                order.append((name, len(own[name]["params"])))
                own[name]["params"].append(p)
            index = {}
            for name in (n for n in own if own[n]["params"] or (n == OLD and not order)):
                index[name] = len(groups)
                groups.append(own[name])
            self._unsplit.append((min(index.values()), [(index[name], at) for name, at in order]))
        optimizer.param_groups[:] = groups

    @contextmanager
    def unsplit_groups(self, optimizer: Any, scheduler: Any) -> Iterator[None]:
        """While open, optimizer and scheduler have the groups that `name_groups` split: checkpoints hold Trainer's, which every tool can read."""
        split = list(optimizer.param_groups)
        if not any(GROUP_KIND in group for group in split):
            yield
            return
        firsts = [first for first, _ in self._unsplit]
        merged = [{**split[first], "params": [split[g]["params"][at] for g, at in members]} for first, members in self._unsplit]
        optimizer.param_groups[:] = [{k: v for k, v in group.items() if k != GROUP_KIND} for group in merged]
        lists = {k: v for k, v in vars(scheduler).items() if isinstance(v, list) and len(v) == len(split)}
        vars(scheduler).update({k: [v[i] for i in firsts] for k, v in lists.items()})
        try:
            yield
        finally:
            optimizer.param_groups[:] = split
            vars(scheduler).update(lists)

    def _wholly_new(self, name: str) -> bool:
        """Whether all entries that ever train are new."""
        trains, new = self.trains.get(name, True), self.new.get(name, False)
        return both(new, trains) is not False and either(inverse(trains), new) is True

    def _selections(self, name: str, p: Parameter, phase: int | None) -> _Selections:
        """Computed once for each phase."""
        key = (name, phase)
        if key not in self._cache:
            trains_now = (self.trains if phase is None else self.phases[phase]).get(name, True)
            new = self.new.get(name, False)

            def selection(mask: Mask) -> Selection | None:
                return Selection(mask.local(p.data), local(p.data).device) if isinstance(mask, RowMask) else None

            self._cache[key] = _Selections(
                frozen=trains_now is False,
                kept=selection(inverse(trains_now)),
                untrained=selection(inverse(self.trains.get(name, True))),
                scaled=None if self._wholly_new(name) else selection(both(new, trains_now)),
            )
        return self._cache[key]

    def mask_gradients(self, model: Module, phase: int | None) -> None:
        """Drops the gradients of parameters that do not train in this phase, so that they do not count in gradient clipping.

        Of a parameter that is partly frozen throughout, those entries are zeroed. Entries frozen in this phase only keep their gradients for Adam's
        moments: a zero second moment with a large step count would make the first updates several times too large.
        """
        for name, p in parameters(model).items():
            if p.grad is None:
                continue
            selections = self._selections(name, p, phase)
            if selections.frozen:
                p.grad = None
            elif selections.untrained is not None:
                selections.untrained.fill(local(p.grad), 0.0)

    def before_step(self, model: Module, optimizer: Any, phase: int | None, factors: LrFactors, *, at_once: bool = False) -> None:
        """Multiplies learning rates, and copies the entries whose update will be scaled or undone.

        Copies larger than COPY_BYTES are made by batches of parameters, each just before the optimizer steps it, and used just after.
        ``at_once``: something else moves the weights before `after_step`, so that all copies must stay until then.
        """
        assert not self._held and self._lr is None, "before_step was called twice without after_step"
        batches: list[_Batch] = [[]]
        size = 0
        for name, p in parameters(model).items():
            if p.grad is None:
                continue
            selections = self._selections(name, p, phase)
            parts = [] if selections.kept is None else [(selections.kept, 0.0)]
            if selections.scaled is not None and factors.new != 1.0:
                parts.append((selections.scaled, factors.new))
            nbytes = p.element_size() * sum(selection.size for selection, _ in parts)
            if batches[-1] and size + nbytes > COPY_BYTES:
                batches.append([])
                size = 0
            if parts:
                batches[-1].append((p, parts))
                size += nbytes
        self._lr = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * (factors.all * (factors.new if group.get(GROUP_KIND) == NEW else 1.0))
        self.step_lr = {p: g["lr"] for g in optimizer.param_groups for p in g["params"] if p.grad is not None}
        if len(batches) > 1 and not at_once and steps_by_parameter(optimizer):
            self._batches = batches
            if self._hooked is not optimizer:
                optimizer.register_step_pre_hook(self._step_batches)
                optimizer.register_step_post_hook(self._step_ended)
                self._hooked = optimizer
        else:
            for batch in batches:
                self._hold(batch)

    def _step_batches(self, optimizer: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Before the optimizer's step: steps all batches but the last, and leaves that and all parameters without copies to the step itself."""
        batches, self._batches = self._batches, []
        if not batches:
            return
        step, groups = type(optimizer).step.__wrapped__, list(optimizer.param_groups)  # the step without hooks
        self._groups = groups
        done: list[Parameter] = []
        for batch in batches[:-1]:
            members = [p for p, _ in batch]
            optimizer.param_groups[:] = _restricted(groups, members)
            self._hold(batch)
            step(*args, **options)
            self._release()
            done += members
        optimizer.param_groups[:] = _restricted(groups, done, inverted=True)
        self._hold(batches[-1])

    def _step_ended(self, optimizer: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        if self._groups:
            optimizer.param_groups[:] = self._groups
            self._groups = []
            self._release()

    def _hold(self, batch: _Batch) -> None:
        for p, parts in batch:
            values = local(p.data)
            self._held += [(values, selection, selection.take(values), factor) for selection, factor in parts]

    def _release(self) -> None:
        """Scales or undoes the updates of the entries that were copied."""
        for values, selection, old, factor in self._held:
            selection.restore(values, old, factor)
        self._held.clear()

    def after_step(self, optimizer: Any) -> None:
        """Restores learning rates, and releases what is still held."""
        for group, lr in zip(optimizer.param_groups, self._lr or (), strict=True):
            group["lr"] = lr
        self._lr, self._batches = None, []  # batches are left where a GradScaler skipped the step
        self._release()
        self.step_lr = {}

    def describe(self, model: Module) -> list[tuple[str, int, int]]:
        """(kind, tensors, parameters) of old, new, partly new and frozen parameters, for display."""
        counts: dict[str, list[int]] = {}
        for name, p in parameters(model).items():
            trains, new = self.trains.get(name, True), self.new.get(name, False)
            kind = "new" if new is True else "old" if new is False else "old with new rows"
            if trains is False:
                kind = f"{kind}, frozen"
            elif trains is not True:
                kind = f"{kind}, partly frozen"
            count = counts.setdefault(kind, [0, 0])
            count[0] += 1
            count[1] += p.numel()
        return [(kind, *count) for kind, count in counts.items()]  # type: ignore[misc]

    def copied_bytes(self, model: Module, width: int, *, new_lr: bool, shards: int = 1, at_once: bool = False) -> int:
        """Bytes that one step holds copies of at a time at most, over ``shards`` processes that hold a part of each parameter.

        ``width``: bytes of a weight; ``new_lr``: new parameters have a rate of their own; ``at_once``: as in `before_step`, or the optimizer does not step by parameter.
        """
        sizes = [0]
        for name in parameters(model):
            trains, new = self.trains.get(name, True), self.new.get(name, False)
            scaled = both(new, trains) if new_lr and not self._wholly_new(name) else False
            sizes.append(width * sum(Selection(m).size for m in (inverse(trains), scaled) if isinstance(m, RowMask)))
        return sum(sizes) if at_once else min(sum(sizes), max(max(sizes), shards * COPY_BYTES))


def steps_by_parameter(optimizer: Any) -> bool:
    """Whether the optimizer steps each parameter by its own gradient and state alone, so that some at a time is the same as all at once.

    Those of torch (but LBFGS) and transformers do. Others may not (Prodigy sums over parameters, bitsandbytes looks up settings by position).
    """
    kind = type(optimizer)
    return kind.__module__.startswith(("torch.optim.", "transformers.optimization")) and kind.__name__ != "LBFGS"


def _restricted(groups: Sequence[dict[str, Any]], chosen: Sequence[Parameter], *, inverted: bool = False) -> list[dict[str, Any]]:
    """The groups with the chosen parameters alone, or with all others; those that have some."""
    members = set(map(id, chosen))
    found = [{**group, "params": [p for p in group["params"] if (id(p) in members) is not inverted]} for group in groups]
    return [group for group in found if group["params"]]


def unwrapped(wrapper: Any) -> Any:
    """The torch optimizer or scheduler inside accelerate's wrapper."""
    return getattr(wrapper, "optimizer" if hasattr(wrapper, "param_groups") else "scheduler", wrapper)
