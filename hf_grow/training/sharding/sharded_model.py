"""A model that is sharded before it has weights: built on the meta device, sharded by FSDP2, then filled by every process from the rows it holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from hf_grow.errors import SourceError
from hf_grow.model.loading import reset_output_flags, transformers_errors
from hf_grow.training.param_updates.parameter_map import bare, parameter_map, parameters
from hf_grow.training.param_updates.residual_scale import decoder_layers
from hf_grow.training.sharding.local_rows import Places, by_parameter, local_tensor
from hf_grow.training.sharding.row_source import RowSource

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor
    from transformers import PreTrainedModel


def empty_model(
    config: Mapping[str, Any], dtype: torch.dtype, folder: Path | None = None, attention: str | None = None, **implementations: str
) -> PreTrainedModel:
    """The model of a config.json with parameters on the meta device and real buffers (rotary frequencies).

    ``folder``: where generation_config.json is. ``attention``: attn_implementation; ``implementations``: experts_implementation.
    Raises SourceError as `meta_model` does.
    """
    from accelerate import init_empty_weights
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, GenerationConfig

    settings = dict(config)
    kind = settings.pop("model_type")
    with transformers_errors(f"a model of these settings ({kind})"):
        made = AutoConfig.for_model(kind, **settings)
        reset_output_flags(made)
        made.dtype = dtype
        implementations |= {} if attention is None else {"attn_implementation": attention}
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = MODEL_FOR_CAUSAL_LM_MAPPING[type(made)]._from_config(made, dtype=dtype, **implementations)
        model.tie_weights()  # each parameter was moved to the meta device on its own
        if folder is not None and (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    if folder is not None:
        model.config.name_or_path = str(folder)
    return model


def fill_model(model: PreTrainedModel, places: Places, source: RowSource, device: Any) -> None:
    """Gives every parameter on the meta device its values on `device`: of a DTensor, the local shard alone.

    ``places``: `parameter_map` of the model before it was wrapped. Memory: this process's shards and one block of rows.
    Raises SourceError if the source lacks a tensor, or has tensors that are not the model's.
    """
    import torch
    from torch import nn

    unknown = sorted(n for n in source.names() if n not in places and n not in model.state_dict())
    if unknown:
        raise SourceError(f"{unknown[0]} is not a tensor of this model ({len(unknown)} such tensors).")
    held = by_parameter(places)
    filled: dict[str, nn.Parameter] = {}
    for name, p in model.named_parameters():
        if p.device.type == "meta":
            filled[name] = nn.Parameter(local_tensor(p, held[bare(name)], source, p.dtype, device), requires_grad=p.requires_grad)
    state: dict[str, Any] = dict(filled)
    for name, buffer in model.named_buffers():
        if name in source.names():  # few and small: biases of routers
            state[name] = source.rows(name, 0, source.shape(name)[0]).to(buffer.dtype).to(device)
    with torch.no_grad():
        model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    left = [n for n, p in model.named_parameters() if p.device.type == "meta"]
    if left:
        raise SourceError(f"{left[0]} got no weights ({len(left)} such parameters).")


def shard_frozen(model: PreTrainedModel, source: RowSource, accelerator: Any) -> None:
    """Cuts a model on the meta device that only computes forward over all processes, and fills this process's shards, in the model's dtype.

    Every process must take part in every forward pass. What the head holds stays gathered after one, until `gathered_head` lets it go: logits may
    be computed from hidden states.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import OffloadPolicy, fully_shard

    model.eval().requires_grad_(False)
    places = parameter_map(model)
    mesh, plugin = accelerator.torch_device_mesh, getattr(accelerator.state, "fsdp_plugin", None)
    mesh = (
        init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        if mesh is None
        else mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)]
    )
    shard: Any = partial(fully_shard, mesh=mesh, offload_policy=OffloadPolicy() if plugin is None else plugin.cpu_offload)
    for layer in decoder_layers(model):
        shard(layer)
    head = model.get_output_embeddings()
    tied = head.weight is model.get_input_embeddings().weight
    if not tied:
        shard(head, reshard_after_forward=False)
    shard(model, reshard_after_forward=not tied)
    fill_model(model, places, source, shard_device(accelerator))


def shard_device(accelerator: Any) -> Any:
    """The device of the shards: the processor where FSDP2 offloads them, else the accelerator's."""
    from torch.distributed.fsdp import CPUOffloadPolicy

    offload = getattr(getattr(accelerator.state, "fsdp_plugin", None), "cpu_offload", None)
    return "cpu" if isinstance(offload, CPUOffloadPolicy) else accelerator.device


@contextmanager
def gathered_head(model: Any) -> Iterator[None]:
    """Inside, the head of a model of `shard_frozen` is whole, and can be called on its own. Other models are left alone."""
    from torch.distributed.fsdp import FSDPModule

    unit = next((m for m in (model.get_output_embeddings(), model) if isinstance(m, FSDPModule)), None)
    if unit is None:
        yield
        return
    unit.unshard()
    try:
        yield
    finally:
        unit.reshard()


def held_tensors(model: Any) -> dict[str, Tensor]:
    """Parameters and saved buffers of a model by bare names, tied ones once; of a sharded model DTensors."""
    # First: after an evaluation FSDP2 still shows gathered parameters, already freed, until this.
    saved = {bare(n) for n in model.state_dict()}
    held: dict[str, Tensor] = {n: p.detach() for n, p in parameters(model).items()}
    return held | {bare(n): b for n, b in model.named_buffers() if bare(n) in saved}
