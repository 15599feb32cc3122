"""The model that is sampled from: loaded with its tokenizer, and identified by its weights."""

from __future__ import annotations

from collections import Counter

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_grow.checkpoint.reader import Checkpoint
from hf_grow.errors import InputError
from hf_grow.model.loading import load_tokenizer
from hf_grow.verification.eval_text import has_tokenizer
from hf_grow.verification.models import load_model

_TORCH_NAMES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def load_with_tokenizer(checkpoint: Checkpoint, dtype: str, device: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a checkpoint.

    ``dtype``: a torch dtype by name, or "auto" for the most common one of the checkpoint. ``device``: default: the first GPU, else the CPU.
    Raises InputError if there is no tokenizer or no such device.
    """
    if dtype == "auto":
        dtype = _TORCH_NAMES[Counter(t.dtype for t in checkpoint.tensors.values()).most_common(1)[0][0]]
    tokenizer, model = load_tokenizer_of(checkpoint), load_model(checkpoint, dtype)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return model.to(device), tokenizer
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without that device
        raise InputError(
            f"{checkpoint.ref} cannot be moved to {device}: {str(error).splitlines()[0]}", hint="Use another --device."
        ) from None


def load_tokenizer_of(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """Raises InputError if there is no tokenizer."""
    if checkpoint.folder is None or not has_tokenizer(checkpoint):
        raise InputError(f"{checkpoint.ref} has no usable tokenizer.", hint="Copy the tokenizer's files into the folder of config.json.")
    return load_tokenizer(checkpoint.folder, checkpoint.ref)


def weights_digest(model: PreTrainedModel) -> str:
    """XXH3-128 of all weights by name: independent of how they are sharded and where they are stored."""
    import xxhash

    state = xxhash.xxh3_128()
    for name, tensor in model.state_dict().items():
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        state.update(tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy())
    return str(state.hexdigest())
