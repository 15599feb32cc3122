"""Streamed text: tokenised, packed and mixed while training reads it, and resumable at any sequence.

The sequences of a source are those that packing.py would make, in its order; a source that ends begins again. `state_dict` holds where in
the text the reading stands, so that resuming reads on there and tokenises nothing twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import numpy as np
import torch
from datasets import IterableDataset as Documents

from hf_grow.errors import InputError
from hf_grow.training.data.mixing import Pattern
from hf_grow.training.data.packing import Encoding, batches, check_ids, cut, no_text
from hf_grow.training.data.sources import Notify, readable

BATCH = 32
"""Documents tokenised at once; smaller than where all are, because resuming does this many again."""
_TURNS = 1024


class PackedStream:
    """The sequences of one source, without end. Not for two iterations at once."""

    def __init__(
        self, documents: Documents, encoding: Encoding, *, seq_length: int, vocab_size: int | None, label: str, notify: Notify
    ) -> None:
        self.documents = documents
        self.encoding = encoding
        self.seq_length = seq_length
        self.vocab_size = vocab_size
        self.label = label
        self.notify = notify
        self._start = self._state = {"documents": documents.state_dict(), "carry": [], "done": 0, "passes": 0}

    def state_dict(self) -> dict[str, Any]:
        """Where the next sequence begins: the documents before its batch, the tokens left over from them, its number in the batch."""
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state = dict(state)

    def rewind(self) -> None:
        self._state = self._start

    def __iter__(self) -> Iterator[np.ndarray[Any, np.dtype[np.int32]]]:
        state = self._state
        for passes in count(state["passes"]):
            self.documents.load_state_dict(state["documents"])
            carry = np.asarray(state["carry"], np.int32)
            done, before = state["done"], state["documents"]
            empty = before == self._start["documents"]
            with readable(self.label):
                for texts in batches(self.documents, BATCH):
                    empty = False
                    blocks, rest = cut(carry, self.encoding(texts), self.seq_length)
                    check_ids(int(max(blocks.max(initial=0), rest.max(initial=0))), self.vocab_size, self.label)
                    for number in range(done, len(blocks)):
                        self._state = {"documents": before, "carry": carry.tolist(), "done": number + 1, "passes": passes}
                        yield blocks[number]
                    before, carry, done = self.documents.state_dict(), rest, 0
            if empty:
                raise no_text(self.label)
            self.notify(f"{self.label} was read to its end, and is read again.")
            # What is left over goes on into the next pass: nothing is dropped.
            state = {**self._start, "carry": carry.tolist(), "passes": passes + 1}


class MixedStream(torch.utils.data.IterableDataset[dict[str, Any]]):
    """{"input_ids": [seq_length]} from several streams, in the turns of a Pattern, without end.

    At most one DataLoader worker reads it: several would divide the text among them, and no order would be left.
    """

    def __init__(self, streams: Sequence[PackedStream], pattern: Pattern, identity: str = "") -> None:
        self.streams = list(streams)
        self.pattern = pattern
        self.identity = identity
        """A state fits a stream of the same identity."""
        self.tells = False
        """Whether each row also holds the `state` after it."""
        self._place = self._skip = 0
        self._resumed = False

    def state_dict(self) -> dict[str, Any]:
        return {"place": self._place, "streams": [s.state_dict() for s in self.streams]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next iteration goes on after the sequence that was last given when `state` was taken."""
        self._place = state["place"]
        for stream, own in zip(self.streams, state["streams"], strict=True):
            stream.load_state_dict(own)
        self._resumed, self._skip = True, 0

    def skip(self, rows: int) -> None:
        """The next iteration begins after so many sequences, which it reads."""
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
        open_streams = [iter(s) for s in self.streams]
        for start in count(self._place, _TURNS):
            turns, _ = self.pattern.turns(start, start + _TURNS)
            for place, turn in enumerate(turns.tolist(), start):
                block = next(open_streams[turn])
                self._place = place + 1
                if place < skip:
                    continue
                row = {"input_ids": block.tolist()}
                yield row | {"state": self.state_dict()} if self.tells else row
