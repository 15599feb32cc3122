"""Builds the datasets of a training from its options: the mixed training sequences and the named evaluation sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from hf_grow.common.extras import require_packages
from hf_grow.training.config.data_options import DataOptions, EvalSource, TextOptions
from hf_grow.training.data import packing
from hf_grow.training.data.cache import default_root, key
from hf_grow.training.data.document_masking import position_ids, with_documents
from hf_grow.training.data.mixing import Interleaving, row_indices
from hf_grow.training.data.packing import IGNORED, DocumentEncoder, PackingStats
from hf_grow.training.data.sources import Notify, TextSource, find_text

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from hf_grow.training.data.stream import MixedStream

_PROGRESS_INTERVAL = 20.0  # seconds
_SURVEY_DOCUMENTS = 64


@dataclass(frozen=True)
class DataPart:
    """One source of the training text, or one named evaluation set."""

    use: str
    """'train', 'replay', or 'eval NAME'."""
    label: str
    share: float | None
    """Of all training sequences; None for a named set."""
    documents: int | None = None
    """None if the text is streamed, or if only some sequences of a named set are used."""
    tokens: int | None = None
    """Of a named set: those of the sequences that are used."""
    sequences: int | None = None
    passes: float | None = None
    """How many times the training reads it."""


@dataclass(frozen=True)
class Collator:
    """Turns rows of equal length into a batch: input_ids and labels, int64 [rows, seq_length]; labels are -100 at padding.

    Rows that hold the lengths of their documents also give position_ids, and no label at the first tokens of documents.
    """

    filler: int
    """Token id that pads input_ids."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        import numpy as np
        import torch

        labels = torch.from_numpy(np.asarray([row["input_ids"] for row in rows], dtype=np.int64))
        batch = {"input_ids": labels.masked_fill(labels == IGNORED, self.filler), "labels": labels}
        return with_documents(batch, position_ids(rows))


@dataclass(frozen=True)
class TrainData:
    """What `build` returns."""

    train: Dataset | MixedStream
    """Rows {"input_ids": [seq_length]} in training order: use a sequential sampler. A stream is infinite, and resumed by its state_dict."""
    evals: dict[str, Dataset]
    parts: tuple[DataPart, ...]
    collator: Collator
    seq_length: int
    sampling_flops: int = 0
    """Of sampling the old text, in this process."""

    @property
    def sequences(self) -> int | None:
        """Rows of `train`; None if streamed."""
        return len(self.train) if hasattr(self.train, "__len__") else None

    @property
    def tokens(self) -> int | None:
        """Tokens of `train`; None if streamed."""
        return None if self.sequences is None else self.sequences * self.seq_length

    def describe(self) -> list[dict[str, Any]]:
        """The parts as JSON data."""
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
    """Opens, tokenises, packs (or loads from the cache) and mixes all text that `options` names.

    Args:
        cache: cache folder; default: `options.cache`, else the user's cache.
        notify: receives progress messages.
        vocab_size: rows of the model's embedding; a token id beyond it is an error.
        sequences: rows of `train`; default: one pass over the new text.
        model: the checkpoint to be trained; self-replay samples from the source that its growth.json names.

    Raises InputError (text or options), SourceError (the Hub), OutputError (the cache), ExecutionError (self-replay).
    """
    require_packages("datasets")
    builder = _Builder(options, DocumentEncoder(tokenizer, options.bos), cache_root(options, cache), vocab_size, notify)
    new = [find_text(s, notify=notify) for s in options.train]
    eval_sources = {name: find_text(s, notify=notify) for name, s in options.eval.items()}
    old, flops = builder.replay(model)
    sets = {name: builder.eval_set(name, source) for name, source in eval_sources.items()}
    train, parts = builder.stream(new, old) if options.streaming else builder.mix(new, old, sequences)
    evals = {name: data for name, (data, _) in sets.items()}
    every = (*parts, *(part for _, part in sets.values()))
    return TrainData(train, evals, every, Collator(tokenizer.eos_token_id), options.seq_length, flops)


def survey(
    options: DataOptions, tokenizer: PreTrainedTokenizerBase, *, notify: Notify = lambda message: None, vocab_size: int | None = None
) -> list[dict[str, Any]]:
    """What `build` would read, for a dry run: opens every source and tokenises its first documents only.

    Returns {"use", "label", "bytes", "tokens"} for each. ``tokens`` is estimated from the file sizes; None on the Hub; for a named set at
    most those of the sequences that are used. Self-replay is listed, not sampled. Raises as `build` does.
    """
    require_packages("datasets")
    encoder = DocumentEncoder(tokenizer, options.bos)
    rows: list[dict[str, Any]] = []
    uses: list[tuple[str, TextOptions]] = [("train", s) for s in options.train]
    if options.replay is not None and options.replay.self is not None:
        rows.append({"use": "replay", "label": "sampled from the source model", "bytes": None, "tokens": options.replay.self.tokens})
    elif options.replay is not None:
        uses.append(("replay", options.replay))
    uses += [(f"eval {name}", s) for name, s in options.eval.items()]
    for use, text in uses:
        source = find_text(text, notify=notify)
        batch = next(packing.batches(source.documents(), _SURVEY_DOCUMENTS), [])
        if not batch:
            raise packing.no_text_error(source.label)
        ids = encoder(batch)
        packing.check_token_ids(max(max(i) for i in ids), vocab_size, source.label)
        tokens_per_byte = sum(map(len, ids)) / sum(len(d.text.encode()) for d in batch)
        tokens = source.nbytes and round(tokens_per_byte * source.nbytes)
        if isinstance(text, EvalSource) and text.sequences:
            limit = text.sequences * options.seq_length
            tokens = min(tokens or limit, limit)
        rows.append({"use": use, "label": source.label, "bytes": source.nbytes, "tokens": tokens})
    return rows


def cache_root(options: DataOptions, given: Path | None = None) -> Path:
    """The cache folder: `given`, else the options', else the user's."""
    return given or (Path(options.cache).expanduser() if options.cache else default_root() / "data")


@dataclass(frozen=True)
class _Builder:
    options: DataOptions
    encoder: DocumentEncoder
    root: Path
    vocab_size: int | None
    notify: Notify

    def replay(self, model: str | None) -> tuple[TextSource | None, int]:
        """The old text, and the FLOPs of sampling it: self-replay is sampled first."""
        old, flops = self.options.replay, 0
        if old is None:
            return None, 0
        if old.self is not None:
            from hf_grow.training.data.self_replay import sample_from_source

            folder, flops = sample_from_source(
                old.self, self.root / "replay", seq_length=self.options.seq_length, trained=model, notify=self.notify
            )
            old = old.model_copy(update={"path": [str(folder)], "self": None})
        return find_text(old, notify=self.notify), flops

    def pack(self, source: TextSource, remainder: str) -> tuple[Dataset, PackingStats]:
        last = monotonic()

        def report(tokens: int) -> None:
            nonlocal last
            if monotonic() - last > _PROGRESS_INTERVAL:
                last = monotonic()
                self.notify(f"Tokenising {source.label}: {tokens / 1e6:.1f}M tokens so far.")

        return packing.pack(
            source, self.encoder, seq_length=self.options.seq_length, remainder=remainder, root=self.root,
            intra_document_masking=self.options.intra_document_masking, num_proc=self.options.num_proc,
            vocab_size=self.vocab_size, notify=self.notify, progress=report,
        )  # fmt: skip

    def eval_set(self, name: str, source: TextSource) -> tuple[Dataset, DataPart]:
        """All sequences of a named set, or `sequences` of them at even distances."""
        import numpy as np

        limit = self.options.eval[name].sequences
        data, stats = self.pack(source, "keep")
        documents: int | None = stats.documents
        if limit is not None and len(data) > limit:
            data, documents = data.select(np.linspace(0, len(data) - 1, limit).astype(np.int64)), None
        tokens = sum(int((np.asarray(row["input_ids"]) != IGNORED).sum()) for row in data)
        return data, DataPart(f"eval {name}", source.label, None, documents, tokens, len(data))

    def shares(self, sizes: Sequence[int]) -> tuple[Fraction, ...]:
        """Shares of the old text (if any) and of each source of new text, by weight or by ``sizes``. They sum to 1."""
        weights = [Fraction(size if s.weight is None else s.weight) for s, size in zip(self.options.train, sizes, strict=True)]
        old = [Fraction(self.options.replay.share).limit_denominator(10**6)] if self.options.replay else []
        return (*old, *((1 - sum(old)) * w / sum(weights) for w in weights))

    def mix(self, new: Sequence[TextSource], old: TextSource | None, sequences: int | None) -> tuple[Dataset, list[DataPart]]:
        import numpy as np
        from datasets import concatenate_datasets

        options, first_new = self.options, int(old is not None)
        sources = [*([old] if old else []), *new]
        packed = [self.pack(s, options.remainder) for s in sources]
        sizes = [len(data) for data, _ in packed]
        shares = self.shares(sizes[first_new:])
        interleaving = Interleaving(shares, options.seed)
        length = sequences or _one_pass(interleaving, sum(sizes[first_new:]), shares[0] if old else Fraction(0))
        assigned, ordinal = interleaving.assign(0, length)
        index = np.empty(len(assigned), np.int64)
        parts = []
        for number, (source, (_, stats)) in enumerate(zip(sources, packed, strict=True)):
            is_own = assigned == number
            index[is_own] = sum(sizes[:number]) + row_indices(
                ordinal[is_own], sizes[number], [options.seed, number], shuffle=options.shuffle
            )
            use = "train" if number >= first_new else "replay"
            passes = int(is_own.sum()) / sizes[number]
            if use == "replay" and passes > 1:
                self.notify(f"There is little replay text: each of its {sizes[number]:,} sequences is used {passes:.1f} times.")
            parts.append(DataPart(use, source.label, float(shares[number]), stats.documents, stats.tokens, sizes[number], passes))
        return concatenate_datasets([data for data, _ in packed]).select(index), parts

    def stream(self, new: Sequence[TextSource], old: TextSource | None) -> tuple[MixedStream, list[DataPart]]:
        from hf_grow.training.data.stream import MixedStream, PackedStream, ShuffledStream

        length, seed = self.options.seq_length, self.options.seed
        shares = self.shares([1] * len(new))
        sources = [*([old] if old else []), *new]
        masking = {"intra_document_masking": True} if self.options.intra_document_masking else {}
        buffer = self.options.shuffle_buffer
        streams: list[PackedStream | ShuffledStream] = []
        for number, source in enumerate(sources):
            packed = PackedStream(source, self.encoder, seq_length=length, vocab_size=self.vocab_size, notify=self.notify, **masking)
            streams.append(packed if buffer is None else ShuffledStream(packed, buffer, [seed, number]))
        uses = [*(["replay"] if old else []), *["train"] * len(new)]
        parts = [DataPart(use, s.label, float(share)) for use, s, share in zip(uses, sources, shares, strict=True)]
        shuffled = {} if buffer is None else {"shuffle_buffer": buffer}
        read = [[s.identity, float(share)] for s, share in zip(sources, shares, strict=True)]
        identity = key({"sources": read, "encoding": self.encoder.fingerprint, "seq_length": length, "seed": seed, **masking, **shuffled})
        return MixedStream(streams, Interleaving(shares, seed), identity), parts


def _one_pass(interleaving: Interleaving, new: int, old_share: Fraction) -> int:
    """The number of places until `new` of them are new text."""
    import numpy as np

    places = int(new / (1 - old_share)) + 2
    assigned, _ = interleaving.assign(0, places)
    is_new = assigned > 0 if old_share else np.ones(places, bool)
    return int(np.searchsorted(np.cumsum(is_new), new)) + 1
