"""One process of each machine goes ahead with what is made once (sampled text, tokenised text, teachers' logits); the others wait for a file lock.

Not inside a barrier, as TrainingArguments.main_process_first has it: a barrier gives up after ddp_timeout (half an hour), and sampling 50M tokens
takes longer. While the first process works, no process is in a collective.
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
def one_ahead(arguments: TrainingArguments, what: str) -> Iterator[None]:
    """The body runs in the first process of each machine, then, when that is through, in all others at once.

    Raises ExecutionError in the others where the first one failed, or died.
    """
    if arguments.world_size == 1:
        yield
        return
    from accelerate.utils import broadcast_object_list
    from filelock import FileLock

    named = [str(Path(tempfile.gettempdir()) / f"hf-grow-{uuid.uuid4().hex}")]
    folder, first = Path(broadcast_object_list(named)[0]), arguments.local_process_index == 0
    lock, through = FileLock(folder / "lock"), folder / "through"
    if first:
        folder.mkdir(exist_ok=True)
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        lock.acquire()
    _all_here()  # the lock is held before anybody asks for it
    if first:
        try:
            yield
            through.touch()
        finally:
            lock.release()
        return
    with lock:  # the system gives it up for a process that dies
        pass
    if not through.exists():
        raise ExecutionError(f"The first process of this machine failed at {what}.", hint="Its own message says why.")
    yield


def _all_here() -> None:
    from accelerate.utils import wait_for_everyone

    wait_for_everyone()
