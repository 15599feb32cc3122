"""Documents to sequences of equal length: tokenised, each ended by EOS, put one after another, and cut every `seq_length` tokens.

A sampled text that was cut has no end, and gets none; a conversation has the tokens that its template wrote, and gets no others.
Nothing depends on how the work is divided: the sequences are those of one long list of token ids, cut into pieces. Documents in one sequence
see each other, as in the pretraining of GPT-3 (2005.14165, section B) and of most models since.
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
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from hf_grow.common.safe_files import read_json, to_json
from hf_grow.errors import InputError
from hf_grow.training.data import cache
from hf_grow.training.data.sources import Notify, Source, readable

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

VERSION = 1
"""Part of every key: a change of what is written here makes old caches strangers."""
IGNORED = -100
"""Stands after the last token where a sequence is not full; the collator makes of it what the loss leaves out."""
BATCH = 256
"""Documents tokenised at once."""


class Document(NamedTuple):
    """A text, and what is put around it."""

    text: str
    frame: str = "document"
    """document: as the tokenizer begins texts (or bos says), and EOS; cut: without EOS; verbatim: nothing."""


@dataclass(frozen=True)
class Encoding:
    """How a text becomes token ids. Can be sent to another process."""

    tokenizer: PreTrainedTokenizerBase
    bos: Literal["tokenizer", "always", "never"]

    def __post_init__(self) -> None:
        if self.tokenizer.eos_token_id is None:
            raise InputError(
                "The tokenizer has no EOS token, which separates documents.", hint="Name one as eos_token in its tokenizer_config.json."
            )
        if self.bos == "always" and self.tokenizer.bos_token_id is None:
            raise InputError("The tokenizer has no BOS token, but bos is `always`.", hint="Use bos: tokenizer.")

    def __call__(self, documents: Sequence[Document | str]) -> list[list[int]]:
        """One list of ids a document; a bare string is a whole one."""
        each = [Document(d) if isinstance(d, str) else d for d in documents]
        first, last = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        own = self.bos == "tokenizer"
        head = [first] if self.bos == "always" else []
        framed = iter(self._ids([d.text for d in each if d.frame != "verbatim"], own))
        verbatim = iter(self._ids([d.text for d in each if d.frame == "verbatim"], False))
        found = []
        for document in each:
            if document.frame == "verbatim":
                found.append(next(verbatim))
                continue
            ids = next(framed)
            if own and ids and ids[-1] == last:  # a tokenizer that ends texts by itself is not made to end them twice
                ids = ids[:-1]
            found.append([*head, *ids] if document.frame == "cut" else [*head, *ids, last])
        return found

    def _ids(self, texts: list[str], special: bool) -> list[list[int]]:
        if not texts:
            return []
        found: list[list[int]] = self.tokenizer(
            texts, add_special_tokens=special, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )["input_ids"]
        return found

    @property
    def fingerprint(self) -> str:
        """Two encodings with the same one give the same ids."""
        t = self.tokenizer
        backend: Any = getattr(t, "backend_tokenizer", None)
        inside = backend.to_str() if hasattr(backend, "to_str") else json.dumps([type(t).__name__, sorted(t.get_vocab().items())])
        # One that hides its model (sentencepiece) is told by what it makes of a text, beside its vocabulary.
        probe = self(["The quick  brown\tfox: 1234567890 + naïve 漢字 <s></s>\n\n    def f(x):\n"])
        parts = [inside, probe, t.bos_token_id, t.eos_token_id, self.bos]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Facts:
    """What was found while packing."""

    documents: int
    tokens: int
    """With EOS and BOS, and with those that were dropped at the end."""
    highest: int
    """The highest token id."""


def check_ids(highest: int, vocab_size: int | None, label: str) -> None:
    """Raises InputError where a token has no row in the model's embedding."""
    if vocab_size is not None and highest >= vocab_size:
        raise InputError(
            f"The model and the tokenizer do not match: {label} has token id {highest}, and the model's vocabulary ends at {vocab_size - 1}.",
            hint="Give the tokenizer that belongs to the model, or enlarge its embeddings (resize_token_embeddings) first.",
        )


def no_text(label: str) -> InputError:
    return InputError(f"{label} is empty: it holds no text.")


def cut(carry: NDArray[np.int32], documents: Iterable[Sequence[int]], length: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """`carry` and then the documents, as full sequences [n, length], and the tokens [< length] that are left."""
    import numpy as np

    parts = [carry, *(np.asarray(d, dtype=np.int32) for d in documents)]
    stream = np.concatenate(parts)
    full = len(stream) // length * length
    return stream[:full].reshape(-1, length), stream[full:]


def batches(rows: Iterable[dict[str, str]], size: int | None = None) -> Iterator[list[Document]]:
    """Documents, `size` (BATCH) at a time."""
    iterator = iter(rows)
    while batch := [Document(row["text"], row.get("frame") or "document") for row in islice(iterator, size or BATCH)]:
        yield batch


def packed(
    source: Source,
    encoding: Encoding,
    *,
    seq_length: int,
    remainder: str,
    root: Path,
    num_proc: int | None = None,
    vocab_size: int | None = None,
    notify: Notify = lambda message: None,
    progress: Callable[[int], None] = lambda tokens: None,
) -> tuple[Dataset, Facts]:
    """{"input_ids": int32 [seq_length]} for all of a source, tokenised now or found in the cache under `root`.

    Raises InputError for text that cannot be read or holds none, OutputError where the cache cannot be written.
    """
    from datasets import Dataset

    parts = {
        "version": VERSION,
        "source": source.identity,
        "encoding": encoding.fingerprint,
        "seq_length": seq_length,
        "remainder": remainder,
    }
    folder = root / "packed" / cache.key(parts)

    def make(partial: Path) -> None:
        notify(f"Tokenising {source.label}.")
        facts = _write(partial / "blocks.arrow", source, encoding, seq_length, remainder, num_proc, vocab_size, progress)
        (partial / "facts.json").write_text(to_json({**asdict(facts), "made_of": parts}), encoding="utf-8")

    cache.fetch(folder, make)
    record = read_json(folder / "facts.json")
    facts = Facts(record["documents"], record["tokens"], record["highest"])
    check_ids(facts.highest, vocab_size, source.label)
    data = Dataset.from_file(str(folder / "blocks.arrow"))
    if not len(data):
        raise InputError(
            f"{source.label} holds {facts.tokens:,} tokens, which fill no sequence of {seq_length}.",
            hint="Use more text, a smaller seq_length, or remainder: keep.",
        )
    return data, facts


def _write(
    path: Path,
    source: Source,
    encoding: Encoding,
    length: int,
    remainder: str,
    num_proc: int | None,
    vocab_size: int | None,
    progress: Callable[[int], None],
) -> Facts:
    import numpy as np
    import pyarrow as pa

    kind = pa.list_(pa.int32(), length)
    schema = pa.schema({"input_ids": kind})
    carry = np.empty(0, np.int32)
    documents = tokens = highest = 0
    with ExitStack() as stack:
        writer = stack.enter_context(pa.ipc.new_stream(str(path), schema))

        def write(blocks: NDArray[np.int32]) -> None:
            if len(blocks):
                column = pa.FixedSizeListArray.from_arrays(pa.array(blocks.reshape(-1)), type=kind)
                writer.write_batch(pa.RecordBatch.from_arrays([column], schema=schema))

        stack.enter_context(readable(source.label))
        texts = batches(source.documents(streaming=False))
        for found in _encoded(texts, encoding, num_proc, stack):
            blocks, rest = cut(carry, found, length)
            seen = np.concatenate([blocks.reshape(-1), rest])
            documents += len(found)
            tokens += len(seen) - len(carry)
            highest = max(highest, int(seen.max(initial=0)))
            check_ids(highest, vocab_size, source.label)
            write(blocks)
            carry = rest.copy()
            progress(tokens)
        if not documents:
            raise no_text(source.label)
        if len(carry) and remainder == "keep":
            write(np.concatenate([carry, np.full(length - len(carry), IGNORED, np.int32)])[None])
    return Facts(documents, tokens, highest)


def _encoded(texts: Iterator[list[Document]], encoding: Encoding, num_proc: int | None, stack: ExitStack) -> Iterator[list[list[int]]]:
    """The batches in their order, tokenised by one process or several."""
    if num_proc is None or num_proc == 1:
        yield from map(encoding, texts)
        return
    import multiprocessing

    # Not forked: a fast tokenizer's threads would not come along, and its locks would.
    pool = stack.enter_context(ProcessPoolExecutor(num_proc, mp_context=multiprocessing.get_context("spawn")))
    waiting = [pool.submit(encoding, batch) for batch in islice(texts, 2 * num_proc)]
    while waiting:
        yield waiting.pop(0).result()
        waiting += [pool.submit(encoding, batch) for batch in islice(texts, 1)]
