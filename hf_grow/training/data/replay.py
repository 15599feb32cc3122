"""Self-replay: text sampled from the source model stands in for its training data, for owners who have none of it.

What a model generates is drawn from what it learned, so training on some of it keeps that (pseudo-rehearsal: Robins 1995; for language
models LAMOL, 1909.03329, and 2605.26097). Samples are filtered: exact duplicates, texts that repeat themselves, broken and short ones.

An instruct model writes conversations too, through its chat template, the user's message included (Magpie, 2406.08464).

A folder of samples holds texts.jsonl ({"text": ..., "frame": ...} a line, appended batch by batch) and replay.json (what they were sampled from and with,
how far it got, and what was dropped). Batch i draws from random numbers of its own, made from (seed, i), so an interrupted
run, repeated, writes the same texts as one that was not.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_grow._version import __version__
from hf_grow.common.safe_files import to_json
from hf_grow.errors import ExecutionError, OutputError
from hf_grow.training.config.replay_options import ReplayOptions
from hf_grow.training.data.replay_files import FORMAT, RECORD, TEXTS, read_record

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_grow.training.data.sampling import Sampler

_HOPELESS = 8
"""Batches without a single text that is kept, after which sampling stops."""


@dataclass(frozen=True)
class Replay:
    """A finished folder of samples."""

    folder: Path
    record: Mapping[str, Any]
    """replay.json: model, digest, settings, counts (texts and tokens kept and sampled, dropped by reason)."""
    seconds: float
    """Of this run."""
    sampled_tokens: int
    """In this run."""

    def to_json(self) -> dict[str, Any]:
        rate = self.sampled_tokens / self.seconds if self.seconds else 0.0
        return {"output": str(self.folder), **self.record, "seconds": round(self.seconds, 3), "tokens_per_second": round(rate, 1)}


@dataclass(frozen=True)
class Estimate:
    """What one batch says of the rest."""

    seconds: float
    tokens_per_second: float
    """Sampled."""
    kept: float
    """Part of the sampled tokens that passes the filters."""

    def to_json(self) -> dict[str, float]:
        return {k: round(v, 4) for k, v in vars(self).items()}


def estimate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: ReplayOptions) -> Estimate:
    """Samples one batch and writes nothing. The first batch of a process is slower than the others, so a short one goes before it."""
    from hf_grow.training.data.sampling import Sampler

    sampler = Sampler(model, tokenizer, options)
    sampler.warm_up()
    began = time.perf_counter()
    drawn = [s for chat in sampler.kinds for s in sampler.draw(0, sampler.batch_size, chat=chat)]
    seconds = time.perf_counter() - began
    sampled = max(1, sum(s.tokens for s in drawn))
    kept = sum(s.tokens for s in drawn if sampler.fault(s) is None) / sampled
    rate = sampled / seconds
    return Estimate(options.tokens / max(rate * kept, 1e-9), rate, kept)


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
    drawing: Callable[[int, int], None] = lambda token, most: None,
) -> Replay:
    """Samples into the folder `out` until it holds `options.tokens` tokens of text; goes on where an earlier run stopped.

    `ref` and `revision` name the model for the record; `progress` is told how many tokens more are kept, `drawing` which token of
    each text of the batch comes next, of how many at most. Samples that are enough for
    `options.tokens` are whole, also where more was asked for before. Raises OutputError if `out` holds something else, or samples of another
    model or other settings; ExecutionError if the filters leave nothing.
    """
    from hf_grow.training.data.sampling import Sampler, digest

    sampler = Sampler(model, tokenizer, options, drawing)
    settings = sampler.options.model_dump(mode="json", exclude={"tokens"})
    settings |= {"prompts_identity": Sampler.prompts_identity(options)}
    if sampler.chat_share and sampler.turns is not None:
        settings["template"] = sampler.turns.before + sampler.turns.between + sampler.turns.after
    record: dict[str, Any] = {"format": FORMAT, "model": ref, "digest": digest(model), "settings": settings, "made_by": __version__}
    record |= {"revision": revision} if revision else {}
    record = _begin(out, record, overwrite)
    found = dict(record)
    record |= {"tokens": options.tokens, "complete": record["counts"]["tokens"] >= options.tokens}
    if record["complete"] and record == found:
        return Replay(out, record, 0.0, 0)
    sampler.surprise = {kind: (median, spread) for kind, (median, spread) in record["surprise"].items()}
    began, before = time.perf_counter(), record["counts"]["sampled_tokens"]
    try:
        with (out / TEXTS).open("r+b") as file:
            file.seek(record["bytes"])
            file.truncate()  # a batch that was written, but not yet noted
            _note(out, record)  # before more is written: what is being made longer is not whole, what is enough is
            if record["complete"]:
                return Replay(out, record, 0.0, 0)
            progress(record["counts"]["tokens"])
            file.seek(0)
            seen = {sampler.same(json.loads(line)["text"]) for line in file}
            _sample(sampler, file, out, record, seen, options.tokens, progress)
    except OSError as error:
        raise ExecutionError(f"Cannot write to {out}: {error.strerror}.", hint="What was sampled so far is kept.") from None
    return Replay(out, record, time.perf_counter() - began, record["counts"]["sampled_tokens"] - before)


def check_output(out: Path, *, overwrite: bool) -> dict[str, Any] | None:
    """The record of the samples that `out` holds, if they are to be kept. Raises OutputError if it holds something else."""
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file.", hint="Give a folder with -o.")
    if not out.is_dir():
        return None
    if overwrite:
        if any(p.name not in (TEXTS, RECORD) for p in out.iterdir()):
            raise OutputError(f"{out} holds other files than samples.", hint="Give a new folder with -o.")
        return None
    record = read_record(out)
    # Texts without a record are the first batch of a run that was killed before it noted them.
    if record is None and any(p.name != TEXTS for p in out.iterdir()):
        raise OutputError(f"{out} is not empty, and holds no samples.", hint="Give a new folder with -o.")
    return record


def _begin(out: Path, fresh: dict[str, Any], overwrite: bool) -> dict[str, Any]:
    """The record to go on with: of an earlier run of the same kind, else a new one."""
    found = check_output(out, overwrite=overwrite)
    if found is not None:
        hint = "Give another -o, or --overwrite."
        if found.get("digest") != fresh["digest"]:
            raise OutputError(f"{out} holds samples of another model ({found.get('model')}).", hint=hint)
        if found.get("settings") != fresh["settings"]:
            other = [k for k, v in fresh["settings"].items() if found["settings"].get(k) != v]
            raise OutputError(f"{out} holds samples with other settings ({', '.join(other)}).", hint=hint)
        if not (out / TEXTS).is_file() or (out / TEXTS).stat().st_size < found["bytes"]:
            raise OutputError(f"{out / TEXTS} was changed since it was sampled.", hint=hint)
        return found
    counts = {"texts": 0, "tokens": 0, "cut": 0, "chat_tokens": 0, "sampled_texts": 0, "sampled_tokens": 0, "dropped": {}}
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / RECORD).unlink(missing_ok=True)
        (out / TEXTS).write_bytes(b"")
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error.strerror}.") from None
    return fresh | {"batches": 0, "bytes": 0, "surprise": {}, "counts": counts}


def _sample(
    sampler: Sampler, file: Any, out: Path, record: dict[str, Any], seen: set[bytes], wanted: int, progress: Callable[[int], None]
) -> None:
    counts, barren = record["counts"], 0
    while not record["complete"]:
        chat = counts["chat_tokens"] < sampler.chat_share * (counts["tokens"] + 1)
        drawn, kept = sampler.draw(record["batches"], _size(sampler, counts, wanted), chat=chat), []
        for sample in drawn:
            if counts["tokens"] >= wanted:
                break
            fault = "duplicate" if sampler.same(sample.text) in seen else sampler.fault(sample)
            counts["sampled_texts"] += 1
            counts["sampled_tokens"] += sample.tokens
            if fault:
                counts["dropped"][fault] = counts["dropped"].get(fault, 0) + 1
                continue
            seen.add(sampler.same(sample.text))
            kept.append(sample)
            counts["texts"] += 1
            counts["tokens"] += sample.tokens
            counts["chat_tokens"] += sample.tokens * chat
            counts["cut"] += sample.cut
        file.write("".join(json.dumps({"text": s.text, "frame": s.frame}, ensure_ascii=False) + "\n" for s in kept).encode())
        file.flush()
        os.fsync(file.fileno())
        record |= {
            "batches": record["batches"] + 1,
            "bytes": file.tell(),
            "complete": counts["tokens"] >= wanted,
            "surprise": sampler.surprise,
        }
        _note(out, record)
        progress(sum(s.tokens for s in kept))
        barren = 0 if kept else barren + 1
        if barren == _HOPELESS:
            why = ", ".join(f"{reason} {count}" for reason, count in counts["dropped"].items())
            raise ExecutionError(
                f"None of the last {_HOPELESS * len(drawn)} texts was kept ({why}, of {counts['sampled_texts']} sampled).",
                hint="Try --start random, --prompts, another --chat-share or --temperature, or looser filters (--min-tokens, --max-repetition, --max-compression).",
            )


def _size(sampler: Sampler, counts: Mapping[str, Any], wanted: int) -> int:
    """Texts in the next batch: a whole one, or what will probably be enough. Follows from the record, as everything that decides the texts."""
    per_text: float = counts["tokens"] / counts["sampled_texts"] if counts["tokens"] else sampler.length
    needed: int = math.ceil((wanted - counts["tokens"]) / per_text)
    return min(sampler.batch_size, max(1, needed))


def _note(out: Path, record: dict[str, Any]) -> None:
    """After the texts are on the disk, and all at once."""
    new = out / f"{RECORD}.new"
    new.write_text(to_json(record), encoding="utf-8")
    os.replace(new, out / RECORD)
