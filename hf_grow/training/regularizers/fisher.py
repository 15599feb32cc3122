"""The diagonal of the Fisher information, estimated on text.

    true        labels are sampled from the model: F = E_x E_{y ~ p(y|x)} (d log p(y|x) / dw)^2 (Kunstner, Balles and Hennig 2019, arXiv 1905.12558,
                on why not the empirical one). Scores of different tokens are then uncorrelated, so the gradient of a whole batch serves:
                E (sum of scores)^2 = E sum of scores^2, without a loop over tokens.
    empirical   labels are the text's. Their scores are correlated, so squares are taken one sequence at a time.

F is per token: F = N mean(g^2) for g the gradient of the mean loss over N tokens, averaged over batches. It does not depend on the batch size, and
neither does lambda in 1/2 lambda sum F (w - w*)^2. Squares are summed in fp32 (fp64 for a model in fp64).

Several processes give the F of one: labels are drawn with a seed of every sequence, and batches are the same. A model that is whole in every process
is given whole batches; one that FSDP2 has sharded computes a batch in all processes, whose gradients FSDP2 adds up before they are squared (of single
sequences: after), on the shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, distributed
from torch.distributed.fsdp import FSDPModule

from hf_grow.common.extras import require_packages
from hf_grow.errors import ExecutionError, InputError
from hf_grow.training.config.data_options import TextOptions
from hf_grow.training.config.fisher_options import FisherOptions
from hf_grow.training.data import packing
from hf_grow.training.data.document_masking import LENGTHS, forward_arguments, position_ids, split_lengths
from hf_grow.training.data.sources import explain_read_errors, find_text
from hf_grow.training.distributed.processes import ALONE, Processes
from hf_grow.training.param_updates.parameter_map import bare, parameters
from hf_grow.training.param_updates.shards import is_sharded, local, local_window
from hf_grow.training.sharding.local_rows import Places, by_parameter, held_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DOCUMENTS_PER_BATCH = 64
"""Documents tokenised at once."""
MAX_OVERSAMPLING = 16
"""Up to this many times the wanted sequences are read, so that the chosen ones are not all from the first document."""
_NOT_FINITE_HINT = "Compute with --dtype float32, and check the model's weights with hf-grow verify."


def sample_sequences(
    text: Sequence[str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    count: int,
    seed: int,
    intra_document_masking: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Up to ``count`` sequences of ``length`` tokens, evenly spread over (the start of) the text and shuffled: int64 [n, length].

    With ``intra_document_masking`` also their positions within documents. ``text``: paths, globs or a Hub id. Raises InputError for text that cannot be read or is shorter than one sequence.
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
    lengths, carried = list[list[int]](), list[int]()
    with explain_read_errors(source.label):
        for batch in packing.batches(source.documents(), DOCUMENTS_PER_BATCH):
            encoded = encoder(batch)
            block, rest = packing.split_sequences(rest, encoded, length)
            pieces, carried = split_lengths(carried, map(len, encoded), length)
            blocks.append(block)
            lengths += pieces
            tokens += block.size
            if tokens >= MAX_OVERSAMPLING * count * length:
                break
    rows = np.concatenate(blocks)
    if not len(rows):
        raise InputError(f"{source.label} has fewer than {length} tokens.", hint="Use more text, or a smaller --seq-length.")
    packing.check_token_ids(int(rows.max()), model.get_input_embeddings().num_embeddings, source.label)
    spread = np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int))
    chosen = spread[torch.randperm(len(spread), generator=torch.Generator().manual_seed(seed)).numpy()]
    positions = position_ids([{LENGTHS: lengths[i]} for i in chosen]) if intra_document_masking else None
    return torch.from_numpy(rows[chosen].astype(np.int64)), positions


def estimate_fisher(
    model: PreTrainedModel,
    rows: Tensor,
    options: FisherOptions,
    *,
    positions: Tensor | None = None,
    processes: Processes = ALONE,
    progress: Callable[[int], None] = lambda tokens: None,
) -> tuple[dict[str, Tensor], int]:
    """F of every parameter by its bare name, on its device, and the number of labels that it was estimated from.

    ``rows``: token ids [sequences, length], the same in all processes; ``positions``: theirs, where attention stays within documents (only
    predictions within a document count then). A model that FSDP2 has sharded gives F of the local shards, and every batch is
    computed by all processes; of any other model each process computes whole batches, and gets the whole F.

    The model is left as it was; dropout is off meanwhile. Memory: F in fp32, and the gradients of one layer. Raises ExecutionError if a value is not
    finite: of several processes in all of them, at the end.
    """
    sharded = any(map(is_sharded, model.parameters()))
    single = options.exact or options.kind == "empirical"
    squares = {bare(n): torch.zeros_like(local(p.detach()), dtype=accumulation_dtype(p)) for n, p in model.named_parameters()}
    total = 0
    with _prepared(model, options), _squared_gradients(model, squares, processes, reduced=sharded and single):
        for step in _steps(len(rows), options.batch, processes, sharded=sharded, single=single):
            total += _backward(model, rows, positions, step, options, alone=processes.count == 1)
            progress(len(step.all) * rows.shape[1])
    if not sharded:
        total = sum(processes.gather(total))
        for square in squares.values():
            processes.sum_(square)
    broken = [n for n, square in squares.items() if not bool(torch.isfinite(square.div_(total)).all())]
    if broken := [n for found in processes.gather(broken) for n in found]:
        raise ExecutionError(f"The Fisher of {broken[0]} is not finite.", hint=_NOT_FINITE_HINT)
    return squares, total


@dataclass(frozen=True)
class _Step:
    """One backward pass of this process."""

    mine: Sequence[int]
    """Its sequences. Without any it still takes part where a model is sharded."""
    all: Sequence[int]
    """Those of all processes whose gradients are added up."""


def _steps(count: int, batch: int, processes: Processes, *, sharded: bool, single: bool) -> Iterator[_Step]:
    """``single``: squares of single sequences. A sharded model then takes a sequence from every process at once."""
    size = (processes.count if sharded else 1) if single else batch
    units = [range(start, min(start + size, count)) for start in range(0, count, size)]
    for unit in units if sharded else units[processes.index :: processes.count]:
        yield _Step(unit[processes.index :: processes.count] if sharded else unit, unit)


@contextmanager
def _prepared(model: PreTrainedModel, options: FisherOptions) -> Iterator[None]:
    """Without dropout, with gradients of every parameter, and with activation checkpointing if it is wanted."""
    training, required = model.training, {n: p.requires_grad for n, p in model.named_parameters()}
    model.eval().requires_grad_(True)
    if options.activation_checkpointing:
        from transformers.modeling_layers import GradientCheckpointingLayer

        _switch(model, "enable")({"use_reentrant": False})
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True  # of the layer alone: what is in it stays without dropout
    try:
        yield
    finally:
        if options.activation_checkpointing:
            _switch(model, "disable")()
        model.zero_grad(set_to_none=True)
        model.train(training)
        for n, p in model.named_parameters():
            p.requires_grad_(required[n])


def _switch(model: PreTrainedModel, to: str) -> Any:
    """transformers' method that enables or disables activation checkpointing, by its newer name where it has one."""
    return getattr(model, f"activation_checkpointing_{to}", None) or getattr(model, f"gradient_checkpointing_{to}")


@contextmanager
def _squared_gradients(model: PreTrainedModel, squares: Mapping[str, Tensor], processes: Processes, *, reduced: bool) -> Iterator[None]:
    """Adds the square of every gradient to ``squares`` as soon as it is complete, and frees it. FSDP2 adds gradients up over the processes before.

    ``reduced``: each process has a sequence of its own, and FSDP2 adds up their squares: gradients are squared before they are reduced.
    """

    def add(p: Tensor, square: Tensor) -> None:
        assert p.grad is not None
        grad = local(p.grad).to(square.dtype)
        if reduced and processes.count > 1:
            square.add_(grad)
        else:
            square.addcmul_(grad, grad)
        p.grad = None

    hooks = [p.register_post_accumulate_grad_hook(partial(add, square=squares[bare(n)])) for n, p in model.named_parameters()]
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            if reduced:
                module.set_custom_reduce_scatter(_SquaredReduceScatter())  # type: ignore[arg-type]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _SquaredReduceScatter:
    """FSDP2's reduction of gradients, which sums their squares instead."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> Any:
        reduce_scatter = (
            getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor
        )  # its name before torch 2.13
        return reduce_scatter(output_tensor, input_tensor.square_(), op, group, async_op)


def _backward(model: PreTrainedModel, rows: Tensor, positions: Tensor | None, step: _Step, options: FisherOptions, *, alone: bool) -> int:
    """Gradients of the summed loss over the tokens of a step; returns the number of its labels. ``alone``: see `_sample_labels`."""
    ids, own = ((t if t is None else (t[list(step.mine)] if step.mine else t[:1, :2]).to(model.device)) for t in (rows, positions))
    assert ids is not None
    logits = model(**{"input_ids": ids, "use_cache": False, **forward_arguments(model.config, own)}).logits
    if options.kind == "true":
        labels = _sample_labels(logits.detach(), [sequence_seed(options.seed, i) for i in step.mine or [0]], alone=alone)
    else:
        logits, labels = logits[:, :-1], ids[:, 1:]
    count = len(step.all) * (rows.shape[1] - (options.kind == "empirical"))
    if own is not None and positions is not None:
        inside = own[:, 1:] != 0  # the next token is of the same document
        logits, labels = logits[:, : inside.shape[1]], labels[:, : inside.shape[1]].masked_fill(~inside, packing.IGNORED)
        count = int((positions[list(step.all), 1:] != 0).sum())
    flat = logits.reshape(-1, logits.shape[-1])
    loss = F.cross_entropy(flat if flat.element_size() >= 4 else flat.float(), labels.reshape(-1), reduction="sum")
    (loss if step.mine else loss * 0.0).backward()  # type: ignore[no-untyped-call]
    return count


def sequence_seed(seed: int, sequence: int) -> int:
    """The seed of a sequence's labels: the same in whatever batch and process it is computed."""
    return int(np.random.SeedSequence([seed, sequence]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _sample_labels(logits: Tensor, seeds: Sequence[int], *, alone: bool = True) -> Tensor:
    """A label for every position from softmax(logits): [B, L, V] -> [B, L]; one sequence at a time to save memory.

    Raises ExecutionError for logits that are not finite, in a process that is ``alone``. Others would wait for one that raises; there F is not finite
    either, which all find in the end.
    """
    labels, generator = [], torch.Generator(logits.device)
    for row, seed in zip(logits, seeds, strict=True):
        probabilities = row.float().softmax(-1)
        if not bool(torch.isfinite(probabilities).all()):
            if alone:
                raise ExecutionError("The model's logits are not finite.", hint=_NOT_FINITE_HINT)
            probabilities = torch.ones_like(probabilities)  # any label: the loss, and with it F, is not finite
        labels.append(torch.multinomial(probabilities, 1, generator=generator.manual_seed(seed)).squeeze(-1))
    return torch.stack(labels)


def accumulation_dtype(p: Tensor) -> torch.dtype:
    """Sums of many small terms are not kept in 16 bits."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


Part = tuple[str, int, Tensor]
"""Rows of a tensor: its name on disk, the first row, the rows."""


def held_on_disk(model: PreTrainedModel, tensors: Mapping[str, Tensor], places: Places) -> Iterator[Part]:
    """(name on disk, first row, rows) of tensors of the shape of what this process holds of a sharded parameter. ``places``: `parameter_map` before it was sharded."""
    params = parameters(model)
    for name, held in by_parameter(places).items():
        yield from held_rows(tensors[name], params[name].shape, local_window(params[name]), held)


def merge_online(new: Iterable[Part], old: Callable[[str, int, int], Tensor], decay: float) -> Iterator[Part]:
    """Online EWC's running Fisher at a new task (Schwarz et al. 2018, arXiv 1805.06370): decay * old + new. ``old``: rows of a tensor."""
    for name, start, rows in new:
        yield name, start, old(name, start, start + len(rows)).to(rows.device, rows.dtype).mul_(decay).add_(rows)


def expert_utility(layers: int, experts: int, parts: Iterable[Part], entries: Mapping[str, Any]) -> list[list[float]]:
    """Sum of F over each expert, [layers][experts], zeros for dense layers; Expert Upcycling (arXiv 2604.19835) copies those with the most.

    ``parts``: of F; ``entries``: of the architecture's table, by name.
    """
    sums = [[0.0] * experts for _ in range(layers)]
    for name, _, rows in parts:
        entry = entries[name]
        if entry.expert >= 0:
            sums[entry.layer][entry.expert] += float(rows.double().sum())
    return sums
