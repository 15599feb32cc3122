"""The tokenizer, the small model, and training: the Trainer of transformers on packed blocks of tokens."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_grow.demo.settings import Pretraining
from hf_grow.demo.show import Progress
from hf_grow.demo.text import Corpus

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

BOS, EOS = "<s>", "</s>"


@dataclass(frozen=True)
class Point:
    """Held-out loss (nats a token) after so many tokens of this training."""

    tokens: int
    loss: float


@dataclass(frozen=True)
class Blocks:
    """Packed sequences of equal length, [count, block]."""

    train: torch.Tensor
    heldout: torch.Tensor


class Rows:
    """A tensor [count, block] as the dataset that the Trainer takes; inputs and labels are the same row (the model shifts)."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def build_tokenizer(texts: Iterable[str], vocab: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE, as GPT-2 and Llama 3 have: any text can be written with it, so there is no unknown token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=BOS, eos_token=EOS)


def pack(tokenizer: PreTrainedTokenizerFast, documents: Sequence[str], block: int) -> torch.Tensor:
    """Documents one after another, each between BOS and EOS, cut into rows of `block` tokens."""
    import torch

    stream: list[int] = []
    for ids in tokenizer(list(documents), add_special_tokens=False)["input_ids"]:
        stream += [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    rows = len(stream) // block
    return torch.tensor(stream[: rows * block]).view(rows, block)


def prepare(tokenizer: PreTrainedTokenizerFast, corpus: Corpus, settings: Pretraining) -> Blocks:
    import torch

    train = pack(tokenizer, corpus.train, settings.block)
    # Shuffled once for all trainings, so that what comes after the small model's share is new text of the same kind.
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(settings.seed))
    return Blocks(train[order], spread(pack(tokenizer, corpus.heldout, settings.block), settings.heldout_blocks))


def spread(rows: torch.Tensor, count: int) -> torch.Tensor:
    """`count` rows spread evenly over all of them."""
    import torch

    return rows[torch.linspace(0, len(rows) - 1, min(count, len(rows))).long()]


def build_model(settings: Pretraining, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = settings.shape
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.inter,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=4 * settings.block,
        tie_word_embeddings=True,
        initializer_range=shape.init,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return LlamaForCausalLM(config)


@dataclass(frozen=True)
class Schedule:
    steps: int
    batch: int
    learning_rate: float
    warmup: int
    kind: str
    """lr_scheduler_type of TrainingArguments."""
    seed: int
    evaluate_at: frozenset[int]
    """Steps after which the held-out loss is taken; it is always taken before the first."""


def train(model: PreTrainedModel, rows: torch.Tensor, heldout: torch.Tensor, schedule: Schedule, progress: Progress) -> list[Point]:
    """Trains `model` in place on the first steps*batch rows, once each; the held-out losses on the way."""
    from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments

    needed = schedule.steps * schedule.batch
    assert len(rows) >= needed, f"{len(rows)} rows of text for {needed}"
    with tempfile.TemporaryDirectory() as nowhere:
        arguments = TrainingArguments(
            output_dir=nowhere,
            max_steps=schedule.steps,
            per_device_train_batch_size=schedule.batch,
            per_device_eval_batch_size=2 * schedule.batch,
            learning_rate=schedule.learning_rate,
            lr_scheduler_type=schedule.kind,
            warmup_steps=schedule.warmup,
            weight_decay=0.1,
            adam_beta2=0.95,
            seed=schedule.seed,
            eval_on_start=True,
            prediction_loss_only=True,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,  # the same demo on every machine, and a model this small gains nothing from an accelerator
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=Rows(rows[:needed]), eval_dataset=Rows(heldout))
        for noisy in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(noisy)
        watch = _watch(schedule, rows.shape[1], progress)
        trainer.add_callback(watch)
        trainer.train()
    return list(watch.points)


def _watch(schedule: Schedule, block: int, progress: Progress) -> Any:
    from transformers import TrainerCallback

    class Watch(TrainerCallback):  # type: ignore[misc]
        points: list[Point]

        def __init__(self) -> None:
            self.points = []

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_evaluate = state.global_step in schedule.evaluate_at
            progress(state.global_step, None)

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
            self.points.append(Point(state.global_step * schedule.batch * block, metrics["eval_loss"]))
            progress(state.global_step, metrics["eval_loss"])

    return Watch()
