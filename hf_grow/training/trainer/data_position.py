"""Data position of a training: saved in every checkpoint, restored by a resumed run, advanced past skipped batches by a rollback.

Rows are trained on in order, so a position is a number of rows. Trainer computes it from the number of steps; further rows are skipped by rotating
the order of the rows (`_row_offset`). A stream has a state, which is passed along with its rows through the loader's worker and its prefetching; the
state after the last trained row is saved. Only the process that reads the stream has it (the first one, under accelerate's dispatcher).
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

    record_state: Callable[[str], None]

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            self.record_state(batch.pop(_STATE))
            yield batch


class DataPositionTrainer(Trainer):  # type: ignore[misc]
    """Trainer that resumes its data at the position of a checkpoint, without reading skipped batches."""

    growth: GrowthSettings
    train_dataset: Any
    data_collator: Any

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._row_offset = 0
        self._states: deque[tuple[int, str]] = deque()
        self._batches_fetched = self._batches_trained = 0  # batches of the DataLoader that accelerate wraps
        self._batches_per_micro_batch = 1  # such batches in a micro-batch of all processes together
        self._last_process_is_furthest = False  # whether every process reads the stream, so that the last one has read furthest
        self._rng_checkpoint: str | None = None
        if self.stream is not None:
            self.args.ignore_data_skip = True  # the stream resumes by its own state

    @property
    def stream(self) -> Any:
        """The training dataset, if it is a stream with a state; else None."""
        dataset = self.train_dataset
        return dataset if isinstance(dataset, IterableDataset) and hasattr(dataset, "load_state_dict") else None

    # ---- data loader -------------------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        if self.stream is None:
            dataset = self.train_dataset
            if self._row_offset:
                order = [(i + self._row_offset) % len(dataset) for i in range(len(dataset))]
                self.train_dataset = dataset.select(order) if hasattr(dataset, "select") else Subset(dataset, order)
            try:
                return super().get_train_dataloader()
            finally:
                self.train_dataset = dataset
        from accelerate.data_loader import DataLoaderDispatcher

        collate, self.stream.include_state = self.data_collator, True
        self.data_collator = StateCollator(collate)
        try:
            loader = super().get_train_dataloader()
        finally:
            self.data_collator = collate
        dispatched = isinstance(loader, DataLoaderDispatcher)
        self._batches_per_micro_batch = self.accelerator.num_processes if dispatched and not loader.split_batches else 1
        self._last_process_is_furthest = self.accelerator.num_processes > 1 and not dispatched
        loader.base_dataloader.__class__ = StateDataLoader
        loader.base_dataloader.record_state = self._record_state
        return loader

    def _record_state(self, state: str) -> None:
        self._batches_fetched += 1
        self._states.append((self._batches_fetched, state))

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        if self.stream is None:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.state.global_step >= self.state.max_steps:
            return [], None  # a finished run that is resumed: a stream is infinite
        batches = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._batches_trained += len(batches[0]) * self._batches_per_micro_batch
        while self._states and self._states[0][0] < self._batches_trained:
            self._states.popleft()
        if self._rng_checkpoint is not None:  # as Trainer does after skipping batches: creating a loader draws a random number
            super()._load_rng_state(self._rng_checkpoint)
            self._rng_checkpoint = None
        return batches

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        self._rng_checkpoint = checkpoint

    # ---- position --------------------------------------------------------------------------------------------------------------------

    def set_data_position(self, checkpoint: Path | None) -> None:
        """Sets the position before a training starts or resumes. Raises SourceError for a position file that cannot be read."""
        self._row_offset = self._batches_fetched = self._batches_trained = 0
        self._states.clear()
        if checkpoint is None:
            return
        step = json.loads(read_bytes(checkpoint / "trainer_state.json"))["global_step"]
        saved = read_json(checkpoint / DATA_STATE) if (checkpoint / DATA_STATE).is_file() else {}
        rows = saved.get("rows", self._rows(step))
        stream = self.stream
        try:
            if stream is None:
                self._row_offset = rows - self._rows(step)
            elif saved.get("identity") == stream.identity:
                stream.load_state_dict(saved["stream"])
            else:
                self.growth.events.notify(f"{checkpoint} has no position in this text; skipping the first {rows} sequences.")
                stream.skip(rows)
        except (KeyError, TypeError, ValueError, IndexError):
            raise SourceError(
                f"{checkpoint / DATA_STATE} is damaged.", hint="Remove it: the position is then computed from the number of steps."
            ) from None

    def save_data_position(self, checkpoint: Path) -> None:
        """The position after the last trained batch; called by all processes."""
        position: dict[str, Any] = {"rows": self._row_offset + self._rows(int(self.state.global_step))}
        if self.stream is not None:
            state = next((s for n, s in self._states if n == self._batches_trained), None)
            if self._last_process_is_furthest:
                from accelerate.utils import broadcast_object_list

                state = broadcast_object_list([state], from_process=self.accelerator.num_processes - 1)[0]
            if state is not None:
                stream_state = json.loads(state)
                position = {"rows": stream_state["place"], "identity": self.stream.identity, "stream": stream_state}
        if self.args.should_save:
            write_json(checkpoint / DATA_STATE, position)

    def _rows(self, step: int) -> int:
        """Rows of complete epochs and of the current one, after a number of steps without a rollback."""
        batch = int(self.args.train_batch_size) * (1 if self._split_batches else int(self.args.world_size) // int(self.get_cp_size()))
        accumulation_steps = int(self.args.gradient_accumulation_steps)
        if not hasattr(self.train_dataset, "__len__"):
            return step * batch * accumulation_steps
        rows = len(self.train_dataset)
        batches = rows // batch if self.args.dataloader_drop_last else -(-rows // batch)
        steps = max(1, -(-batches // accumulation_steps))
        return step // steps * rows + min(step % steps * batch * accumulation_steps, rows)

    @property
    def _split_batches(self) -> bool:
        return bool(getattr(self.accelerator.dataloader_config, "split_batches", False))
