"""Data position of a training: saved in every checkpoint, restored by a resumed run, advanced past skipped batches by a rollback.

Rows are trained on in their order, so a place is a number of rows. Trainer finds it by counting steps; a row more is passed over by turning the
order of the rows (`_shift`). A stream says itself where it stands: its state travels beside the rows, out of the loader's worker and past all that is
fetched ahead, and the one behind the last row that was trained on is kept. Only the process that reads (of those of accelerate's dispatcher the
first) has it.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, Subset
from transformers import Trainer

from hf_grow.common.safe_files import read_bytes, read_json
from hf_grow.errors import SourceError
from hf_grow.training.growth_state.state_files import DATA_STATE
from hf_grow.training.trainer.checkpointing import write_json
from hf_grow.training.trainer.state import GrowthSettings

_STATE = "stream_state"


class StateCollator:
    """A collator that adds the stream state after the last row of the batch."""

    def __init__(self, collate: Any) -> None:
        self.collate = collate

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {**self.collate(rows), _STATE: json.dumps(rows[-1]["state"])}


class StateDataLoader(DataLoader[Any]):
    """A loader that removes the stream state from each batch before it is moved to a device."""

    note: Callable[[str], None]

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            self.note(batch.pop(_STATE))
            yield batch


class DataPositionTrainer(Trainer):  # type: ignore[misc]
    """Trainer that resumes its data at the position of a checkpoint, without reading skipped batches."""

    growth: GrowthSettings
    train_dataset: Any
    data_collator: Any

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._shift = 0
        self._noted: deque[tuple[int, str]] = deque()
        self._fetched = self._used = 0  # batches of the loader below accelerate's: that came out of it, that were trained on
        self._each = 1  # such batches in one micro-batch of all processes
        self._from_last = False  # whether every process reads for itself, so that the last one is furthest
        self._random_from: str | None = None
        if self.stream is not None:
            self.args.ignore_data_skip = True  # it goes on by itself

    @property
    def stream(self) -> Any:
        """The training dataset, if it is a stream with a state; else None."""
        own = self.train_dataset
        return own if isinstance(own, IterableDataset) and hasattr(own, "load_state_dict") else None

    # ---- data loader -------------------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        if self.stream is None:
            whole = self.train_dataset
            if self._shift:
                order = [(i + self._shift) % len(whole) for i in range(len(whole))]
                self.train_dataset = whole.select(order) if hasattr(whole, "select") else Subset(whole, order)
            try:
                return super().get_train_dataloader()
            finally:
                self.train_dataset = whole
        from accelerate.data_loader import DataLoaderDispatcher

        collate, self.stream.include_state = self.data_collator, True
        self.data_collator = StateCollator(collate)
        try:
            loader = super().get_train_dataloader()
        finally:
            self.data_collator = collate
        dispatched = isinstance(loader, DataLoaderDispatcher)
        self._each = self.accelerator.num_processes if dispatched and not loader.split_batches else 1
        self._from_last = self.accelerator.num_processes > 1 and not dispatched
        loader.base_dataloader.__class__ = StateDataLoader
        loader.base_dataloader.note = self._note
        return loader

    def _note(self, state: str) -> None:
        self._fetched += 1
        self._noted.append((self._fetched, state))

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        if self.stream is None:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.state.global_step >= self.state.max_steps:
            return [], None  # a finished run that is resumed: a stream has no end of its own
        found = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._used += len(found[0]) * self._each
        while self._noted and self._noted[0][0] < self._used:
            self._noted.popleft()
        if self._random_from is not None:  # as Trainer does after passing over batches: making a loader has drawn a number
            super()._load_rng_state(self._random_from)
            self._random_from = None
        return found

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        self._random_from = checkpoint

    # ---- position --------------------------------------------------------------------------------------------------------------------

    def set_data_position(self, checkpoint: Path | None) -> None:
        """Sets the position before a training starts or resumes. Raises SourceError for a position file that cannot be read."""
        self._shift = self._fetched = self._used = 0
        self._noted.clear()
        if checkpoint is None:
            return
        step = json.loads(read_bytes(checkpoint / "trainer_state.json"))["global_step"]
        held = read_json(checkpoint / DATA_STATE) if (checkpoint / DATA_STATE).is_file() else {}
        rows = held.get("rows", self._rows(step))
        stream = self.stream
        try:
            if stream is None:
                self._shift = rows - self._rows(step)
            elif held.get("identity") == stream.identity:
                stream.load_state_dict(held["stream"])
            else:
                self.growth.events.notify(f"{checkpoint} does not say where this text was left; {rows} sequences are read and passed over.")
                stream.skip(rows)
        except (KeyError, TypeError, ValueError, IndexError):
            raise SourceError(
                f"{checkpoint / DATA_STATE} is damaged.", hint="Remove it: the text is then passed over by the number of steps."
            ) from None

    def save_data_position(self, checkpoint: Path) -> None:
        """The position after the last trained batch; called by all processes."""
        place: dict[str, Any] = {"rows": self._shift + self._rows(int(self.state.global_step))}
        if self.stream is not None:
            state = next((s for n, s in self._noted if n == self._used), None)
            if self._from_last:
                from accelerate.utils import broadcast_object_list

                state = broadcast_object_list([state], from_process=self.accelerator.num_processes - 1)[0]
            if state is not None:
                found = json.loads(state)
                place = {"rows": found["place"], "identity": self.stream.identity, "stream": found}
        if self.args.should_save:
            write_json(checkpoint / DATA_STATE, place)

    def _rows(self, step: int) -> int:
        """Rows of complete epochs and of the current one, after a number of steps without a rollback."""
        batch = int(self.args.train_batch_size) * (1 if self._split else int(self.args.world_size))
        pieces = int(self.args.gradient_accumulation_steps)
        if not hasattr(self.train_dataset, "__len__"):
            return step * batch * pieces
        rows = len(self.train_dataset)
        batches = rows // batch if self.args.dataloader_drop_last else -(-rows // batch)
        steps = max(1, -(-batches // pieces))
        return step // steps * rows + min(step % steps * batch * pieces, rows)

    @property
    def _split(self) -> bool:
        return bool(getattr(self.accelerator.dataloader_config, "split_batches", False))
