"""Everything a training reads, from its options: the mixed sequences, the named sets, and what to tell about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from hf_grow.common.extras import require_packages
from hf_grow.training.config.data_options import DataOptions, EvalSource, TextOptions
from hf_grow.training.data import cache, packing
from hf_grow.training.data.mixing import Pattern, rows_of
from hf_grow.training.data.packing import IGNORED, Encoding, Facts
from hf_grow.training.data.sources import Notify, Source, find

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from hf_grow.training.data.stream import MixedStream

_TELL_EVERY = 20.0  # seconds
_PROBE = 64  # documents that a survey tokenises


@dataclass(frozen=True)
class Part:
    """One source in the training, or one named set."""

    use: str
    """'train', 'replay', or 'eval NAME'."""
    label: str
    share: float | None
    """Of all training sequences; None for a named set."""
    documents: int | None = None
    """None where text is streamed, or only some of it is measured on, and so unknown."""
    tokens: int | None = None
    """Of a named set those that are measured on."""
    sequences: int | None = None
    passes: float | None = None
    """How often the training goes through it."""


@dataclass(frozen=True)
class Collator:
    """Rows of equal length to a batch: input_ids and labels, int64 [rows, seq_length]; labels are -100 where a row is not full."""

    filler: int
    """Token id that stands in input_ids where a row is not full."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        import numpy as np
        import torch

        labels = torch.from_numpy(np.asarray([row["input_ids"] for row in rows], dtype=np.int64))
        return {"input_ids": labels.masked_fill(labels == IGNORED, self.filler), "labels": labels}


@dataclass(frozen=True)
class TrainData:
    """What `build` makes of DataOptions."""

    train: Dataset | MixedStream
    """Rows {"input_ids": [seq_length]} in the order in which they are to be trained on: use a sequential sampler.
    Streamed: without end, and resumable by state_dict."""
    evals: dict[str, Dataset]
    parts: tuple[Part, ...]
    collator: Collator
    seq_length: int

    @property
    def sequences(self) -> int | None:
        """Rows of `train`; None if streamed."""
        return None if self.tokens is None else self.tokens // self.seq_length

    @property
    def tokens(self) -> int | None:
        """Tokens of `train`; None if streamed."""
        return len(self.train) * self.seq_length if hasattr(self.train, "__len__") else None

    def describe(self) -> list[dict[str, Any]]:
        """One row of JSON data for each source and named set."""
        return [vars(part) for part in self.parts]


def build(
    options: DataOptions,
    tokenizer: PreTrainedTokenizerBase,
    *,
    cache: Path | None = None,
    notify: Notify = lambda message: None,
    vocab_size: int | None = None,
    sequences: int | None = None,
    model: str | None = None,
) -> TrainData:
    """Opens, tokenises, packs (or finds in the cache) and mixes everything that `options` name.

    `vocab_size`: of the model, which no token id may reach. `sequences`: rows of `train`; default: one pass through the new text.
    `model`: the checkpoint to be trained; its growth.json says what self-replay samples from. Raises InputError, OutputError.
    """
    require_packages("datasets")
    root = cache_root(options, cache)
    encoding = Encoding(tokenizer, options.bos)
    new = [find(s, notify=notify) for s in options.train]
    measured = {name: find(s, notify=notify) for name, s in options.eval.items()}
    old = _replay(options, root, model, notify)
    evals, parts = {}, []
    for name, source in measured.items():
        evals[name], part = _eval_set(name, source, options.eval[name], encoding, options, root, vocab_size, notify)
        parts.append(part)
    train: Dataset | MixedStream
    if options.streaming:
        train, trained = _stream(new, old, encoding, options, vocab_size, notify)
    else:
        train, trained = _mix(new, old, encoding, options, root, vocab_size, sequences, notify)
    return TrainData(train, evals, (*trained, *parts), Collator(tokenizer.eos_token_id), options.seq_length)


def survey(
    options: DataOptions, tokenizer: PreTrainedTokenizerBase, *, notify: Notify = lambda message: None, vocab_size: int | None = None
) -> list[dict[str, Any]]:
    """What `build` would find, for a dry run: every source is opened and its first documents are tokenised, no more.

    `tokens` is an estimate from the size of the files, None on the Hub; of a named set at most what is measured on. Self-replay is told, not
    sampled. Raises as `build` does.
    """
    require_packages("datasets")
    encoding = Encoding(tokenizer, options.bos)
    uses: list[tuple[str, TextOptions]] = [("train", s) for s in options.train]
    uses += [(f"eval {name}", s) for name, s in options.eval.items()]
    found = []
    if options.replay is not None and options.replay.self is None:
        uses.insert(len(options.train), ("replay", options.replay))
    elif options.replay is not None and options.replay.self is not None:
        found.append({"use": "replay", "label": "sampled from the source model", "bytes": None, "tokens": options.replay.self.tokens})
    for use, text in uses:
        source = find(text, notify=notify)
        batch = next(packing.batches(source.documents(), _PROBE), [])
        if not batch:
            raise packing.no_text(source.label)
        ids = encoding(batch)
        packing.check_ids(max(max(i) for i in ids), vocab_size, source.label)
        rate = sum(map(len, ids)) / sum(len(d.text.encode()) for d in batch)
        tokens = source.nbytes and round(rate * source.nbytes)
        if isinstance(text, EvalSource) and text.sequences:
            most = text.sequences * options.seq_length
            tokens = min(tokens or most, most)
        found.append({"use": use, "label": source.label, "bytes": source.nbytes, "tokens": tokens})
    return found


def cache_root(options: DataOptions, given: Path | None = None) -> Path:
    """The folder of the cache: the one that was given, else the options', else the user's."""
    return given or (Path(options.cache).expanduser() if options.cache else cache.default_root() / "data")


def _replay(options: DataOptions, root: Path, model: str | None, notify: Notify) -> tuple[Source, float] | None:
    old = options.replay
    if old is None:
        return None
    if old.self is not None:
        from hf_grow.training.data.self_replay import sampled_from

        folder = sampled_from(old.self, root / "replay", seq_length=options.seq_length, trained=model, notify=notify)
        old = old.model_copy(update={"path": [str(folder)], "self": None})
    return find(old, notify=notify), old.share


def _eval_set(
    name: str,
    source: Source,
    text: EvalSource,
    encoding: Encoding,
    options: DataOptions,
    root: Path,
    vocab_size: int | None,
    notify: Notify,
) -> tuple[Dataset, Part]:
    import numpy as np

    data, facts = _packed(source, encoding, options, root, vocab_size, notify, remainder="keep")
    documents: int | None = facts.documents
    if text.sequences is not None and len(data) > text.sequences:
        data, documents = data.select(np.linspace(0, len(data) - 1, text.sequences).astype(np.int64)), None
    tokens = sum(int((np.asarray(row["input_ids"]) != IGNORED).sum()) for row in data)
    return data, Part(f"eval {name}", source.label, None, documents, tokens, len(data))


def _packed(
    source: Source, encoding: Encoding, options: DataOptions, root: Path, vocab_size: int | None, notify: Notify, *, remainder: str
) -> tuple[Dataset, Facts]:
    last = monotonic()

    def tell(tokens: int) -> None:
        nonlocal last
        if monotonic() - last > _TELL_EVERY:
            last = monotonic()
            notify(f"Tokenising {source.label}: {tokens / 1e6:.1f}M tokens so far.")

    return packing.packed(
        source,
        encoding,
        seq_length=options.seq_length,
        remainder=remainder,
        root=root,
        num_proc=options.num_proc,
        vocab_size=vocab_size,
        notify=notify,
        progress=tell,
    )


def _shares(options: DataOptions, sizes: Sequence[int], old: tuple[Source, float] | None) -> list[Fraction]:
    """Of the old text, if there is any, and of each source of new text. They sum to one."""
    weights = [Fraction(size if s.weight is None else s.weight) for s, size in zip(options.train, sizes, strict=True)]
    share = Fraction(0) if old is None else Fraction(old[1]).limit_denominator(10**6)
    return [share] * (old is not None) + [(1 - share) * w / sum(weights) for w in weights]


def _mix(
    new: Sequence[Source],
    old: tuple[Source, float] | None,
    encoding: Encoding,
    options: DataOptions,
    root: Path,
    vocab_size: int | None,
    sequences: int | None,
    notify: Notify,
) -> tuple[Dataset, list[Part]]:
    import numpy as np
    from datasets import concatenate_datasets

    sources = [*([old[0]] if old else []), *new]
    made = [_packed(s, encoding, options, root, vocab_size, notify, remainder=options.remainder) for s in sources]
    sizes = [len(data) for data, _ in made]
    shares = _shares(options, sizes[len(sizes) - len(new) :], old)
    pattern = Pattern(tuple(shares), options.seed)
    total = sum(sizes[len(sizes) - len(new) :])
    turn, ordinal = pattern.turns(0, sequences or _one_pass(pattern, total, shares[0] if old else Fraction(0)))
    index = np.empty(len(turn), np.int64)
    parts = []
    for number, (source, (_, facts)) in enumerate(zip(sources, made, strict=True)):
        mine = turn == number
        rows = rows_of(ordinal[mine], sizes[number], [options.seed, number], shuffle=options.shuffle)
        index[mine] = sum(sizes[:number]) + rows
        use = "replay" if old and number == 0 else "train"
        passes = int(mine.sum()) / sizes[number]
        if use == "replay" and passes > 1:
            notify(f"There is little old text: each of its {sizes[number]:,} sequences is used {passes:.1f} times.")
        parts.append(Part(use, source.label, float(shares[number]), facts.documents, facts.tokens, sizes[number], passes))
    return concatenate_datasets([data for data, _ in made]).select(index), parts


def _one_pass(pattern: Pattern, new: int, share: Fraction) -> int:
    """Places until `new` of them have gone to new text."""
    import numpy as np

    places = int(new / (1 - share)) + 2
    turn, _ = pattern.turns(0, places)
    is_new = turn > 0 if share else np.ones(places, bool)
    return int(np.searchsorted(np.cumsum(is_new), new)) + 1


def _stream(
    new: Sequence[Source],
    old: tuple[Source, float] | None,
    encoding: Encoding,
    options: DataOptions,
    vocab_size: int | None,
    notify: Notify,
) -> tuple[MixedStream, list[Part]]:
    from hf_grow.training.data.stream import MixedStream, PackedStream

    shares = _shares(options, [1] * len(new), old)
    sources = [*([old[0]] if old else []), *new]
    streams = [
        PackedStream(s.documents(), encoding, seq_length=options.seq_length, vocab_size=vocab_size, label=s.label, notify=notify)
        for s in sources
    ]
    parts = [
        Part("replay" if old and n == 0 else "train", s.label, float(share))
        for n, (s, share) in enumerate(zip(sources, shares, strict=True))
    ]
    read = [[s.identity, float(share)] for s, share in zip(sources, shares, strict=True)]
    identity = cache.key({"sources": read, "encoding": encoding.fingerprint, "seq_length": options.seq_length, "seed": options.seed})
    return MixedStream(streams, Pattern(tuple(shares), options.seed), identity), parts
