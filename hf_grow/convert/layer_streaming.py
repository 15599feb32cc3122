"""Layer-by-layer forward pass of a dense decoder from its files, with one layer in memory at a time.

Each layer processes the sequences one by one, without padding, before the next layer is read. The forward pass is that of transformers,
including the masks and rotary embeddings it computes for that layer; all other layers are replaced by a pass-through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_grow.checkpoint.reader import Checkpoint
from hf_grow.growth.evaluate import BLOCK
from hf_grow.growth.tensors import TensorRows
from hf_grow.model.family import Dim
from hf_grow.model.loading import reset_output_flags, transformers_errors


def embed_tokens(checkpoint: Checkpoint, tensors: TensorRows, ids: Sequence[int]) -> Tensor:
    """Input embeddings of token ids, float32 [tokens, hidden]; only the rows needed are read."""
    table = next(n for n, e in checkpoint.info.architecture.tensors.items() if e.spec.dims[0] == Dim("in", ("vocab",)))
    rows = {i: tensors.rows(table, i, i + 1).to(torch.float32) for i in set(ids)}
    return torch.cat([rows[i] for i in ids])


def mlp_inputs(
    checkpoint: Checkpoint,
    tensors: TensorRows,
    embedded: Mapping[str, Tensor],
    pool: Callable[[Tensor], Tensor],
) -> Iterator[dict[str, Tensor]]:
    """For each layer in turn: sequence name -> ``pool`` of its MLP input, which is float32 [tokens, hidden] for weights of any dtype.

    ``embedded``: sequence name -> input embeddings, [tokens, hidden]. Raises SourceError if transformers cannot build the model.
    """
    model = _meta_decoder(checkpoint)
    stream = {name: rows[None] for name, rows in embedded.items()}
    memory: dict[str, Tensor] = {}
    for index, layer in enumerate(list(model.layers)):
        model.layers = nn.ModuleList(layer if i == index else _PassThrough() for i in range(len(model.layers)))
        _load_layer(memory, index, checkpoint, tensors)
        layer.load_state_dict(memory, assign=True)
        seen: list[Tensor] = []
        layer.mlp.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(pool(args[0][0])))
        with torch.inference_mode():
            for name, states in stream.items():
                stream[name] = model(inputs_embeds=states, use_cache=False).last_hidden_state
        yield dict(zip(stream, seen, strict=True))


class _PassThrough(nn.Module):
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


def _meta_decoder(checkpoint: Checkpoint) -> Any:
    """The source's decoder on the meta device, without the final norm; only the rotary embedding is computed (from the config)."""
    from transformers import AutoConfig, AutoModel

    settings = dict(checkpoint.config)
    with transformers_errors(f"the model of {checkpoint.ref}"):
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        reset_output_flags(config)
        with torch.device("meta"):
            model = AutoModel.from_config(config, dtype=torch.float32).eval()
        model.rotary_emb = type(model.rotary_emb)(config=config)
    model.norm = _PassThrough()
    return model


def _load_layer(memory: dict[str, Tensor], index: int, checkpoint: Checkpoint, tensors: TensorRows) -> None:
    """Reads one layer's weights into `memory`, as fp32 by their names within the layer.

    The previous layer's memory is reused, since freed memory can fragment. Tensors are read in blocks, so that none is in memory twice.
    """
    for name, entry in checkpoint.info.architecture.tensors.items():
        if entry.layer != index:
            continue
        whole = memory.setdefault(name.removeprefix(f"model.layers.{index}."), torch.empty(entry.shape))
        step = max(1, BLOCK // whole[0].nbytes)
        for start in range(0, entry.shape[0], step):
            stop = min(start + step, entry.shape[0])
            whole[start:stop] = tensors.rows(name, start, stop)
