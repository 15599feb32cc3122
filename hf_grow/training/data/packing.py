"""Tokenises documents and packs them into sequences of equal length.

Every document ends with EOS; all are concatenated, and the token stream is split every `seq_length` tokens. The result does not depend on
batch size or number of processes. Tokens attend to all earlier ones of their sequence, of whatever document, as in the pretraining of GPT-3
(arXiv 2005.14165, section B); where they must not, rows also hold the lengths of their documents (`document_masking`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hf_grow.common.safe_files import read_json, to_json
from hf_grow.errors import InputError
from hf_grow.training.data import cache
from hf_grow.training.data.document_masking import LENGTHS, split_lengths
from hf_grow.training.data.replay_files import Document
from hf_grow.training.data.sources import Notify, TextSource, explain_read_errors

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

VERSION = 1
"""Part of every cache key: increase it when the format of the cached files changes."""
IGNORED = -100
"""Padding in a last, partial sequence; the collator turns it into labels of -100."""
BATCH = 256
"""Documents tokenised at once."""


@dataclass(frozen=True)
class DocumentEncoder:
    """Turns documents into token ids, with BOS and EOS as their frame requires. Can be pickled to another process.

    Raises InputError if the tokenizer lacks EOS, or BOS where `bos` is "always".
    """

    tokenizer: PreTrainedTokenizerBase
    bos: Literal["tokenizer", "always", "never"]

    def __post_init__(self) -> None:
        if self.tokenizer.eos_token_id is None:
            raise InputError("The tokenizer has no EOS token to separate documents.", hint="Set eos_token in its tokenizer_config.json.")
        if self.bos == "always" and self.tokenizer.bos_token_id is None:
            raise InputError("bos is `always`, but the tokenizer has no BOS token.", hint="Use bos: tokenizer.")

    def __call__(self, documents: Sequence[Document | str]) -> list[list[int]]:
        """Token ids of each document; a plain string is a document of frame "document"."""
        items = [Document(d) if isinstance(d, str) else d for d in documents]
        eos = self.tokenizer.eos_token_id
        add_special = self.bos == "tokenizer"
        prefix = [self.tokenizer.bos_token_id] if self.bos == "always" else []
        framed = iter(self._tokenize([d.text for d in items if d.frame != "verbatim"], add_special))
        verbatim = iter(self._tokenize([d.text for d in items if d.frame == "verbatim"], False))
        encoded = []
        for document in items:
            if document.frame == "verbatim":
                encoded.append(next(verbatim))
                continue
            ids = next(framed)
            if add_special and ids and ids[-1] == eos:  # some tokenizers append EOS themselves
                ids = ids[:-1]
            encoded.append([*prefix, *ids] if document.frame == "cut" else [*prefix, *ids, eos])
        return encoded

    def _tokenize(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(
            texts, add_special_tokens=add_special_tokens, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )["input_ids"]
        return ids

    @property
    def fingerprint(self) -> str:
        """A hash: encoders with equal fingerprints produce equal ids."""
        t = self.tokenizer
        backend: Any = getattr(t, "backend_tokenizer", None)
        serialised = backend.to_str() if hasattr(backend, "to_str") else json.dumps([type(t).__name__, sorted(t.get_vocab().items())])
        # A slow tokenizer (sentencepiece) cannot be serialised: its ids for a probe text identify it, with its vocabulary.
        probe = self(["The quick  brown\tfox: 1234567890 + naïve 漢字 <s></s>\n\n    def f(x):\n"])
        parts = [serialised, probe, t.bos_token_id, t.eos_token_id, self.bos]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclass(frozen=True)
class PackingStats:
    """What was counted while packing; stored as facts.json."""

    documents: int
    tokens: int
    """Including EOS and BOS, and those dropped at the end of the source."""
    highest: int
    """The largest token id."""


def check_token_ids(highest: int, vocab_size: int | None, label: str) -> None:
    """Raises InputError if a token id has no row in the model's embedding."""
    if vocab_size is not None and highest >= vocab_size:
        raise InputError(
            f"The model and the tokenizer do not match: {label} has token id {highest}, and the model's vocabulary ends at {vocab_size - 1}.",
            hint="Use the model's own tokenizer, or resize the embeddings (resize_token_embeddings) first.",
        )


def no_text_error(label: str) -> InputError:
    return InputError(f"{label} is empty: it contains no text.")


def split_sequences(
    carry: NDArray[np.int32], documents: Iterable[Sequence[int]], length: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Concatenates `carry` and the ids of the documents: the full sequences [n, length], and the remaining tokens [< length]."""
    import numpy as np

    stream = np.concatenate([carry, *(np.asarray(d, dtype=np.int32) for d in documents)])
    full = len(stream) // length * length
    return stream[:full].reshape(-1, length), stream[full:]


def batches(rows: Iterable[dict[str, str]], size: int | None = None) -> Iterator[list[Document]]:
    """Documents in batches of `size` (default: BATCH)."""
    iterator = iter(rows)
    while batch := [Document(row["text"], row.get("frame") or "document") for row in islice(iterator, size or BATCH)]:
        yield batch


def pack(
    source: TextSource,
    encoder: DocumentEncoder,
    *,
    seq_length: int,
    remainder: str,
    root: Path,
    intra_document_masking: bool = False,
    num_proc: int | None = None,
    vocab_size: int | None = None,
    notify: Notify = lambda message: None,
    progress: Callable[[int], None] = lambda tokens: None,
) -> tuple[Dataset, PackingStats]:
    """All sequences of a source as rows {"input_ids": int32 [seq_length]}, from the cache under `root` or tokenised now.

    ``remainder``: "drop" or "keep" the last, partial sequence (padded with IGNORED). ``intra_document_masking``: rows also hold `seq_lengths`.
    ``progress`` receives the tokens so far.
    Raises InputError if the text cannot be read, is empty or fills no sequence, OutputError if the cache cannot be written.
    """
    from datasets import Dataset

    parts = {
        "version": VERSION,
        "source": source.identity,
        "encoding": encoder.fingerprint,
        "seq_length": seq_length,
        "remainder": remainder,
        **({"intra_document_masking": True} if intra_document_masking else {}),
    }
    folder = root / "packed" / cache.key(parts)

    def make(partial: Path) -> None:
        notify(f"Tokenising {source.label}.")
        stats = _write(
            partial / "blocks.arrow", source, encoder, seq_length, remainder, intra_document_masking, num_proc, vocab_size, progress
        )
        (partial / "facts.json").write_text(to_json({**asdict(stats), "made_of": parts}), encoding="utf-8")

    cache.get_or_create(folder, make)
    record = read_json(folder / "facts.json")
    stats = PackingStats(record["documents"], record["tokens"], record["highest"])
    check_token_ids(stats.highest, vocab_size, source.label)
    data = Dataset.from_file(str(folder / "blocks.arrow"))
    if not len(data):
        raise InputError(
            f"{source.label} has {stats.tokens:,} tokens, fewer than one sequence of {seq_length}.",
            hint="Use more text, a smaller seq_length, or remainder: keep.",
        )
    return data, stats


def _write(
    path: Path,
    source: TextSource,
    encoder: DocumentEncoder,
    length: int,
    remainder: str,
    with_lengths: bool,
    num_proc: int | None,
    vocab_size: int | None,
    progress: Callable[[int], None],
) -> PackingStats:
    import numpy as np
    import pyarrow as pa

    row_type = pa.list_(pa.int32(), length)
    schema = pa.schema({"input_ids": row_type, **({LENGTHS: pa.list_(pa.int32())} if with_lengths else {})})
    carry = np.empty(0, np.int32)
    carried: list[int] = []  # lengths of the documents in `carry`
    documents = tokens = highest = 0
    with ExitStack() as stack:
        writer = stack.enter_context(pa.ipc.new_stream(str(path), schema))

        def write(blocks: NDArray[np.int32], lengths: list[list[int]]) -> None:
            if len(blocks):
                columns = [pa.FixedSizeListArray.from_arrays(pa.array(blocks.reshape(-1)), type=row_type)]
                columns += [pa.array(lengths, pa.list_(pa.int32()))] if with_lengths else []
                writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))

        stack.enter_context(explain_read_errors(source.label))
        texts = batches(source.documents(streaming=False))
        for encoded in _encode(texts, encoder, num_proc, stack):
            blocks, rest = split_sequences(carry, encoded, length)
            ids = np.concatenate([blocks.reshape(-1), rest])
            documents += len(encoded)
            tokens += len(ids) - len(carry)
            highest = max(highest, int(ids.max(initial=0)))
            check_token_ids(highest, vocab_size, source.label)
            lengths, carried = split_lengths(carried, map(len, encoded), length)
            write(blocks, lengths)
            carry = rest.copy()
            progress(tokens)
        if not documents:
            raise no_text_error(source.label)
        if len(carry) and remainder == "keep":
            padding = length - len(carry)
            write(np.concatenate([carry, np.full(padding, IGNORED, np.int32)])[None], [[*carried, padding]])
    return PackingStats(documents, tokens, highest)


def _encode(texts: Iterator[list[Document]], encoder: DocumentEncoder, num_proc: int | None, stack: ExitStack) -> Iterator[list[list[int]]]:
    """The ids of each batch in order, from `num_proc` processes."""
    if num_proc is None or num_proc == 1:
        yield from map(encoder, texts)
        return
    import multiprocessing

    # Not forked: a fast tokenizer's locks would be inherited without its threads.
    pool = stack.enter_context(ProcessPoolExecutor(num_proc, mp_context=multiprocessing.get_context("spawn")))
    waiting = [pool.submit(encoder, batch) for batch in islice(texts, 2 * num_proc)]
    while waiting:
        yield waiting.pop(0).result()
        waiting += [pool.submit(encoder, batch) for batch in islice(texts, 1)]
