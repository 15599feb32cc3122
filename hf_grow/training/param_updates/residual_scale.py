"""Blending new blocks in: forward hooks that scale what a block adds to the residual stream. Weights stay as they are, so what is saved is plain."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module


def decoder_layers(model: Any) -> list[Module]:
    """The blocks of a causal language model, whatever peft wrapped around it."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    return list(plain.base_model.layers)


class ResidualScale:
    """h + alpha * (block(h) - h) in place of block(h), for some blocks. No hook stays where alpha is 1: then the forward is untouched."""

    def __init__(self, model: Any, blocks: Iterable[int]) -> None:
        layers = decoder_layers(model)
        self.layers = {i: layers[i] for i in blocks}
        self.alpha = 1.0
        self._hooks: list[Any] = []
        self._scales: list[Tensor] = []

    def set(self, alpha: float) -> None:
        """A new alpha for all of them, from the next forward pass on."""
        self.alpha = alpha
        if alpha == 1.0:
            self._remove()
        elif self._hooks:
            for scale in self._scales:
                scale.fill_(alpha)
        else:
            self._hooks = [self._hook(layer, alpha) for layer in self.layers.values()]

    def _hook(self, layer: Module, alpha: float) -> Any:
        import torch

        # A tensor, not a number: a compiled forward would be compiled again for every number.
        scale = torch.tensor(alpha, device=next(layer.parameters()).device)
        self._scales.append(scale)

        def blend(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            block_input = args[0] if args else kwargs["hidden_states"]
            block_output = output[0] if isinstance(output, tuple) else output
            blended = block_input + (block_output - block_input) * scale.to(block_output.dtype)
            return (blended, *output[1:]) if isinstance(output, tuple) else blended

        return layer.register_forward_hook(blend, with_kwargs=True)

    def _remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._scales = [], []

    @contextmanager
    def without(self, block: int) -> Iterator[None]:
        """The model without what one block adds, for as long as the context is open."""
        scale_count = len(self._scales)
        hook = self._hook(self.layers[block], 0.0)
        try:
            yield
        finally:
            hook.remove()
            del self._scales[scale_count:]
