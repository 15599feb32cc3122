"""Where every tensor of a checkpoint on disk lies in the parameters of a model in memory.

transformers fuses experts: [experts, 2*inter, hidden] in memory is a matrix an expert and projection on disk. Each tensor on disk is a run of
rows of one parameter, once that is seen as a matrix of its last dimension, so that values move between the two without a second copy of
the model. Found by sending row numbers through transformers' own conversion; nothing here knows how a family is fused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_grow.errors import ExecutionError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn
    from transformers import PreTrainedModel

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")


@dataclass(frozen=True)
class ParameterRows:
    """Rows [start, stop) of a parameter seen as a matrix of its last dimension (of a vector: entries)."""

    parameter: str
    start: int
    stop: int

    def of(self, parameter: Tensor) -> Tensor:
        """This part of a tensor that has the parameter's shape, as a view."""
        if parameter.dim() == 1:
            return parameter[self.start : self.stop]
        return parameter.view(-1, parameter.shape[-1])[self.start : self.stop]


def bare(name: str) -> str:
    """A parameter's name without what DDP, torch.compile and activation checkpointing put before it."""
    return _WRAPPERS.sub("", name)


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by their bare names; tied ones once."""
    return {bare(n): p for n, p in model.named_parameters()}


def shapes_on_disk(model: PreTrainedModel, rows: Mapping[str, ParameterRows]) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of `parameter_map`; no data is read."""
    import torch

    meta = {bare(n): torch.empty(p.shape, device="meta") for n, p in model.named_parameters()}
    return {n: tuple(r.of(meta[r.parameter]).shape) for n, r in rows.items()}


def parameter_map(model: PreTrainedModel) -> dict[str, ParameterRows]:
    """Name on disk -> rows, for every parameter of `model` (not wrapped; on any device, meta too).

    Raises ExecutionError if transformers stores a parameter in another way than by rows.
    """
    import torch

    from hf_grow.convert.in_memory import disk_names

    rows: dict[str, ParameterRows] = {}
    for name, p in model.named_parameters():
        numbered = torch.arange(p.numel()) if p.dim() == 1 else torch.arange(p.numel() // p.shape[-1]).view(*p.shape[:-1], 1)
        for on_disk, numbers in disk_names(model, {name: numbered}).items():
            flat = numbers.reshape(-1)
            start = int(flat[0])
            if not torch.equal(flat, torch.arange(start, start + flat.numel())):
                raise ExecutionError(f"{on_disk} does not hold consecutive rows of {name}; hf-grow does not support this layout.")
            rows[on_disk] = ParameterRows(bare(name), start, start + flat.numel())
    return rows
