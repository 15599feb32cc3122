"""How a model in memory trains, as far as its FLOPs depend on it."""

from __future__ import annotations

from typing import Any

from hf_grow.model.flops import Training
from hf_grow.training.param_updates.parameter_map import bare, parameter_map


def training_of(model: Any, *, attention: str | None = None) -> Training:
    """What of a model trains, and what is computed again: told by requires_grad, adapters and flags of its layers. On any device, meta too.

    ``attention``: the implementation, if not the model's own.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    trains, adapters = {}, {}
    for name, p in base.named_parameters():
        module, _, adapter = bare(name).partition(".lora_A.")
        if adapter:
            adapters[f"{module}.weight"] = int(p.shape[0])
        elif ".lora_B." not in name:
            trains[bare(name)] = p.requires_grad
    frozen = {disk.replace(".base_layer.", ".") for disk, rows in parameter_map(base).items() if not trains.get(rows.parameter, True)}
    layers = list(base.model.layers)
    checkpointed = frozenset(i for i, layer in enumerate(layers) if _checkpoints(layer))
    options = getattr(getattr(layers[0], "_gradient_checkpointing_func", None), "keywords", {})
    return Training(
        frozen=frozenset(frozen),
        adapters=adapters,
        checkpointed=checkpointed,
        embeddings_require_grad=bool(getattr(base, "_require_grads_hooks", None)),
        reentrant=bool(options.get("use_reentrant")),
        attention=attention or base.config._attn_implementation,
    )


def _checkpoints(layer: Any) -> bool:
    return bool(getattr(layer, "gradient_checkpointing", False)) or hasattr(layer, "_checkpoint_wrapped_module")
