"""Runs shared work (sampling, tokenising, teacher logits) in one process of each machine first, while the others wait for a file lock.

Like accelerate's `local_main_process_first`, in which the other processes wait in a barrier; a barrier times out after `ddp_timeout` (30 minutes by
default), and sampling 50M tokens takes longer. A process that waits for a file lock is in no collective.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hf_grow.errors import ExecutionError

if TYPE_CHECKING:
    from transformers import TrainingArguments


@contextmanager
def local_main_process_first(arguments: TrainingArguments, what: str) -> Iterator[None]:
    """Runs the body in the first process of each machine, then in all others of the machine at once. ``what`` names the work in messages.

    Raises ExecutionError in the others if the first one failed or died.
    """
    if arguments.world_size == 1:
        yield
        return
    from accelerate.utils import broadcast_object_list, wait_for_everyone
    from filelock import FileLock

    names = [str(Path(tempfile.gettempdir()) / f"hf-grow-{uuid.uuid4().hex}")]
    folder, first = Path(broadcast_object_list(names)[0]), arguments.local_process_index == 0
    lock, done = FileLock(folder / "lock"), folder / "done"
    if first:
        folder.mkdir(exist_ok=True)
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        lock.acquire()
    wait_for_everyone()  # the lock is held before any other process asks for it
    if first:
        try:
            yield
            done.touch()
        finally:
            lock.release()
        return
    with lock:  # the operating system releases the lock of a process that dies
        pass
    if not done.exists():
        raise ExecutionError(f"The first process of this machine failed at {what}.", hint="See the error message of that process.")
    yield
