"""Receives finished shards: kept in the output folder, or uploaded one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hf_grow.checkpoint.partial_folder import PartialFolder
from hf_grow.checkpoint.writer import Shard


class ShardSink:
    """Keeps finished shards in the output folder. Subclasses send them elsewhere (`publish.stream`)."""

    window: int | None = None
    """The most shards in the folder at a time; None for all."""

    def already_sent(self, folder: PartialFolder) -> Mapping[str, str]:
        """Shards that an interrupted run already sent, with their SHA-256."""
        return {}

    def accept(self, folder: PartialFolder, shard: Shard, sha256: str) -> None:
        """Called for each shard once it is written, checked and synced; in order, in the main thread."""

    def finish(self, folder: PartialFolder, files: set[str]) -> None:
        """Called once at the end, with the names of all files of the output."""
        folder.finish(files)


def peak_shard_bytes(shards: Sequence[Shard], window: int | None) -> int:
    """The most bytes that shards take on the disk at a time."""
    sizes = [s.size for s in shards]
    return sum(sizes) if window is None else max(sum(sizes[i : i + window]) for i in range(len(sizes)))
