"""Which decoder layers are checkpointed: their activations are computed again in the backward pass instead of kept.

Trainer checkpoints all layers, or every n-th (`activation_checkpointing_kwargs: {every_n_layers: n}`); `checkpointed_layers` names them.
Every decoder layer of transformers has a flag for it, so that one process, DDP and FSDP2 do the same. Gradients do not depend on it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from hf_grow.errors import InputError
from hf_grow.growth.plan import GrowthPlan

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from hf_grow.training.config.train_options import TrainOptions

_KEY = "checkpointed_layers"


def new_layers(plan: GrowthPlan | None) -> tuple[int, ...]:
    """Decoder layers that the growth added."""
    return () if plan is None else tuple(i for i, o in enumerate(plan.growth.layers) if o.new or o.identity)


def checkpointed_layers(options: TrainOptions, arguments: TrainingArguments, plan: GrowthPlan | None, layers: int) -> frozenset[int]:
    """The checkpointed ones of a model of so many `layers`. Raises InputError for options that contradict each other or name other layers."""
    chosen = options.checkpointed_layers
    every = (arguments.activation_checkpointing_kwargs or {}).get("every_n_layers")
    if every is not None and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
        raise InputError(f"activation_checkpointing_kwargs.every_n_layers should be a number of layers, at least 1, got {every!r}.")
    if not arguments.activation_checkpointing:
        if chosen is not None:
            raise InputError(f"{_KEY} requires activation_checkpointing.", hint="Set activation_checkpointing: true, or remove it.")
        return frozenset()
    if chosen is None:
        return frozenset(range(0, layers, every or 1))
    if every is not None:
        raise InputError(f"{_KEY} cannot be combined with every_n_layers.", hint="Remove one of them.")
    if isinstance(chosen, list):
        return _named(chosen, layers)
    new = new_layers(plan)
    if not new:
        raise InputError(f"{_KEY} is {chosen}, and the model has no layers that a growth added.", hint="Give a list of layers.")
    return frozenset(new) if chosen == "new_layers" else frozenset(range(layers)) - frozenset(new)


def _named(chosen: Collection[int], layers: int) -> frozenset[int]:
    missing = [i for i in chosen if not 0 <= i < layers]
    if missing:
        raise InputError(f"{_KEY}: there is no layer {missing[0]}.", hint=f"The layers are 0 to {layers - 1}.")
    return frozenset(chosen)
