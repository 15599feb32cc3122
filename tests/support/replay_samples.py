"""Tokenizers, options and interrupted runs for the tests of self-replay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import BY_NAME, make
from pydoc_texts import pydoc_texts

from hf_grow.options import parse
from hf_grow.training.config.replay_options import ReplayOptions
from hf_grow.training.data import DataOptions
from hf_grow.training.data.replay import sample_replay
from hf_grow.training.data.replay_files import TEXTS_FILE

DOCS = tuple(text.encode("ascii", "ignore").decode() for text in pydoc_texts(60_000))
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def bpe_tokenizer(special: list[str], **more: Any) -> Any:
    """Byte-level BPE of 300 tokens without the bytes that are not text by themselves: a random model would generate little else."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(DOCS, trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **more)


def base_tokenizer() -> Any:
    return bpe_tokenizer(["<s>", "</s>"], bos_token="<s>", eos_token="</s>")


def base_model() -> Any:
    """Random weights, sharpened, so that its samples differ from those of a wrong temperature; in fp64, so that no cache rounds."""
    model = make(BY_NAME["llama"], vocab_size=300, bos_token_id=0, eos_token_id=1, dtype=torch.float64)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    return model


def chat_tokenizer(**more: Any) -> Any:
    """BOS and EOS are turn tokens, as in SmolLM2."""
    given = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>", "chat_template": CHATML, **more}
    special = ["<|endoftext|>", "<s>", "<|im_start|>", "<|im_end|>"]
    return bpe_tokenizer(special, extra_special_tokens=["<s>", "<|im_start|>", "<|im_end|>"], **given)


def replay_options(**more: Any) -> ReplayOptions:
    return ReplayOptions(**{"tokens": 400, "max_length": 24, "batch_size": 8, "min_tokens": 4, **more})


def sampled_texts(folder: Path) -> list[str]:
    return [json.loads(line)["text"] for line in (folder / TEXTS_FILE).read_text().splitlines()]


class Interrupted(Exception):
    pass


def interrupted_replay(model: Any, tokenizer: Any, out: Path, batches: int, options: ReplayOptions) -> None:
    """Samples, and stops after this many batches."""
    calls = 0

    def progress(tokens: int) -> None:
        nonlocal calls
        calls += 1
        if calls > batches:  # the first call reports what exists already
            raise Interrupted

    with pytest.raises(Interrupted):
        sample_replay(model, tokenizer, out, options, progress=progress)


def data_options_with_replay(tmp_path: Path, **replay: Any) -> DataOptions:
    (tmp_path / "new.txt").write_text(DOCS[0] + DOCS[1])
    return parse(DataOptions, {"train": str(tmp_path / "new.txt"), "replay": replay, "seq_length": 16, "shuffle": False}, where="test")
