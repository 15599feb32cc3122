"""Samples texts from a model in batches: plain documents, and conversations through its chat template."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from hf_grow.errors import InputError
from hf_grow.model.flops import count_flops
from hf_grow.model.loading import transformers_errors
from hf_grow.training.config.data_options import TextOptions
from hf_grow.training.config.replay_options import ReplayOptions
from hf_grow.training.data.chat_template import (
    PLAIN_TEXT_HINT,
    ChatTemplateParts,
    document_start_token,
    parse_chat_template,
    special_ids,
)  # fmt: skip
from hf_grow.training.data.sample_filters import Sample, drop_reason
from hf_grow.training.data.sources import TextSource, find_text
from hf_grow.training.data.vllm_engine import VllmEngine

_DEFAULT_LENGTH = 1024
_DEFAULT_BATCH_TOKENS = 32_768
_SURPRISE_ROWS = 8
"""Texts per forward pass when their surprise is measured."""


def resolve_options(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: ReplayOptions) -> ReplayOptions:
    """Fills in max_length, batch_size and chat_share for this model. Raises InputError if its chat template cannot be used."""
    length = options.max_length or _DEFAULT_LENGTH
    length = min(length, getattr(model.config, "max_position_embeddings", None) or length)
    share = options.chat_share
    if share is None:
        template = parse_chat_template(tokenizer)
        share = 0.5 if template is not None and template.is_chat_model(_eos_ids(model, tokenizer), tokenizer.bos_token_id) else 0.0
    size = options.batch_size or max(1, min(64, _DEFAULT_BATCH_TOKENS // length))
    return options.model_copy(update={"max_length": length, "batch_size": size, "chat_share": share})


class _TokenCallback(LogitsProcessor):  # type: ignore[misc]
    """Reports each token; leaves the logits unchanged. A streamer would copy every token to the CPU."""

    def __init__(self, on_token: Callable[[int, int], None], prefix: int, max_new_tokens: int) -> None:
        self.on_token, self.prefix, self.max_new_tokens = on_token, prefix, max_new_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.on_token(input_ids.shape[1] - self.prefix + 1, self.max_new_tokens)
        return scores


class Sampler:
    """Samples texts from one model; equal batch number, size and kind give equal texts.

    ``on_token``: called with (number of the next token, maximum number of new tokens) before each token of a batch.
    ``engine``: samples instead of `model`, which then only tells what the model is, and measures surprise; it does not call ``on_token``.
    Raises InputError if the options do not fit the model, or the tokenizer does not belong to it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        options: ReplayOptions,
        on_token: Callable[[int, int], None] = lambda token, max_new_tokens: None,
        engine: VllmEngine | None = None,
    ) -> None:
        if options.engine == "vllm" and engine is None:
            raise InputError("vLLM samples from a checkpoint, not from a model in memory.", hint="Use the engine transformers.")
        options = options.model_copy(update={"engine": "transformers" if engine is None else "vllm"})
        self.model, self.on_token, self.engine = model.eval(), on_token, engine
        self._seeds = np.random.default_rng(options.seed)
        """Seeds of the sequences that the engine samples."""
        self._cost = count_flops(model.config.to_dict())
        self.flops = 0
        """Of all samples so far, and of measuring their surprise."""
        self.tokenizer = tokenizer
        self.options = options = resolve_options(model, tokenizer, options)
        assert options.max_length is not None and options.batch_size is not None and options.chat_share is not None
        self.length, self.batch_size, self.chat_share = options.max_length, options.batch_size, options.chat_share
        self.template = _usable_template(tokenizer, self.chat_share)
        turn_tokens = self.template.turn_tokens if self.template is not None else frozenset()
        start = document_start_token(tokenizer, self.template)
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.ends = _eos_ids(model, tokenizer) | turn_tokens | ({start} if start is not None and start not in (bos, eos) else set())
        self.special = special_ids(tokenizer) | self.ends
        self.surprise: dict[str, tuple[float, float]] = {}
        """'plain' and 'chat' -> median and spread of nats per token of the first batch of that kind, once it was measured."""
        vocab = model.get_input_embeddings().num_embeddings
        self._prompts = _read_prompts(tokenizer, options) if options.prompts else None
        if max(max(p) for p in self._prompts or [[0]]) >= vocab:
            raise InputError("The model and the tokenizer do not match: the prompts have token ids beyond the model's vocabulary.")
        self._plain = np.array([i for i in range(min(len(tokenizer), vocab)) if i not in self.special])
        if start is None and options.start == "document" and not self._prompts and self.chat_share < 1:
            raise InputError(
                "The tokenizer has neither BOS nor EOS, so no token starts a document."
                if not turn_tokens
                else "BOS and EOS of the tokenizer are tokens of its chat template, so no token starts a document.",
                hint="Use --start random, or --prompts." + (" --chat-share 1 samples conversations only." if turn_tokens else ""),
            )
        if start is not None and start >= vocab:
            raise InputError(f"The model and the tokenizer do not match: BOS is {start}, and the model's vocabulary ends at {vocab - 1}.")
        self._document_start = start
        self._bos = bos if bos not in turn_tokens else None

    @property
    def kinds(self) -> list[bool]:
        """The kinds of batches that are sampled: False for plain documents, True for conversations."""
        return [chat for chat, share in ((False, 1 - self.chat_share), (True, self.chat_share)) if share]

    def warm_up(self) -> None:
        """Generates one token, so that the first batch takes no longer than the others."""
        self._generate(self._prefixes(np.random.default_rng(0), 1) if False in self.kinds else self._user_prefixes(1), 1)

    def draw(self, batch: int, size: int, *, chat: bool = False) -> list[Sample]:
        """Samples `size` texts with the random numbers of batch number `batch`."""
        seed = np.random.SeedSequence([self.options.seed, batch])
        rng, self._seeds = np.random.default_rng(seed), np.random.default_rng(seed.spawn(1)[0])
        with _seeded(int(seed.generate_state(1, np.uint64)[0] >> 1), self.model.device):
            samples = self._conversations(size) if chat else self._documents(self._prefixes(rng, size))
        if self.options.max_surprise is not None:
            samples = self._with_surprise(samples)
        return samples

    def measure_surprise(self, samples: Sequence[Sample], *, chat: bool) -> None:
        """Takes the median and the spread of a kind from its first batch."""
        if self.options.max_surprise is not None:
            stats = _median_and_spread([s.surprise for s in samples if s.surprise is not None])
            self.surprise.setdefault("chat" if chat else "plain", stats)

    def drop_reason(self, sample: Sample) -> str | None:
        """Which filter drops a sample, or None."""
        stats = self.surprise.get("chat" if sample.frame == "verbatim" else "plain")
        return drop_reason(sample, self.options, self.special, stats)

    def _prefixes(self, rng: np.random.Generator, count: int) -> torch.Tensor:
        """Tokens that plain documents start from, int64 [count, tokens]."""
        if self._prompts:
            rows = np.asarray(self._prompts)[rng.integers(len(self._prompts), size=count)]
        elif self.options.start == "random":
            first = self._plain[rng.integers(len(self._plain), size=count)][:, None]
            rows = first if self._bos is None else np.concatenate([np.full_like(first, self._bos), first], axis=1)
        else:
            rows = np.full((count, 1), self._document_start)
        return torch.from_numpy(rows.astype(np.int64)).to(self.model.device)

    def _generate(self, prefixes: torch.Tensor, new: int, mask: torch.Tensor | None = None) -> list[list[int]]:
        """The new tokens after each row of `prefixes`: up to an end token (included), or `new` of them. ``mask``: 0 at padding."""
        if self.engine is not None:
            return [self._cut_after_end(row) for row in self._generate_by_engine(self.engine, prefixes, new, mask)]
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
        mask = torch.ones_like(prefixes) if mask is None else mask
        callbacks = LogitsProcessorList([_TokenCallback(self.on_token, prefixes.shape[1], new)])
        with torch.inference_mode(), _default_generation_config(self.model), transformers_errors("the model", does="sample from"):
            out = self.model.generate(prefixes, attention_mask=mask, generation_config=config, logits_processor=callbacks)
        rows: list[list[int]] = out[:, prefixes.shape[1] :].tolist()
        self.flops += self._cost.generation(len(rows), prefixes.shape[1], out.shape[1] - prefixes.shape[1])
        return [self._cut_after_end(row) for row in rows]

    def _cut_after_end(self, row: list[int]) -> list[int]:
        return row[: next((n for n, i in enumerate(row) if i in self.ends), len(row) - 1) + 1]

    def _generate_by_engine(self, engine: VllmEngine, prefixes: torch.Tensor, new: int, mask: torch.Tensor | None) -> list[list[int]]:
        rows = prefixes.tolist() if mask is None else [row[used.bool()].tolist() for row, used in zip(prefixes, mask, strict=True)]
        seeds, dtype = self._seeds.integers(1 << 62, size=len(rows)).tolist(), str(self.model.dtype).removeprefix("torch.")
        found = engine.generate(rows, new, options=self.options, ends=self.ends, seeds=seeds, dtype=dtype)
        self.flops += sum(self._cost.generation(1, len(row), len(made)) for row, made in zip(rows, found, strict=True))
        return found

    def _ended(self, ids: Sequence[int]) -> bool:
        return bool(ids) and ids[-1] in self.ends

    def _decode(self, ids: Sequence[int]) -> tuple[str, int]:
        """The text of sampled tokens without special ones, and their number."""
        plain = [i for i in ids if i not in self.special]
        text = self.tokenizer.decode(plain, clean_up_tokenization_spaces=False)
        # The bytes of the last character may be incomplete.
        return text if self._ended(ids) else text.rstrip("\ufffd"), len(plain)

    def _documents(self, prefixes: torch.Tensor) -> list[Sample]:
        samples = []
        for prefix, new in zip(prefixes.tolist(), self._generate(prefixes, self.length - prefixes.shape[1]), strict=True):
            ids, ended = [*prefix, *new], self._ended(new)
            text, tokens = self._decode(ids)
            samples.append(Sample(text, tuple(ids[:-1] if ended else ids), tokens, "document" if ended else "cut", not ended))
        return samples

    def _tokenize(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _user_prefixes(self, count: int) -> torch.Tensor:
        """The template's tokens before the user's message, int64 [count, tokens]."""
        assert self.template is not None
        return torch.tensor([self._tokenize(self.template.before)] * count, dtype=torch.int64, device=self.model.device)

    def _conversations(self, count: int) -> list[Sample]:
        """Samples the user's message within half of the room that the template leaves, then the answer within what remains."""
        assert self.template is not None
        prefixes = self._user_prefixes(count)
        before, between = prefixes[0].tolist(), self._tokenize(self.template.between)
        room = (self.length - len(before) - len(between)) // 2
        if room < 1:
            raise InputError(
                f"Texts of {self.length} tokens are too short for a conversation: its template takes {len(before) + len(between)}.",
                hint="Use a larger --max-length, or --chat-share 0.",
            )
        messages = self._generate(prefixes, room)
        conversations = [[*before, *m[:-1], *between] for m in messages if self._ended(m)]
        answers = iter(self._answers(conversations) if conversations else [])
        return [self._conversation(before, between, m, next(answers) if self._ended(m) else None) for m in messages]

    def _answers(self, conversations: Sequence[list[int]]) -> list[list[int]]:
        width, room = max(map(len, conversations)), self.length - min(map(len, conversations))
        padded = [[min(self.ends, default=0)] * (width - len(a)) + a for a in conversations]  # on the left, as generation needs it
        mask = [[0] * (width - len(a)) + [1] * len(a) for a in conversations]
        device = self.model.device
        answers = self._generate(torch.tensor(padded, device=device), room, torch.tensor(mask, device=device))
        return [answer[: self.length - len(a)] for a, answer in zip(conversations, answers, strict=True)]

    def _conversation(self, before: list[int], between: list[int], message: list[int], answer: list[int] | None) -> Sample:
        assert self.template is not None
        template, (question, tokens) = self.template, self._decode(message)
        if answer is None:
            return Sample(template.before + question.lstrip(), (*before, *message), tokens, "verbatim", True, generated=question)
        ended, (reply, answer_tokens) = self._ended(answer), self._decode(answer)
        question, reply = question.strip(), reply.strip() if ended else reply.lstrip()
        text = template.before + question + template.between + reply + (template.after if ended else "")
        ids = (*before, *message[:-1], *between, *(answer[:-1] if ended else answer))
        tokens = tokens + answer_tokens if question and reply else 0
        return Sample(text, ids, tokens, "verbatim", not ended, generated=f"{question}\n{reply}")

    def _with_surprise(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples with their nats per token, from one more forward pass."""
        device, width = self.model.device, max(len(s.ids) for s in samples)
        ids = torch.tensor([[*s.ids, *[0] * (width - len(s.ids))] for s in samples], device=device)
        mask = torch.tensor([[1] * len(s.ids) + [0] * (width - len(s.ids)) for s in samples], device=device)
        means: list[float] = []
        with torch.inference_mode():
            for rows, used in zip(torch.split(ids, _SURPRISE_ROWS), torch.split(mask, _SURPRISE_ROWS), strict=True):
                self.flops += self._cost.forward.rows(*rows.shape)
                logits = self.model(rows, attention_mask=used, use_cache=False).logits[:, :-1].float()
                nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none") * used[:, 1:]
                means += (nats.sum(1) / used[:, 1:].sum(1).clamp(min=1)).tolist()
        return [replace(sample, surprise=mean) for sample, mean in zip(samples, means, strict=True)]


def prompts_identity(options: ReplayOptions) -> Any:
    """JSON data that changes whenever the prompts may have changed; None without prompts."""
    return _find_prompts(options).identity if options.prompts else None


def _find_prompts(options: ReplayOptions) -> TextSource:
    return find_text(TextOptions(path=[options.prompts or ""]))


def _read_prompts(tokenizer: PreTrainedTokenizerBase, options: ReplayOptions) -> list[list[int]]:
    """The first `prompt_tokens` tokens of every text that has as many: equal lengths need no padding."""
    prompts = []
    for row in _find_prompts(options).documents():
        ids = tokenizer(row["text"][: 64 * options.prompt_tokens], verbose=False)["input_ids"][: options.prompt_tokens]
        if len(ids) == options.prompt_tokens:
            prompts.append(ids)
    if not prompts:
        raise InputError(
            f"{options.prompts} contains no text of {options.prompt_tokens} tokens or more.", hint="Use a smaller --prompt-tokens."
        )
    return prompts


def _usable_template(tokenizer: PreTrainedTokenizerBase, share: float) -> ChatTemplateParts | None:
    """Raises InputError if conversations are wanted (share > 0) and the template does not allow them."""
    try:
        template = parse_chat_template(tokenizer)
    except InputError:
        if share:
            raise
        return None
    if share and template is None:
        raise InputError("The tokenizer has no chat template, so conversations cannot be sampled.", hint="Omit --chat-share.")
    if share and template is not None and template.user_end is None:
        raise InputError(
            f"The chat template ends the user's message with plain text ({template.between.strip()[:40]!r}), not with a token.",
            hint=PLAIN_TEXT_HINT,
        )
    return template


def _eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Token ids that end a text: EOS of the tokenizer and of generation_config, where they are in the model's vocabulary."""
    own = getattr(model.generation_config, "eos_token_id", None)
    named = own if isinstance(own, (list, tuple)) else [own]
    vocab = model.config.vocab_size
    return {i for i in [tokenizer.eos_token_id, *named] if isinstance(i, int) and not isinstance(i, bool) and 0 <= i < vocab}


def _median_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Median, and the standard deviation estimated from the median absolute deviation (1.4826 MAD)."""
    median = float(np.median(values))
    return median, max(1.4826 * float(np.median(np.abs(np.asarray(values) - median))), 1e-6)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds the global generators, which generate() uses, and restores them."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@contextmanager
def _default_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """generate() takes values that its config leaves open from the checkpoint's generation_config, such as a repetition penalty."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
