"""The diagonal of the Fisher information, estimated on text.

    true        labels are sampled from the model: F = E_x E_{y ~ p(y|x)} (d log p(y|x) / dw)^2 (Kunstner, Balles and Hennig 2019, arXiv 1905.12558,
                on why not the empirical one). Scores of different tokens are then uncorrelated, so the gradient of a whole batch serves:
                E (sum of scores)^2 = E sum of scores^2, without a loop over tokens.
    empirical   labels are the text's. Their scores are correlated, so squares are taken one sequence at a time.

F is per token: F = N mean(g^2) for g the gradient of the mean loss over N tokens, averaged over batches. It does not depend on the batch size, and
neither does lambda in 1/2 lambda sum F (w - w*)^2. Squares are summed in fp32 (fp64 for a model in fp64).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_grow.common.extras import require_packages
from hf_grow.errors import ExecutionError, InputError
from hf_grow.training.config.data_options import TextOptions
from hf_grow.training.config.fisher_options import FisherOptions
from hf_grow.training.data import packing
from hf_grow.training.data.sources import explain_read_errors, find_text
from hf_grow.training.param_updates.parameter_map import parameter_map

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DOCUMENTS_PER_BATCH = 64
"""Documents tokenised at once."""
MAX_OVERSAMPLING = 16
"""Up to this many times the wanted sequences are read, so that the chosen ones are not all from the first document."""
_NOT_FINITE_HINT = "Compute with --dtype float32, and check the model's weights with hf-grow verify."


def sample_sequences(
    text: Sequence[str], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, length: int, count: int, seed: int
) -> Tensor:
    """Up to ``count`` sequences of ``length`` tokens, evenly spread over (the start of) the text and shuffled: int64 [n, length].

    ``text``: paths, globs or a Hub id. Raises InputError for text that cannot be read or is shorter than one sequence.
    """
    require_packages("datasets")
    limit = model.config.max_position_embeddings
    if length > limit:
        raise InputError(
            f"Sequences of {length} tokens are longer than the {limit} positions of the model.", hint=f"Use --seq-length {limit}."
        )
    source = find_text(TextOptions(path=list(text)))
    encoder = packing.DocumentEncoder(tokenizer, "tokenizer")
    blocks, rest, tokens = [np.empty((0, length), np.int32)], np.empty(0, np.int32), 0
    with explain_read_errors(source.label):
        for batch in packing.batches(source.documents(), DOCUMENTS_PER_BATCH):
            block, rest = packing.split_sequences(rest, encoder(batch), length)
            blocks.append(block)
            tokens += block.size
            if tokens >= MAX_OVERSAMPLING * count * length:
                break
    rows = np.concatenate(blocks)
    if not len(rows):
        raise InputError(f"{source.label} has fewer than {length} tokens.", hint="Use more text, or a smaller --seq-length.")
    packing.check_token_ids(int(rows.max()), model.get_input_embeddings().num_embeddings, source.label)
    chosen = torch.from_numpy(rows[np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int))].astype(np.int64))
    return chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))]


def estimate_fisher(
    model: PreTrainedModel, rows: Tensor, options: FisherOptions, *, progress: Callable[[int], None] = lambda tokens: None
) -> tuple[dict[str, Tensor], int]:
    """F of every parameter by its name in memory, on the model's device, and the number of labels that it was estimated from.

    ``rows``: token ids [sequences, length]. The model is left as it was; dropout is off meanwhile. Needs one fp32 copy of the parameters beside the
    model and its gradients. Raises ExecutionError if a value is not finite.
    """
    training, required = model.training, {n: p.requires_grad for n, p in model.named_parameters()}
    model.eval().requires_grad_(True)
    generator = torch.Generator(model.device).manual_seed(options.seed)
    squares = {n: torch.zeros(p.shape, dtype=accumulation_dtype(p), device=p.device) for n, p in model.named_parameters()}
    size = 1 if options.exact or options.kind == "empirical" else options.batch
    total = 0
    try:
        for batch in rows.split(size):  # type: ignore[no-untyped-call]
            count = _backward(model, batch.to(model.device), options.kind == "true", generator)
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if p.grad is not None:  # None for experts without tokens
                        grad = p.grad.to(squares[name].dtype)
                        squares[name].addcmul_(grad, grad, value=float(count) ** 2)
                        p.grad = None
            total += count
            progress(batch.numel())
    finally:
        model.zero_grad(set_to_none=True)
        model.train(training)
        for n, p in model.named_parameters():
            p.requires_grad_(required[n])
    for name, square in squares.items():
        if not bool(torch.isfinite(square.div_(total)).all()):
            raise ExecutionError(f"The Fisher of {name} is not finite.", hint=_NOT_FINITE_HINT)
    return squares, total


def _backward(model: PreTrainedModel, ids: Tensor, sampled_labels: bool, generator: torch.Generator) -> int:
    """Gradients of the mean loss over the tokens of a batch; returns the number of labels."""
    logits = model(input_ids=ids, use_cache=False).logits
    if sampled_labels:
        labels = _sample_labels(logits.detach(), generator)
    else:
        logits, labels = logits[:, :-1], ids[:, 1:]
    flat = logits.reshape(-1, logits.shape[-1])
    F.cross_entropy(flat if flat.element_size() >= 4 else flat.float(), labels.reshape(-1)).backward()  # type: ignore[no-untyped-call]
    return int(labels.numel())


def _sample_labels(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A label for every position from softmax(logits): [B, L, V] -> [B, L]; one sequence at a time to save memory."""
    labels = []
    for row in logits:
        probabilities = row.float().softmax(-1)
        if not bool(torch.isfinite(probabilities).all()):
            raise ExecutionError("The model's logits are not finite.", hint=_NOT_FINITE_HINT)
        labels.append(torch.multinomial(probabilities, 1, generator=generator).squeeze(-1))
    return torch.stack(labels)


def accumulation_dtype(p: Tensor) -> torch.dtype:
    """Sums of many small terms are not kept in 16 bits."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def by_names_on_disk(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(name on disk, tensor) of tensors by parameter name in memory, as views."""
    for name, rows in parameter_map(model).items():
        yield name, rows.of(tensors[rows.parameter])


def merge_online(new: Iterable[tuple[str, Tensor]], old: Callable[[str], Tensor], decay: float) -> Iterator[tuple[str, Tensor]]:
    """Online EWC's running Fisher at a new task (Schwarz et al. 2018, arXiv 1805.06370): decay * old + new."""
    for name, tensor in new:
        yield name, old(name).to(tensor.device, tensor.dtype).mul_(decay).add_(tensor)


def expert_utility(layers: int, experts: int, tensors: Iterable[tuple[str, Tensor]], entries: Mapping[str, Any]) -> list[list[float]]:
    """Sum of F over each expert, [layers][experts], zeros for dense layers; Expert Upcycling (arXiv 2604.19835) copies those with the most.

    ``tensors``: (name on disk, F); ``entries``: of the architecture's table, by name.
    """
    sums = [[0.0] * experts for _ in range(layers)]
    for name, tensor in tensors:
        entry = entries[name]
        if entry.expert >= 0:
            sums[entry.layer][entry.expert] += float(tensor.double().sum())
    return sums


def estimation_memory(parameters: int, dtype_bytes: int) -> dict[str, int]:
    """Bytes of an estimation without activations: weights, their gradients, fp32 squares."""
    return {"weights": parameters * dtype_bytes, "gradients": parameters * dtype_bytes, "squares": parameters * 4}
