"""Knowledge distillation (Hinton et al. 2015, arXiv 1503.02531), by default from the source of the growth.

    L = (1 - alpha) CE + alpha T^2 sum_i w_i KL(p_i^T || q^T)        p^T = softmax(z / T), summed over the vocabulary, averaged over tokens

A teacher is a model in memory, or a cache (`logit_cache`): of its top-k logits, over which p and q are then compared, or of draws from p.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from hf_grow.errors import InputError
from hf_grow.training.config.distill_options import DistillOptions
from hf_grow.training.data.document_masking import forward_arguments
from hf_grow.training.sharding.row_source import RowSource
from hf_grow.training.sharding.sharded_model import gathered_head, shard_frozen

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

ChunkOf = Callable[["Tensor"], tuple["Tensor", "Tensor | None"]]


class Teacher(Protocol):
    """What the model is compared with."""

    def prepare(self, accelerator: Any) -> None:
        """Before the first batch, in every process."""

    def __call__(self, input_ids: Tensor, position_ids: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Input ids [B, L] and their positions (None: attention is over the whole row) -> logits [B, L, V] and None, or logits [B, L, k],
        or counts of draws (integers), and their token ids [B, L, k]."""
        ...

    def in_chunks(self, input_ids: Tensor, position_ids: Tensor | None = None) -> AbstractContextManager[ChunkOf]:
        """The same for chosen positions, numbered through all rows; nothing of [B, L, V] is held."""
        ...


def check_teacher(name: str, vocabulary: int, student_vocabulary: int, same_tokenizer: bool | None) -> None:
    """Raises InputError unless the logits of a teacher and of the model are of the same tokens.

    ``vocabulary``, ``student_vocabulary``: sizes; ``same_tokenizer``: None if unknown.
    """
    if vocabulary != student_vocabulary:
        raise InputError(
            f"Teacher {name} has a vocabulary of {vocabulary} tokens, but the model has {student_vocabulary}.",
            hint="Use a teacher with the same tokenizer, such as the source of the growth.",
        )
    if same_tokenizer is False:
        raise InputError(
            f"Teacher {name} has a different tokenizer, so its token ids differ.", hint="Use a teacher with the same tokenizer."
        )


class Distiller:
    """The teachers' part of the loss."""

    def __init__(self, options: DistillOptions, teachers: Sequence[Teacher]) -> None:
        total = sum(t.weight for t in options.teachers)
        self.alpha, self.temperature = options.alpha, options.temperature
        self.teachers = [(t.weight / total, teacher) for t, teacher in zip(options.teachers, teachers, strict=True)]

    def prepare(self, accelerator: Any) -> None:
        """Before the first step, in every process."""
        for _, teacher in self.teachers:
            teacher.prepare(accelerator)

    def loss(
        self,
        logits: Tensor,
        input_ids: Tensor,
        labels: Tensor,
        tokens: Tensor | int | float | None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """T^2 sum_i w_i KL_i over the positions with a label, a scalar.

        Args:
            logits: the student's [B, L, V].
            input_ids, labels: [B, L]; -100 is no label.
            tokens: divisor; None takes the number of labels in this batch.
            position_ids: [B, L], from 0 in every document, where attention stays within documents.
        """
        import torch

        from hf_grow.training.distillation.kl_divergence import summed_kl_divergence

        mask = torch.zeros_like(labels, dtype=torch.bool)
        mask[:, :-1] = labels[:, 1:] != -100
        total: Any = 0
        for weight, teacher in self.teachers:
            teacher_logits, token_ids = teacher(input_ids, position_ids)
            total = total + weight * summed_kl_divergence(logits, teacher_logits, self.temperature, mask, token_ids)
            del teacher_logits, token_ids  # freed before the next teacher's
        loss: Tensor = total / (mask.sum() if tokens is None else tokens)
        return loss


class ModelTeacher:
    """A teacher in memory: whole, or, with ``weights`` (on the meta device until `prepare`), one shard in each process."""

    def __init__(self, model: PreTrainedModel, weights: RowSource | None = None) -> None:
        self.model, self.weights = model.eval().requires_grad_(False), weights

    def prepare(self, accelerator: Any) -> None:
        if self.weights is None:
            self.model.to(accelerator.device)
        elif any(p.is_meta for p in self.model.parameters()):
            shard_frozen(self.model, self.weights, accelerator)

    def __call__(self, input_ids: Tensor, position_ids: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        import torch

        documents = forward_arguments(self.model.config, position_ids)
        with torch.no_grad():
            return self.model(**{"input_ids": input_ids, "use_cache": False, **documents}).logits, None

    @contextmanager
    def in_chunks(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Iterator[ChunkOf]:
        import torch

        from hf_grow.training.distillation.head import Head

        head, states = Head(self.model), []

        def keep(hidden: Tensor) -> Tensor:
            states.append(hidden)
            return hidden[..., :1]  # no logits

        with head.replaced(keep):
            self(input_ids, position_ids)
        hidden = states.pop().flatten(0, 1)

        def chunk(positions: Tensor) -> tuple[Tensor, None]:
            with torch.no_grad():
                return head.logits(hidden[positions]), None

        with gathered_head(self.model):
            yield chunk
