"""The head of a model on its own: hidden states to logits, in the model's own code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class Head:
    """The head of a model, and what its own code makes of the head's output."""

    def __init__(self, model: Any) -> None:
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.module = self.model.get_output_embeddings()
        kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(self.model.config)]
        # The model's class around nothing: what goes in as hidden states comes out as the head's output.
        shell = kind.__new__(kind)
        nn.Module.__init__(shell)
        own = {k: v for k, v in vars(self.model).items() if k not in vars(shell) and k not in ("forward", "_loss_function")}
        vars(shell).update(own)
        shell.add_module(self.model.base_model_prefix, _Passing())
        shell.add_module(next(n for n, m in self.model.named_children() if m is self.module), nn.Identity())
        self._forward: Callable[..., Any] = kind.forward
        self._shell = shell

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [n, H] to logits [n, V]. The head's parameters must be whole."""
        return self.finish(type(self.module).forward(self.module, hidden))

    def finish(self, output: Tensor) -> Tensor:
        """The head's output [n, V] to logits: scaled, capped or as it is."""
        found: Tensor = self._forward(self._shell, inputs_embeds=output[None]).logits[0]
        return found

    @contextmanager
    def replaced(self, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Inside, the head computes ``function`` of the hidden states instead."""
        self.module.forward = function
        try:
            yield
        finally:
            del self.module.forward


class _Passing(nn.Module):
    """In the place of the decoder."""

    def forward(self, inputs_embeds: Tensor, **_: Any) -> Any:
        from transformers.modeling_outputs import MoeModelOutputWithPast

        return MoeModelOutputWithPast(last_hidden_state=inputs_embeds)
