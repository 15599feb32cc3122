"""Streamed text: tokenised, packed, shuffled and mixed while training reads it, and resumable at any sequence.

The sequences of a source are those that packing.py makes, in the same order; an exhausted source is read again. They are shuffled in windows, not
through a reservoir (as `IterableDataset.shuffle` of datasets does): after an interruption a window can be read again, the content of a reservoir cannot.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import Any

import numpy as np
import torch

from hf_grow.errors import InputError
from hf_grow.training.data.document_masking import LENGTHS, split_lengths
from hf_grow.training.data.mixing import Interleaving
from hf_grow.training.data.packing import DocumentEncoder, batches, check_token_ids, no_text_error, split_sequences
from hf_grow.training.data.sources import Notify, TextSource, explain_read_errors

BATCH = 32
"""Documents tokenised at once; fewer than in packing.py, because a resumed run tokenises this many again."""
_PLACES = 1024
"""Places of the interleaving computed at once."""


class PackedStream:
    """The sequences of one source, repeated forever. Must not be iterated twice at the same time.

    The state holds the position of the documents before the current batch, the tokens left over from them, and the number of the next
    sequence in the batch, so that a resumed run tokenises no document again that was trained on in full, except those of that batch.

    Rows are {"input_ids": int32 [seq_length]}; with ``intra_document_masking`` they also hold the lengths of their documents.
    """

    def __init__(
        self,
        source: TextSource,
        encoder: DocumentEncoder,
        *,
        seq_length: int,
        vocab_size: int | None,
        notify: Notify,
        intra_document_masking: bool = False,
    ) -> None:
        self.documents = source.documents()
        self.label = source.label
        self.encoder = encoder
        self.seq_length = seq_length
        self.vocab_size = vocab_size
        self.notify = notify
        self.intra_document_masking = intra_document_masking
        self._start = self._state = {"documents": self.documents.state_dict(), **self._carried([], []), "done": 0, "passes": 0}

    def state_dict(self) -> dict[str, Any]:
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state = dict(state)

    def rewind(self) -> None:
        self._state = self._start

    def _carried(self, carry: list[int], lengths: list[int]) -> dict[str, list[int]]:
        return {"carry": carry, **({LENGTHS: lengths} if self.intra_document_masking else {})}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        state = self._state
        for passes in count(state["passes"]):
            self.documents.load_state_dict(state["documents"])
            carry, carried = np.asarray(state["carry"], np.int32), state.get(LENGTHS, [])
            done, before = state["done"], state["documents"]
            empty = before == self._start["documents"]
            with explain_read_errors(self.label):
                for texts in batches(self.documents, BATCH):
                    empty = False
                    encoded = self.encoder(texts)
                    blocks, rest = split_sequences(carry, encoded, self.seq_length)
                    lengths, left = split_lengths(carried, map(len, encoded), self.seq_length)
                    check_token_ids(int(max(blocks.max(initial=0), rest.max(initial=0))), self.vocab_size, self.label)
                    for number in range(done, len(blocks)):
                        self._state = {"documents": before, **self._carried(carry.tolist(), carried), "done": number + 1, "passes": passes}
                        row = {"input_ids": blocks[number]}
                        yield row | {LENGTHS: lengths[number]} if self.intra_document_masking else row
                    before, carry, carried, done = self.documents.state_dict(), rest, left, 0
            if empty:
                raise no_text_error(self.label)
            self.notify(f"{self.label} is exhausted; it is read again from the start.")
            # The remaining tokens are carried into the next pass: none are dropped.
            state = {**self._start, **self._carried(carry.tolist(), carried), "passes": passes + 1}


class ShuffledStream:
    """The sequences of a PackedStream, in random order within windows of `size`; none leaves its window.

    The state holds that of the stream before the current window: a resumed run reads the window again. The order of a window depends on `key` and its
    number only.
    """

    def __init__(self, stream: PackedStream, size: int, key: Sequence[int]) -> None:
        self.stream = stream
        self.size = size
        self.key = list(key)
        self._start: dict[str, Any] = {"window": 0, "taken": 0, "stream": stream.state_dict()}
        self._state = self._start

    def state_dict(self) -> dict[str, Any]:
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state = {k: state[k] for k in self._start}

    def rewind(self) -> None:
        self._state = self._start

    def __iter__(self) -> Iterator[dict[str, Any]]:
        before, done = self._state["stream"], self._state["taken"]
        self.stream.load_state_dict(before)
        rows = iter(self.stream)
        for window in count(self._state["window"]):
            buffer = list(islice(rows, self.size))
            order = np.random.default_rng([*self.key, window]).permutation(self.size)
            for taken in range(done, self.size):
                self._state = {"window": window, "taken": taken + 1, "stream": before}
                if taken + 1 == self.size:
                    before, done = self.stream.state_dict(), 0
                    self._state = {"window": window + 1, "taken": 0, "stream": before}
                yield buffer[order[taken]]


class MixedStream(torch.utils.data.IterableDataset[dict[str, Any]]):
    """Infinite rows from several streams, in the order of an Interleaving.

    At most one DataLoader worker may read it: several would split the text among them, and lose its order.
    """

    def __init__(self, streams: Sequence[PackedStream | ShuffledStream], interleaving: Interleaving, identity: str = "") -> None:
        self.streams = list(streams)
        self.interleaving = interleaving
        self.identity = identity
        """A state may be loaded into a stream of the same identity only."""
        self.include_state = False
        """Whether each row also holds the `state` after it."""
        self._place = self._skip = 0
        self._resumed = False

    def state_dict(self) -> dict[str, Any]:
        return {"place": self._place, "streams": [s.state_dict() for s in self.streams]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next iteration continues after the last sequence that was yielded when `state` was taken."""
        self._place = state["place"]
        for stream, own in zip(self.streams, state["streams"], strict=True):
            stream.load_state_dict(own)
        self._resumed, self._skip = True, 0

    def skip(self, rows: int) -> None:
        """The next iteration reads and discards this many sequences first."""
        self._resumed, self._skip = False, rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if not self._resumed:
            self._place = 0
            for stream in self.streams:
                stream.rewind()
        self._resumed, skip = False, self._skip
        worker = torch.utils.data.get_worker_info()
        if worker and worker.num_workers > 1:
            raise InputError(
                f"Streamed text cannot be read by {worker.num_workers} DataLoader workers.", hint="Use dataloader_num_workers: 1."
            )
        iterators = [iter(s) for s in self.streams]
        for start in count(self._place, _PLACES):
            assigned, _ = self.interleaving.assign(start, start + _PLACES)
            for place, source in enumerate(assigned.tolist(), start):
                row = next(iterators[source])
                row = {**row, "input_ids": row["input_ids"].tolist()}
                self._place = place + 1
                if place < skip:
                    continue
                yield row | {"state": self.state_dict()} if self.include_state else row
