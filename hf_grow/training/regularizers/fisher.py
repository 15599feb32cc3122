"""The diagonal of the Fisher information, estimated on text: what each weight matters for what the model says of it.

    true        labels are drawn from the model itself: F = E_x E_{y ~ p(y|x)} (d log p(y|x) / dw)^2 (Kunstner, Balles and Hennig 2019,
                arXiv 1905.12558, on why not the other one). Scores of different tokens are then uncorrelated, so the gradient of a whole batch
                serves: (sum of scores)^2 has the mean sum of scores^2, and no loop over samples is needed.
    empirical   labels are the text's. Scores do not average out, so this is taken a sequence at a time.

F counts per token, F = N mean(g^2) for g the gradient of the mean loss over N tokens, averaged over batches; so it does not depend on the
batch size, and neither does lambda in 1/2 lambda sum F (w - w*)^2. Squares are added up in fp32 (fp64 where the model is fp64).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hf_grow.common.extras import require_packages
from hf_grow.errors import ExecutionError, InputError
from hf_grow.training.config.fisher_options import FisherOptions

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DOCUMENTS_PER_BATCH = 64
"""Documents tokenised at once."""
MAX_OVERSAMPLING = 16
"""Sequences are chosen evenly from up to this many times as many, so that they are not all from the first document."""


def sample_sequences(
    text: Sequence[str], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, length: int, count: int, seed: int
) -> Tensor:
    """Up to `count` sequences of `length` tokens, evenly spread over (the start of) the text and shuffled: int64 [n, length].

    Raises InputError for text that cannot be read, or fills no sequence.
    """
    require_packages("datasets")
    import numpy as np
    import torch

    from hf_grow.training.config.data_options import TextOptions
    from hf_grow.training.data import packing
    from hf_grow.training.data.sources import explain_read_errors, find_text

    most = model.config.max_position_embeddings
    if length > most:
        raise InputError(f"Sequences of {length} tokens are longer than the {most} positions of the model.", hint=f"--seq-length {most}")
    source = find_text(TextOptions(path=list(text)))
    encoder = packing.DocumentEncoder(tokenizer, "tokenizer")
    found, rest, tokens = [], np.empty(0, np.int32), 0
    with explain_read_errors(source.label):
        for batch in packing.batches(source.documents(), DOCUMENTS_PER_BATCH):
            rows, rest = packing.split_sequences(rest, encoder(batch), length)
            found.append(rows)
            tokens += rows.size
            if tokens >= MAX_OVERSAMPLING * count * length:
                break
    rows = np.concatenate(found) if found else np.empty((0, length), np.int32)
    if not len(rows):
        raise InputError(f"{source.label} holds fewer than {length} tokens.", hint="Use more text, or a smaller --seq-length.")
    packing.check_token_ids(int(rows.max()), model.get_input_embeddings().num_embeddings, source.label)
    chosen = torch.from_numpy(rows[np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int))].astype(np.int64))
    return chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))]


def estimate_fisher(
    model: PreTrainedModel, rows: Tensor, options: FisherOptions, *, progress: Callable[[int], None] = lambda tokens: None
) -> tuple[dict[str, Tensor], int]:
    """F of every parameter by its name in memory, on the model's device, and the number of tokens that it was estimated on.

    ``rows``: [sequences, length]. The model is left as it was; its dropout is off meanwhile. Needs one fp32 copy of the parameters beside
    the model and its gradients.
    """
    import torch

    training, wanted = model.training, {n: p.requires_grad for n, p in model.named_parameters()}
    model.eval().requires_grad_(True)
    device = model.device
    generator = torch.Generator(device).manual_seed(options.seed)
    squares = {n: torch.zeros(p.shape, dtype=_accumulation_dtype(p), device=p.device) for n, p in model.named_parameters()}
    size = 1 if options.exact or options.kind == "empirical" else options.batch
    total = 0
    try:
        for batch in rows.split(size):  # type: ignore[no-untyped-call]
            count = _backward(model, batch.to(device), options.kind == "true", generator)
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if p.grad is not None:  # experts that no token reached have none
                        grad = p.grad.to(squares[name].dtype)
                        squares[name].addcmul_(grad, grad, value=float(count) ** 2)
                        p.grad = None
            total += count
            progress(batch.numel())
    finally:
        model.zero_grad(set_to_none=True)
        model.train(training)
        for n, p in model.named_parameters():
            p.requires_grad_(wanted[n])
    for name, square in squares.items():
        if not bool(torch.isfinite(square.div_(total)).all()):
            raise ExecutionError(
                f"The Fisher of {name} is not finite.", hint="Compute with --dtype float32; are the model's weights sound?"
            )
    return squares, total


def _backward(model: PreTrainedModel, ids: Tensor, from_model: bool, generator: Any) -> int:
    """Gradients of the mean loss over the tokens of a batch; returns their number."""
    import torch.nn.functional as F

    logits = model(input_ids=ids, use_cache=False).logits
    if not from_model:
        logits, labels = logits[:, :-1], ids[:, 1:]
    else:
        labels = _sample_labels(logits.detach(), generator)
    flat = logits.reshape(-1, logits.shape[-1])
    F.cross_entropy(flat if flat.element_size() >= 4 else flat.float(), labels.reshape(-1)).backward()  # type: ignore[no-untyped-call]
    return int(labels.numel())


def _sample_labels(logits: Tensor, generator: Any) -> Tensor:
    """A token at every place, from the model's own distribution; one sequence at a time, for memory."""
    import torch

    drawn = []
    for row in logits:
        share = row.float().softmax(-1)
        if not bool(torch.isfinite(share).all()):
            raise ExecutionError(
                "The model computes values that are not finite.", hint="Compute with --dtype float32; are its weights sound?"
            )
        drawn.append(torch.multinomial(share, 1, generator=generator).squeeze(-1))
    return torch.stack(drawn)


def _accumulation_dtype(p: Tensor) -> Any:
    import torch

    return torch.float64 if p.dtype == torch.float64 else torch.float32


def by_names_on_disk(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Tensors by names in memory -> by names on disk, as views, one at a time."""
    from hf_grow.training.param_updates.parameter_map import parameter_map

    for name, place in parameter_map(model).items():
        yield name, place.of(tensors[place.parameter])


def merge_online(new: Iterable[tuple[str, Tensor]], old: Callable[[str], Tensor], decay: float) -> Iterator[tuple[str, Tensor]]:
    """The running Fisher of online EWC at a new task (Schwarz et al. 2018, arXiv 1805.06370): decay * old + new."""
    for name, tensor in new:
        yield name, old(name).to(tensor.device, tensor.dtype).mul_(decay).add_(tensor)


def expert_utility(layers: int, experts: int, tensors: Iterable[tuple[str, Tensor]], entries: Mapping[str, Any]) -> list[list[float]]:
    """Squared gradients added up for each expert: a list for each layer, zeros where it is dense. Expert Upcycling (arXiv 2604.19835) copies
    those with the most."""
    found = [[0.0] * experts for _ in range(layers)]
    for name, tensor in tensors:
        entry = entries[name]
        if entry.expert >= 0:
            found[entry.layer][entry.expert] += float(tensor.double().sum())
    return found


def estimation_memory(parameters: int, dtype_bytes: int) -> dict[str, int]:
    """Bytes that an estimation takes, without activations: weights, their gradients, fp32 squares."""
    return {"weights": parameters * dtype_bytes, "gradients": parameters * dtype_bytes, "squares": parameters * 4}
