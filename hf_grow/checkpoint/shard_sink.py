"""Where finished shards go, and how many of them lie on the disk meanwhile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hf_grow.checkpoint.partial_folder import PartialFolder
from hf_grow.checkpoint.writer import Shard


class ShardSink:
    """Where finished shards go. This one leaves them in the folder; `publish.stream` sends them away one by one."""

    window: int | None = None
    """Shards that lie in the folder at a time; None for all."""

    def already_sent(self, folder: PartialFolder) -> Mapping[str, str]:
        """Shards that an earlier run has sent away already -> SHA-256."""
        return {}

    def accept(self, folder: PartialFolder, shard: Shard, sha256: str) -> None:
        """A shard is written, checked and synced. Called in order, in the thread that Ctrl-C interrupts."""

    def finish(self, folder: PartialFolder, files: set[str]) -> None:
        folder.finish(files)


def peak_shard_bytes(shards: Sequence[Shard], window: int | None) -> int:
    """The most that shards take on the disk at a time."""
    sizes = [s.size for s in shards]
    return sum(sizes) if window is None else max(sum(sizes[i : i + window]) for i in range(len(sizes)))
