"""Drawing texts from a model in batches, and telling which of them are worth keeping."""

from __future__ import annotations

import hashlib
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_grow.checkpoint.reader import Checkpoint
from hf_grow.errors import InputError
from hf_grow.training.replay import ReplayOptions
from hf_grow.verification.function import load_model

_TORCH_NAMES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_NGRAM = 4
_BROKEN = 0.05
"""Part of the characters that may be U+FFFD, which stands for bytes that are no text."""


@dataclass(frozen=True)
class Sample:
    text: str
    ids: tuple[int, ...]
    """All tokens, the one it started with included."""
    tokens: int
    """Without those that stand for no text (BOS, EOS)."""
    surprise: float | None = None
    """Nats a token under the model at temperature 1."""


class Sampler:
    """Texts of one model. The same batch number and size give the same texts."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: ReplayOptions) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.options = options
        self.length = self.length_for(model, options)
        self.ends = _ends(model, tokenizer)
        self.special = set(tokenizer.all_special_ids) | self.ends
        self.surprise: tuple[float, float] | None = None
        """Median and spread of the first batch's nats a token, once it was drawn."""
        self._prompts = _read_prompts(tokenizer, options) if options.prompts else None
        vocab = model.get_input_embeddings().num_embeddings
        if max(max(p) for p in self._prompts or [[0]]) >= vocab:
            raise InputError("The model and the tokenizer do not match: the prompts have token ids beyond the model's vocabulary.")
        self._plain = np.array([i for i in range(min(len(tokenizer), vocab)) if i not in self.special])
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if first is None and options.start == "document" and not self._prompts:
            raise InputError(
                "The tokenizer has neither BOS nor EOS, so no token begins a document.", hint="Use --start random, or --prompts."
            )
        if first is not None and first >= vocab:
            raise InputError(f"The model and the tokenizer do not match: BOS is {first}, and the model's vocabulary ends at {vocab - 1}.")
        self._first = first

    @staticmethod
    def length_for(model: PreTrainedModel, options: ReplayOptions) -> int:
        """Tokens of one text at most."""
        most = getattr(model.config, "max_position_embeddings", None)
        return min(options.max_length, most) if most else options.max_length

    @staticmethod
    def prompts_identity(options: ReplayOptions) -> Any:
        """What the prompts follow from, as JSON data."""
        return find_prompts(options).identity if options.prompts else None

    def warm_up(self) -> None:
        """One token, so that the first real batch is as fast as the others."""
        self._generate(self._starts(np.random.default_rng(0), 1), 1)

    def draw(self, batch: int, size: int) -> list[Sample]:
        """`size` texts as batch number `batch`, from random numbers of its own."""
        seed = np.random.SeedSequence([self.options.seed, batch])
        starts = self._starts(np.random.default_rng(seed), size)
        with _seeded(int(seed.generate_state(1, np.uint64)[0] >> 1), self.model.device):
            rows = self._generate(starts, self.length - starts.shape[1])
        samples = [self._sample(row, starts.shape[1]) for row in rows]
        if self.options.max_surprise is not None:
            samples = self._measured(samples)
            if self.surprise is None:
                self.surprise = _middle([s.surprise for s in samples if s.surprise is not None])
        return samples

    def fault(self, sample: Sample) -> str | None:
        """Why a text is dropped, or None."""
        o = self.options
        if sample.tokens < max(1, o.min_tokens):
            return "short"
        if sample.text.count("�") > _BROKEN * len(sample.text):
            return "broken"
        if repetition([i for i in sample.ids if i not in self.special]) > o.max_repetition:
            return "repetition"
        if compression(sample.text) > o.max_compression:
            return "compression"
        if o.max_surprise is not None and sample.surprise is not None and self.surprise is not None:
            median, spread = self.surprise
            if abs(sample.surprise - median) > o.max_surprise * spread:
                return "surprise"
        return None

    @staticmethod
    def same(text: str) -> bytes:
        """Equal for texts that differ in white space only."""
        return hashlib.sha256(" ".join(text.split()).encode()).digest()

    def _starts(self, rng: np.random.Generator, count: int) -> torch.Tensor:
        """[count, tokens before the first that is drawn]"""
        if self._prompts:
            rows = np.asarray(self._prompts)[rng.integers(len(self._prompts), size=count)]
        elif self.options.start == "random":
            picked = self._plain[rng.integers(len(self._plain), size=count)][:, None]
            bos = self.tokenizer.bos_token_id
            rows = picked if bos is None else np.concatenate([np.full_like(picked, bos), picked], axis=1)
        else:
            rows = np.full((count, 1), self._first)
        return torch.from_numpy(rows.astype(np.int64)).to(self.model.device)

    def _generate(self, starts: torch.Tensor, new: int) -> list[list[int]]:
        o = self.options
        config = GenerationConfig(
            do_sample=True,
            temperature=o.temperature,
            top_p=o.top_p,
            top_k=o.top_k,
            max_new_tokens=new,
            eos_token_id=sorted(self.ends) or None,
            pad_token_id=min(self.ends, default=0),
            use_cache=True,
        )
        with torch.inference_mode(), _without_own_settings(self.model):
            out = self.model.generate(starts, attention_mask=torch.ones_like(starts), generation_config=config)
        rows: list[list[int]] = out.tolist()
        return rows

    def _sample(self, row: list[int], start: int) -> Sample:
        end = next((n for n in range(start, len(row)) if row[n] in self.ends), len(row))
        ids = row[:end]
        plain = [i for i in ids if i not in self.special]
        text = self.tokenizer.decode(plain, clean_up_tokenization_spaces=False)
        # The last character may be cut in two.
        return Sample(text.rstrip("�") if end == len(row) else text, tuple(ids), len(plain))

    def _measured(self, samples: Sequence[Sample]) -> list[Sample]:
        """With their nats a token, from one more pass over them all."""
        width = max(len(s.ids) for s in samples)
        ids = torch.tensor([[*s.ids, *[0] * (width - len(s.ids))] for s in samples], device=self.model.device)
        mask = torch.tensor([[1] * len(s.ids) + [0] * (width - len(s.ids)) for s in samples], device=self.model.device)
        measured = []
        with torch.inference_mode():
            for rows, there, of in zip(torch.split(ids, 8), torch.split(mask, 8), _split(samples, 8), strict=True):
                logits = self.model(rows, attention_mask=there, use_cache=False).logits[:, :-1].float()
                nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none") * there[:, 1:]
                mean = (nats.sum(1) / there[:, 1:].sum(1).clamp(min=1)).tolist()
                measured += [Sample(s.text, s.ids, s.tokens, m) for s, m in zip(of, mean, strict=True)]
        return measured


def load(checkpoint: Checkpoint, dtype: str, device: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a checkpoint on this machine, on its GPU if it has one. Raises InputError."""
    from transformers import AutoTokenizer

    if dtype == "auto":
        dtype = _TORCH_NAMES[Counter(t.dtype for t in checkpoint.tensors.values()).most_common(1)[0][0]]
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # tokenizers fail in many ways; each is a reason, none is ours
        raise InputError(
            f"{checkpoint.ref} has no tokenizer that can be used: {str(error).splitlines()[0]}",
            hint="Copy the tokenizer's files beside config.json.",
        ) from None
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return load_model(checkpoint, dtype).to(where), tokenizer
    except (RuntimeError, AssertionError) as error:  # an assertion where torch was built without that device
        raise InputError(f"{checkpoint.ref} cannot be put on {where}: {str(error).splitlines()[0]}", hint="Use another --device.") from None


def repetition(ids: Sequence[int]) -> float:
    """Part of the 4-grams that stood earlier in the same text: 0 for a text of distinct ones, towards 1 for a loop."""
    grams = [tuple(ids[n : n + _NGRAM]) for n in range(len(ids) - _NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def compression(text: str) -> float:
    """How many times smaller zlib makes it: about 2 for a page of prose, 3 to 4 for code."""
    data = text.encode(errors="replace")
    return len(data) / len(zlib.compress(data)) if data else 0.0


def digest(model: PreTrainedModel) -> str:
    """Of all weights, by name: the same for the same model wherever its files lie."""
    import xxhash

    state = xxhash.xxh3_128()
    for name, tensor in model.state_dict().items():
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        state.update(tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy())
    return str(state.hexdigest())


def find_prompts(options: ReplayOptions) -> Any:
    from hf_grow.training.data.options import TextOptions
    from hf_grow.training.data.sources import find

    return find(TextOptions(path=[options.prompts or ""]))


def _read_prompts(tokenizer: PreTrainedTokenizerBase, options: ReplayOptions) -> list[list[int]]:
    """The first tokens of every text that has as many; equally long, so that a batch needs no padding."""
    found = []
    for row in find_prompts(options).documents():
        ids = tokenizer(row["text"][: 64 * options.prompt_tokens], verbose=False)["input_ids"][: options.prompt_tokens]
        if len(ids) == options.prompt_tokens:
            found.append(ids)
    if not found:
        raise InputError(
            f"{options.prompts} holds no text of {options.prompt_tokens} tokens or more.", hint="Use a smaller --prompt-tokens."
        )
    return found


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens after which a text is over; a model may name several."""
    own = getattr(model.generation_config, "eos_token_id", None)
    named = own if isinstance(own, (list, tuple)) else [own]
    return {i for i in [tokenizer.eos_token_id, *named] if i is not None}


def _middle(values: Sequence[float]) -> tuple[float, float]:
    """Median, and the deviation that the median distance from it stands for in a normal distribution."""
    median = float(np.median(values))
    return median, max(1.4826 * float(np.median(np.abs(np.asarray(values) - median))), 1e-6)


def _split(items: Sequence[Sample], size: int) -> list[Sequence[Sample]]:
    return [items[n : n + size] for n in range(0, len(items), size)]


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """generate() draws from the global generators, and they are put back afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@contextmanager
def _without_own_settings(model: PreTrainedModel) -> Iterator[None]:
    """A checkpoint's generation_config would fill in what ours leaves open, such as a repetition penalty."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
