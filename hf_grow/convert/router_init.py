"""Router initialisation from prompts: example texts that each expert should, or should not, receive.

In each layer an expert's row is the mean vector of its positive prompts minus that of its negative prompts, normalised to length 1. This
follows mergekit-moe's gate modes with one difference: its `hidden` modes take the residual stream before a layer, whereas here the vector is the
router's own input, the hidden state after attention and post_attention_layernorm. A router logit is then the dot product of two vectors of the
same kind.

prompts       hidden states of the dense source in fp32, pooled over a prompt's tokens (including the special tokens that the tokenizer
              adds): their mean, or the last one.
cheap-embed   mean of the input embeddings of a prompt's tokens; the same row in every layer. Reads only those embeddings.

Only one decoder layer is in memory at a time (`layer_streaming`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal

from hf_grow.checkpoint.reader import Checkpoint
from hf_grow.errors import InputError, PlanError, SourceError
from hf_grow.growth.plan import check_source
from hf_grow.methods.experts.prompts import PromptsFile
from hf_grow.model.loading import TOKENIZER_HINT, load_tokenizer, transformers_errors

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["prompts", "cheap-embed"]
Pooling = Literal["mean", "last"]

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
NO_DIRECTION = 1e-6
"""A difference of means that is smaller than this, relative to the means, is rounding error."""
SAME = 1 - 1e-5
"""Two experts whose rows exceed this cosine similarity in every layer receive the same tokens."""
ALIKE = 0.99
"""The user is told of two rows that exceed this cosine similarity."""


def router_rows(
    checkpoint: Checkpoint,
    prompts: PromptsFile,
    *,
    kind: Kind,
    pooling: Pooling = "mean",
    notify: Callable[[str], None] = lambda message: None,
) -> dict[int, Tensor]:
    """Layer -> its router weight, float32 [experts, hidden_size], with rows of length 1.

    ``notify`` receives messages for the user. Raises SourceError for a source without a usable tokenizer or with non-finite activations,
    PlanError for a mixture of experts, InputError for prompts that have no tokens or that the model cannot tell apart.
    """
    arch = checkpoint.info.architecture
    if kind == "cheap-embed" and pooling != "mean":
        raise InputError(
            f"cheap-embed takes the mean of a prompt's embeddings; pooling {pooling} is for prompts.", hint="Remove --prompt-pooling."
        )
    if kind == "prompts" and arch.is_moe:
        raise PlanError(
            "The source is a mixture; hidden states of prompts are taken from a dense source.",
            hint="--router cheap-embed takes mixtures too.",
        )
    if checkpoint.folder is None:
        raise SourceError(f"The weights of {checkpoint.ref} are not on this machine, and router rows from prompts are computed with them.")
    check_source(checkpoint.info)
    tokens = _tokenized(checkpoint, prompts, notify)

    from hf_grow.checkpoint.stored_tensors import StoredTensors
    from hf_grow.convert.layer_streaming import embed_tokens, mlp_inputs

    tensors = StoredTensors(checkpoint)
    embedded = {text: embed_tokens(checkpoint, tensors, ids) for text, ids in tokens.items()}
    if kind == "cheap-embed":
        same = _rows(prompts, {text: _pooled(rows, "mean") for text, rows in embedded.items()}, checkpoint.ref, "in the embedding")
        rows = {layer: same.clone() for layer in range(arch.layers)}
    else:
        pooled = mlp_inputs(checkpoint, tensors, embedded, lambda states: _pooled(states, pooling))
        rows = {layer: _rows(prompts, vectors, checkpoint.ref, f"in layer {layer}") for layer, vectors in enumerate(pooled)}
    _check_alike(rows, notify)
    return rows


# Texts to tokens


def _tokenized(checkpoint: Checkpoint, prompts: PromptsFile, notify: Callable[[str], None]) -> dict[str, list[int]]:
    """Prompt -> its token ids; a prompt that is given several times has one entry."""
    tokenizer = _tokenizer(checkpoint)
    arch = checkpoint.info.architecture
    places = {
        text: f"experts.{i}.{side}.{j}"
        for i, expert in enumerate(prompts.experts)
        for side in ("positive", "negative")
        for j, text in enumerate(getattr(expert, side))
    }
    with transformers_errors(f"the tokenizer of {checkpoint.ref}", TOKENIZER_HINT):
        found = {text: [int(i) for i in tokenizer(text, verbose=False)["input_ids"]] for text in places}
        empty = [place for text, place in places.items() if not tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
    if empty:
        raise InputError(f"The tokenizer of {checkpoint.ref} makes no tokens of {', '.join(empty)}.", hint="Rewrite those prompts.")
    largest = max(max(ids) for ids in found.values())
    if largest >= arch.size("vocab"):
        raise SourceError(
            f"The tokenizer of {checkpoint.ref} gives token {largest}; the embedding has {arch.size('vocab')} rows.",
            hint="The tokenizer belongs to another model.",
        )
    limit = checkpoint.config.get("max_position_embeddings")
    long = [text for text, ids in found.items() if isinstance(limit, int) and len(ids) > limit > 0]
    if long:
        number = "1 prompt is" if len(long) == 1 else f"{len(long)} prompts are"
        notify(f"{number} longer than the source's {limit} positions; only the first {limit} tokens are used.")
    return {text: ids[:limit] if text in long else ids for text, ids in found.items()}


def _tokenizer(checkpoint: Checkpoint) -> Any:
    assert checkpoint.folder is not None
    if not any((checkpoint.folder / name).is_file() for name in TOKENIZER_FILES):
        raise SourceError(
            f"{checkpoint.ref} has no tokenizer, so prompts cannot be read.",
            hint="Put its tokenizer.json and tokenizer_config.json beside the weights, or choose a router without prompts (--router normal).",
        )
    return load_tokenizer(checkpoint.folder, checkpoint.ref)


# Hidden states to rows


def _pooled(states: Tensor, pooling: Pooling) -> Tensor:
    """[tokens, hidden] -> float64 [hidden]."""
    return states.double().mean(0) if pooling == "mean" else states[-1].double()


def _rows(prompts: PromptsFile, pooled: Mapping[str, Tensor], ref: str, where: str) -> Tensor:
    """One router's weight, float32 [experts, hidden]. Raises SourceError for non-finite values, InputError for a zero difference."""
    import torch

    if not all(bool(v.isfinite().all()) for v in pooled.values()):
        raise SourceError(f"{ref} computes values that are not finite {where}.", hint="Its weights are damaged; download them again.")
    rows, empty = [], []
    for number, expert in enumerate(prompts.experts):
        positive = torch.stack([pooled[t] for t in expert.positive]).mean(0)
        negative = torch.stack([pooled[t] for t in expert.negative]).mean(0) if expert.negative else torch.zeros_like(positive)
        row = positive - negative
        if row.norm() <= NO_DIRECTION * max(positive.norm(), negative.norm()):
            empty.append(str(number))
        rows.append(row / row.norm())
    if empty:
        raise InputError(
            f"Positive and negative prompts of expert {', '.join(empty)} have the same mean {where}; that gives no direction.",
            hint="Give negative prompts of another kind, or none.",
        )
    return torch.stack(rows).float()


def _check_alike(rows: Mapping[int, Tensor], notify: Callable[[str], None]) -> None:
    """Raises InputError for two experts with the same rows in every layer; notifies of those that are nearly the same in some."""
    import torch

    cosines = torch.stack([r @ r.T for r in rows.values()])  # [layers, experts, experts]
    pairs = list(combinations(range(cosines.shape[1]), 2))
    same = [f"{i} and {j}" for i, j in pairs if bool((cosines[:, i, j] > SAME).all())]
    if same:
        raise InputError(
            f"Experts {', '.join(same)} have the same router rows in every layer, so they would always be chosen together.",
            hint="Give them prompts that the model can tell apart.",
        )
    alike = [(float(cosines[:, i, j].max()), i, j) for i, j in pairs if bool((cosines[:, i, j] > ALIKE).any())]
    if alike:
        cosine, i, j = max(alike)
        others = f", and {len(alike) - 1} other pairs nearly so" if len(alike) > 1 else ""
        layers = int((cosines[:, i, j] > ALIKE).sum())
        notify(
            f"The router rows of experts {i} and {j} are nearly the same in {layers} of {len(cosines)} layers (cosine up to {cosine:.4f}){others}: "
            "negative prompts would tell them apart."
        )
