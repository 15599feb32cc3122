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
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from hf_grow._version import __version__
from hf_grow.common.safe_files import read_json, to_json
from hf_grow.errors import ExecutionError, InputError, OutputError, SourceError
from hf_grow.options import Needs, Options, Size, Unless

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_grow.training.data.sampling import Sampler

TEXTS = "texts.jsonl"
RECORD = "replay.json"
FORMAT = 2
_HOPELESS = 8
"""Batches without a single text that is kept, after which sampling stops."""


class ReplayOptions(Options):
    """How text is sampled from a model, and which of it is kept."""

    tokens: Size = Field(default=1_000_000, gt=0)
    """Tokens of text to keep; more can be added later."""
    temperature: float = Field(default=1.0, gt=0, le=10)
    """Below 1 the text is more usual, above 1 more varied."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the likeliest tokens that together have this probability."""
    top_k: int = Field(default=0, ge=0)
    """Sample from this many likeliest tokens; 0 for all."""
    max_length: int | None = Field(default=None, ge=2)
    """Tokens of one text at most, held to what the model can read. Default: seq_length of the training (of the command: 1024)."""
    batch_size: int | None = Field(default=None, gt=0)
    """Texts sampled at once: the more, the faster, as long as memory holds them. Part of what decides the texts. Default: 32,768 tokens' worth, at most 64."""
    chat_share: float | None = Field(default=None, ge=0, le=1)
    """Part of the tokens that are conversations, sampled through the chat template. Default: half for a model that ends its texts as the template ends an answer, else none."""
    start: Annotated[Literal["document", "random"], Unless("prompts")] = "document"
    """Begin each plain text as a document begins (BOS, else EOS, but no token of a chat template), or with a random token: for models that then always say the same."""
    prompts: str | None = None
    """Folder, file or glob of texts whose first tokens are continued instead."""
    prompt_tokens: Annotated[int, Field(gt=0), Needs("prompts")] = 8
    """First tokens of each of these texts."""
    seed: int = Field(default=0, ge=0)
    """Decides what is drawn."""
    min_tokens: int = Field(default=16, ge=0)
    """Shorter texts are dropped."""
    max_repetition: float = Field(default=0.5, ge=0, le=1)
    """Texts in which more than this part of the 4-token sequences came before in the same text are dropped."""
    max_compression: float = Field(default=8.0, gt=1)
    """Texts that zlib makes smaller than this many times are dropped."""
    max_surprise: float | None = Field(default=None, gt=0)
    """Drop texts whose nats a token lie further than this many deviations from the median of the first batch. Default: none is dropped."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype to compute in. Default: the model's own (auto)."""


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


def read_record(folder: Path) -> dict[str, Any] | None:
    """replay.json of a folder, or None where there is none. Raises InputError if it cannot be used."""
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        record = read_json(path)
        numbers = (record["tokens"], record["bytes"], record["counts"]["tokens"])
        if record["format"] != FORMAT or not all(isinstance(n, int) for n in numbers) or not isinstance(record["complete"], bool):
            raise ValueError
        if not isinstance(record["model"], str) or not isinstance(record["settings"], dict):
            raise ValueError
    except (SourceError, ValueError, KeyError, TypeError):
        raise InputError(f"{path} is damaged, or of another version of hf-grow.", hint="Sample again with --overwrite.") from None
    return dict(record)


def command(record: Mapping[str, Any], folder: Path) -> str:
    """The command that goes on with the samples of a folder: model, settings and number of tokens as its record has them."""
    given = {name: record["settings"].get(name) for name in ReplayOptions.model_fields} | {"tokens": record["tokens"]}
    words = ["hf-grow", "replay", record["model"] or "MODEL", *(("--revision", record["revision"]) if record.get("revision") else ())]
    words += ["-o", folder]
    for name, value in given.items():
        if value is not None and value != ReplayOptions.model_fields[name].default:
            words += [f"--{name.replace('_', '-')}", value]
    return shlex.join(map(str, words))


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
