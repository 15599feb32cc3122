"""Self-replay: text sampled from the source model, as a substitute for training data that its owner does not have.

A model generates from the distribution it learned, so training on some of its output preserves that (pseudo-rehearsal: Robins 1995; for
language models LAMOL, arXiv 1909.03329, and arXiv 2605.26097). Instruct models also generate conversations through their chat template,
the user's message included (Magpie, arXiv 2406.08464). Samples are filtered: see sample_filters.py.

Batch i uses random numbers derived from (seed, i), and is appended and recorded as a whole, so that an interrupted run that is repeated
writes the same texts as an uninterrupted one.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from hf_grow._version import __version__
from hf_grow.errors import ExecutionError
from hf_grow.training.config.replay_options import ReplayOptions
from hf_grow.training.data.replay_files import FORMAT_VERSION, TEXTS_FILE, Document, append_texts, open_record, read_record, write_record
from hf_grow.training.data.sample_filters import dedup_key
from hf_grow.training.data.shared_batches import Batch, SharedBatches

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_grow.training.data.sampling import Sampler
    from hf_grow.training.data.vllm_engine import VllmEngine

MAX_EMPTY_BATCHES = 8
"""Consecutive batches of which the filters keep nothing, after which sampling fails."""


@dataclass(frozen=True)
class ReplayResult:
    """A complete replay folder."""

    folder: Path
    record: Mapping[str, Any]
    """replay.json: model, digest, settings, counts (texts and tokens kept and sampled, dropped by reason)."""
    seconds: float
    """Of this run."""
    sampled_tokens: int
    """In this run."""
    flops: int = 0
    """In this run."""

    def to_json(self) -> dict[str, Any]:
        rate = self.sampled_tokens / self.seconds if self.seconds else 0.0
        return {"output": str(self.folder), **self.record, "seconds": round(self.seconds, 3), "tokens_per_second": round(rate, 1)}


@dataclass(frozen=True)
class SamplingEstimate:
    """Extrapolated from one batch."""

    seconds: float
    """For all `options.tokens`."""
    tokens_per_second: float
    """Sampled, before the filters."""
    kept: float
    """Fraction of the sampled tokens that the filters keep."""

    def to_json(self) -> dict[str, float]:
        return {k: round(v, 4) for k, v in vars(self).items()}


def estimate_sampling(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: ReplayOptions, *, engine: VllmEngine | None = None
) -> SamplingEstimate:
    """Samples one batch of each kind and writes nothing. Raises InputError as `Sampler` does."""
    from hf_grow.training.data.sampling import Sampler

    sampler = Sampler(model, tokenizer, options, engine=engine)
    sampler.warm_up()
    started = time.perf_counter()
    samples = []
    for chat in sampler.kinds:
        drawn = sampler.draw(0, sampler.batch_size, chat=chat)
        sampler.measure_surprise(drawn, chat=chat)
        samples += drawn
    seconds = time.perf_counter() - started
    sampled = max(1, sum(s.tokens for s in samples))
    kept = sum(s.tokens for s in samples if sampler.drop_reason(s) is None) / sampled
    rate = sampled / seconds
    return SamplingEstimate(options.tokens / max(rate * kept, 1e-9), rate, kept)


def sample_replay(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    options: ReplayOptions,
    *,
    ref: str = "",
    revision: str = "",
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda tokens: None,
    on_token: Callable[[int, int], None] = lambda token, max_new_tokens: None,
    shared: SharedBatches | None = None,
    engine: VllmEngine | None = None,
) -> ReplayResult:
    """Samples into the folder `out` until it holds `options.tokens` tokens of text; continues what an earlier run left unfinished.

    Args:
        ref, revision: name of the model, for the record.
        progress: called with the number of tokens that were added.
        on_token, engine: see `Sampler`.
        shared: batches that other processes sample, in `help_sampling`. The texts are the same.

    A folder that already has enough tokens is complete, even if an earlier run was to sample more. Raises OutputError if `out` holds other
    files, or samples of another model or with other settings; ExecutionError if the filters keep nothing; InputError as `Sampler` does.
    """
    from hf_grow.training.data.sampling import Sampler, prompts_identity
    from hf_grow.training.data.source_model import weights_digest

    sampler = Sampler(model, tokenizer, options, on_token, engine)
    settings = sampler.options.identity() | {"prompts_identity": prompts_identity(options)}
    del settings["tokens"]
    if sampler.chat_share and sampler.template is not None:
        settings["template"] = sampler.template.before + sampler.template.between + sampler.template.after
    fresh = {"format": FORMAT_VERSION, "model": ref, "digest": weights_digest(model), "settings": settings, "made_by": __version__}
    earlier = open_record(out, fresh | ({"revision": revision} if revision else {}), overwrite=overwrite)
    record = earlier | {"tokens": options.tokens, "complete": earlier["counts"]["tokens"] >= options.tokens}
    if record["complete"] and record == earlier:
        return ReplayResult(out, record, 0.0, 0)
    sampler.surprise = {kind: (median, spread) for kind, (median, spread) in record["surprise"].items()}
    started, before = time.perf_counter(), record["counts"]["sampled_tokens"]
    with _write_errors(out), (out / TEXTS_FILE).open("r+b") as file:
        file.seek(record["bytes"])
        file.truncate()  # a batch that was written, but not recorded
        write_record(out, record)  # first: a folder that is being extended is no longer complete
        if record["complete"]:
            return ReplayResult(out, record, 0.0, 0)
        progress(record["counts"]["tokens"])
        file.seek(0)
        seen = {dedup_key(json.loads(line)["text"]) for line in file}
        _sample(sampler, file, out, record, seen, progress, shared)
    return ReplayResult(out, record, time.perf_counter() - started, record["counts"]["sampled_tokens"] - before, sampler.flops)


def help_sampling(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: ReplayOptions, shared: SharedBatches) -> int:
    """Samples batches ahead for the first process of the group, which runs `sample_replay`, until its texts are complete; returns FLOPs."""
    from hf_grow.training.data.sampling import Sampler

    sampler = Sampler(model, tokenizer, options)
    with _write_errors(shared.out):
        while (record := read_record(shared.out)) is None or not record["complete"]:
            if record is None or not shared.sample_one(sampler, _next_batches(sampler, record, 2 * shared.group.count)):
                shared.wait()
    return sampler.flops


@contextmanager
def _write_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ExecutionError(f"Cannot write to {out}: {error.strerror or error}.", hint="What was sampled so far is kept.") from None


def _sample(
    sampler: Sampler,
    file: IO[bytes],
    out: Path,
    record: dict[str, Any],
    seen: set[bytes],
    progress: Callable[[int], None],
    shared: SharedBatches | None,
) -> None:
    """Samples, filters and records batches until the record's number of tokens is reached."""
    counts, wanted, empty_batches = record["counts"], record["tokens"], 0
    while not record["complete"]:
        batch, *ahead = _next_batches(sampler, record, 1 if shared is None else 2 * shared.group.count)
        samples = sampler.draw(batch.number, batch.size, chat=batch.chat) if shared is None else shared.draw(sampler, batch, ahead)
        sampler.measure_surprise(samples, chat=batch.chat)
        chat, kept = batch.chat, []
        for sample in samples:
            if counts["tokens"] >= wanted:
                break
            reason = "duplicate" if dedup_key(sample.text) in seen else sampler.drop_reason(sample)
            counts["sampled_texts"] += 1
            counts["sampled_tokens"] += sample.tokens
            if reason:
                counts["dropped"][reason] = counts["dropped"].get(reason, 0) + 1
                continue
            seen.add(dedup_key(sample.text))
            kept.append(sample)
            counts["texts"] += 1
            counts["tokens"] += sample.tokens
            counts["chat_tokens"] += sample.tokens * chat
            counts["cut"] += sample.cut
        append_texts(file, (Document(s.text, s.frame) for s in kept))
        record |= {
            "batches": record["batches"] + 1,
            "bytes": file.tell(),
            "complete": counts["tokens"] >= wanted,
            "surprise": sampler.surprise,
        }
        write_record(out, record)
        progress(sum(s.tokens for s in kept))
        empty_batches = 0 if kept else empty_batches + 1
        if empty_batches == MAX_EMPTY_BATCHES:
            why = ", ".join(f"{reason} {count}" for reason, count in counts["dropped"].items())
            raise ExecutionError(
                f"None of the last {MAX_EMPTY_BATCHES * len(samples)} texts was kept ({why}, of {counts['sampled_texts']} sampled).",
                hint="Try --start random, --prompts, another --chat-share or --temperature, or looser filters (--min-tokens, --max-repetition, --max-compression).",
            )


def _next_batches(sampler: Sampler, record: Mapping[str, Any], count: int) -> list[Batch]:
    """The next batch, computed from the record alone, so that a resumed run gets the same texts; and up to ``count`` - 1 that probably follow.

    A batch is full, or has the estimated number of texts that is still needed.
    """
    counts, wanted = dict(record["counts"]), record["tokens"]
    batches: list[Batch] = []
    for number in range(record["batches"], record["batches"] + count):
        per_text: float = counts["tokens"] / counts["sampled_texts"] if counts["tokens"] else sampler.length
        needed = math.ceil((wanted - counts["tokens"]) / per_text)
        size = min(sampler.batch_size, max(1, needed))
        if batches and size < sampler.batch_size:
            break  # how many texts it will have is not known
        chat = counts["chat_tokens"] < sampler.chat_share * (counts["tokens"] + 1)
        batches.append(Batch(number, size, chat))
        counts["sampled_texts"] += size
        counts["tokens"] += size * per_text
        counts["chat_tokens"] += size * per_text * chat
    return batches
