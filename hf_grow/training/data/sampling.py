"""Drawing texts from a model in batches, and telling which of them are worth keeping."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from hf_grow.checkpoint.reader import Checkpoint
from hf_grow.errors import InputError
from hf_grow.model.loading import load_tokenizer, transformers_errors
from hf_grow.training.config.replay_options import ReplayOptions
from hf_grow.training.data.chat_template import PLAIN, Turns, begins_document, read_turns, special_ids
from hf_grow.training.data.sample_filters import Sample, fault
from hf_grow.verification.eval_text import has_tokenizer
from hf_grow.verification.models import load_model

_TORCH_NAMES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_LENGTH, _AT_ONCE = 1024, 32_768
"""Defaults: tokens of one text (those of a training's sequences), and of all texts of a batch."""


def settle(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: ReplayOptions) -> ReplayOptions:
    """Options with their defaults for this model: lengths, texts at once, part of conversations. Raises InputError."""
    length = options.max_length or _LENGTH
    length = min(length, getattr(model.config, "max_position_embeddings", None) or length)
    share = options.chat_share
    if share is None:
        turns = read_turns(tokenizer)
        share = 0.5 if turns is not None and turns.chats(_ends(model, tokenizer), tokenizer.bos_token_id) else 0.0
    size = options.batch_size or max(1, min(64, _AT_ONCE // length))
    return options.model_copy(update={"max_length": length, "batch_size": size, "chat_share": share})


class _Step(LogitsProcessor):  # type: ignore[misc]
    """Tells which token comes next, and leaves the logits alone: the one thing that generate() calls at each of them without a copy to the CPU."""

    def __init__(self, tell: Callable[[int, int], None], before: int, most: int) -> None:
        self.tell, self.before, self.most = tell, before, most

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.tell(input_ids.shape[1] - self.before + 1, self.most)
        return scores


class Sampler:
    """Texts of one model. The same batch number, size and kind give the same texts."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        options: ReplayOptions,
        drawing: Callable[[int, int], None] = lambda token, most: None,
    ) -> None:
        self.model, self.drawing = model.eval(), drawing
        self.tokenizer = tokenizer
        self.options = options = settle(model, tokenizer, options)
        assert options.max_length is not None and options.batch_size is not None and options.chat_share is not None
        self.length, self.batch_size, self.chat_share = options.max_length, options.batch_size, options.chat_share
        self.turns = _turns(tokenizer, self.chat_share)
        marks = self.turns.marks if self.turns is not None else frozenset()
        first = begins_document(tokenizer, self.turns)
        own = {tokenizer.bos_token_id, tokenizer.eos_token_id, None}
        self.ends = _ends(model, tokenizer) | marks | ({first} - own if first is not None else set())
        self.special = special_ids(tokenizer) | self.ends
        self.surprise: dict[str, tuple[float, float]] = {}
        """Median and spread of nats a token of the first batch of each kind, once it was drawn."""
        vocab = model.get_input_embeddings().num_embeddings
        self._prompts = _read_prompts(tokenizer, options) if options.prompts else None
        if max(max(p) for p in self._prompts or [[0]]) >= vocab:
            raise InputError("The model and the tokenizer do not match: the prompts have token ids beyond the model's vocabulary.")
        self._plain = np.array([i for i in range(min(len(tokenizer), vocab)) if i not in self.special])
        if first is None and options.start == "document" and not self._prompts and self.chat_share < 1:
            raise InputError(
                "The tokenizer has neither BOS nor EOS, so no token begins a document."
                if not marks
                else "BOS and EOS of the tokenizer are tokens of its chat template, so no token begins a document.",
                hint="Use --start random, or --prompts." + (" --chat-share 1 samples conversations only." if marks else ""),
            )
        if first is not None and first >= vocab:
            raise InputError(f"The model and the tokenizer do not match: BOS is {first}, and the model's vocabulary ends at {vocab - 1}.")
        self._first = first
        self._bos = tokenizer.bos_token_id if tokenizer.bos_token_id not in marks else None

    @staticmethod
    def prompts_identity(options: ReplayOptions) -> Any:
        """What the prompts follow from, as JSON data."""
        return find_prompts(options).identity if options.prompts else None

    @property
    def kinds(self) -> list[bool]:
        """Whether batches are conversations, for each kind that is sampled."""
        return [chat for chat, share in ((False, 1 - self.chat_share), (True, self.chat_share)) if share]

    def warm_up(self) -> None:
        """One token, so that the first real batch is as fast as the others."""
        rng = np.random.default_rng(0)
        self._generate(self._starts(rng, 1) if False in self.kinds else self._opened(1), 1)

    def draw(self, batch: int, size: int, *, chat: bool = False) -> list[Sample]:
        """`size` texts as batch number `batch`, from random numbers of its own."""
        seed = np.random.SeedSequence([self.options.seed, batch])
        rng = np.random.default_rng(seed)
        with _seeded(int(seed.generate_state(1, np.uint64)[0] >> 1), self.model.device):
            samples = self._conversations(size) if chat else self._documents(self._starts(rng, size))
        if self.options.max_surprise is not None:
            samples = self._measured(samples)
            middle = _middle([s.surprise for s in samples if s.surprise is not None])
            self.surprise.setdefault("chat" if chat else "plain", middle)
        return samples

    def fault(self, sample: Sample) -> str | None:
        """Why a text is dropped, or None."""
        return fault(sample, self.options, self.special, self.surprise.get("chat" if sample.frame == "verbatim" else "plain"))

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
            rows = picked if self._bos is None else np.concatenate([np.full_like(picked, self._bos), picked], axis=1)
        else:
            rows = np.full((count, 1), self._first)
        return torch.from_numpy(rows.astype(np.int64)).to(self.model.device)

    def _generate(self, starts: torch.Tensor, new: int, there: torch.Tensor | None = None) -> list[list[int]]:
        """What is drawn after each row of `starts`, up to the end of a text, or all `new` tokens. `there`: 0 where a row is filled."""
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
        mask = torch.ones_like(starts) if there is None else there
        steps = LogitsProcessorList([_Step(self.drawing, starts.shape[1], new)])
        with torch.inference_mode(), _without_own_settings(self.model), transformers_errors("the model", does="sample from"):
            out = self.model.generate(starts, attention_mask=mask, generation_config=config, logits_processor=steps)
        drawn: list[list[int]] = out[:, starts.shape[1] :].tolist()
        return [row[: next((n for n, i in enumerate(row) if i in self.ends), len(row) - 1) + 1] for row in drawn]

    def _over(self, drawn: Sequence[int]) -> bool:
        return bool(drawn) and drawn[-1] in self.ends

    def _read(self, drawn: Sequence[int]) -> tuple[str, int]:
        """The text of what was drawn, and its tokens."""
        plain = [i for i in drawn if i not in self.special]
        text = self.tokenizer.decode(plain, clean_up_tokenization_spaces=False)
        # The last character may be cut in two.
        return text if self._over(drawn) else text.rstrip("�"), len(plain)

    def _documents(self, starts: torch.Tensor) -> list[Sample]:
        samples = []
        for start, drawn in zip(starts.tolist(), self._generate(starts, self.length - starts.shape[1]), strict=True):
            row = [*start, *drawn]
            text, tokens = self._read(row)
            over = self._over(drawn)
            samples.append(Sample(text, tuple(row[:-1] if over else row), tokens, "document" if over else "cut", not over))
        return samples

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _opened(self, count: int) -> torch.Tensor:
        """[count, tokens before the user's message]"""
        assert self.turns is not None
        return torch.tensor([self._ids(self.turns.before)] * count, dtype=torch.int64, device=self.model.device)

    def _conversations(self, count: int) -> list[Sample]:
        """The model writes the user's message, in half of the room that the template leaves, then the answer in what is left of all."""
        assert self.turns is not None
        t, starts = self.turns, self._opened(count)
        before, between = starts[0].tolist(), self._ids(t.between)
        room = (self.length - len(before) - len(between)) // 2
        if room < 1:
            raise InputError(
                f"Texts of {self.length} tokens have no room for a conversation: its template takes {len(before) + len(between)}.",
                hint="Use a larger --max-length, or --chat-share 0.",
            )
        messages = self._generate(starts, room)
        asked = [[*before, *m[:-1], *between] for m in messages if self._over(m)]
        answers = iter(self._answers(asked) if asked else [])
        return [self._exchange(before, between, m, next(answers) if self._over(m) else None) for m in messages]

    def _answers(self, asked: Sequence[list[int]]) -> list[list[int]]:
        width, room = max(map(len, asked)), self.length - min(map(len, asked))
        filled = [[min(self.ends, default=0)] * (width - len(a)) + a for a in asked]  # on the left: all go on at the same place
        there = [[0] * (width - len(a)) + [1] * len(a) for a in asked]
        device = self.model.device
        drawn = self._generate(torch.tensor(filled, device=device), room, torch.tensor(there, device=device))
        return [d[: self.length - len(a)] for a, d in zip(asked, drawn, strict=True)]

    def _exchange(self, before: list[int], between: list[int], message: list[int], answer: list[int] | None) -> Sample:
        assert self.turns is not None
        t, (asked, tokens) = self.turns, self._read(message)
        if answer is None:
            return Sample(t.before + asked.lstrip(), (*before, *message), tokens, "verbatim", True, said=asked)
        over, (replied, more) = self._over(answer), self._read(answer)
        asked, replied = asked.strip(), replied.strip() if over else replied.lstrip()
        text = t.before + asked + t.between + replied + (t.after if over else "")
        ids = (*before, *message[:-1], *between, *(answer[:-1] if over else answer))
        tokens = tokens + more if asked and replied else 0
        return Sample(text, ids, tokens, "verbatim", not over, said=f"{asked}\n{replied}")

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
                measured += [replace(s, surprise=m) for s, m in zip(of, mean, strict=True)]
        return measured


def load(checkpoint: Checkpoint, dtype: str, device: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a checkpoint on this machine, on its GPU if it has one. Raises InputError."""
    if dtype == "auto":
        dtype = _TORCH_NAMES[Counter(t.dtype for t in checkpoint.tensors.values()).most_common(1)[0][0]]
    if checkpoint.folder is None or not has_tokenizer(checkpoint):
        raise InputError(f"{checkpoint.ref} has no tokenizer that can be used.", hint="Copy the tokenizer's files beside config.json.")
    tokenizer, model = load_tokenizer(checkpoint.folder, checkpoint.ref), load_model(checkpoint, dtype)
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return model.to(where), tokenizer
    except (RuntimeError, AssertionError) as error:  # an assertion where torch was built without that device
        raise InputError(f"{checkpoint.ref} cannot be put on {where}: {str(error).splitlines()[0]}", hint="Use another --device.") from None


def digest(model: PreTrainedModel) -> str:
    """Of all weights, by name: the same for the same model wherever its files lie."""
    import xxhash

    state = xxhash.xxh3_128()
    for name, tensor in model.state_dict().items():
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        state.update(tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy())
    return str(state.hexdigest())


def find_prompts(options: ReplayOptions) -> Any:
    from hf_grow.training.config.data_options import TextOptions
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


def _turns(tokenizer: PreTrainedTokenizerBase, share: float) -> Turns | None:
    """Raises InputError where conversations are asked for and cannot be sampled."""
    try:
        turns = read_turns(tokenizer)
    except InputError:
        if share:
            raise
        return None
    if share and turns is None:
        raise InputError("The tokenizer has no chat template, so no conversation can be sampled.", hint="Leave --chat-share out.")
    if share and turns is not None and turns.closes_user is None:
        raise InputError(
            f"The chat template ends the user's message by plain text ({turns.between.strip()[:40]!r}), not by a token.", hint=PLAIN
        )
    return turns


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens after which a text is over; a model may name several, and what is none of its vocabulary ends nothing."""
    own = getattr(model.generation_config, "eos_token_id", None)
    named = own if isinstance(own, (list, tuple)) else [own]
    vocab = model.config.vocab_size
    return {i for i in [tokenizer.eos_token_id, *named] if isinstance(i, int) and not isinstance(i, bool) and 0 <= i < vocab}


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
