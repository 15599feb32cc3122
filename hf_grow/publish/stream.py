"""Publishing while growing: a shard is sent when it is finished, and removed here, so that a model larger than the disk can be made.

Two shards lie on the disk at most: one is sent while the next is written. What was sent is noted in the journal, so that an interrupted growth goes
on; the commit comes last and names all files at once, so that a repository never looks whole before it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

from hf_grow.checkpoint.hub import no_bars
from hf_grow.checkpoint.hub_errors import page
from hf_grow.checkpoint.partial_folder import PartialFolder
from hf_grow.checkpoint.shard_sink import Sink
from hf_grow.checkpoint.writer import Shard
from hf_grow.common.units import format_bytes
from hf_grow.errors import OutputError
from hf_grow.publish.push import Destination, Pushed, card, send
from hf_grow.publish.refusals import explained

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

SHARD_SIZE = 5 * 10**9
AGAIN = "Repeat the command with --resume; shards that arrived are neither written nor sent again."


class StreamSink(Sink):
    """Sends shards to a destination that `prepare` gave. `pushed` is there when all is done."""

    window = 2

    def __init__(self, to: Destination, title: str, notify: Callable[[str], None] = lambda message: None) -> None:
        self.to = to
        self.title = title
        self.notify = notify
        self.pushed: Pushed | None = None
        self._sent: dict[str, CommitOperationAdd] = {}

    def gone(self, folder: PartialFolder) -> Mapping[str, str]:
        if not folder.sent:
            return {}
        held = set(folder.sent.values()) if self._is_done(folder) else _held(self.to, set(folder.sent.values()))
        there = {file for file, facts in folder.sent.items() if facts in held}
        for file in there:
            (folder.path / file).unlink(missing_ok=True)  # killed between noting and removing it
            self._sent[file] = _remembered(file, *folder.sent[file])
        lost = len(folder.sent) - len(there)
        self.notify(
            f"{len(there)} shards were sent by the interrupted run." + f" {lost} are no longer there and are made again." * bool(lost)
        )
        return {file: folder.sent[file][1] for file in there}

    def take(self, folder: PartialFolder, shard: Shard, sha256: str) -> None:
        from huggingface_hub import CommitOperationAdd, HfApi

        path = folder.path / shard.file
        addition = CommitOperationAdd(shard.file, str(path))
        addition.upload_info.sha256 = bytes.fromhex(sha256)
        with explained(self.to.repo, AGAIN), no_bars():
            HfApi(library_name="hf-grow").preupload_lfs_files(
                self.to.repo, [addition], revision=self.to.revision, create_pr=self.to.create_pr
            )
        if addition.path_or_fileobj != b"":  # the library lets go of what it has sent
            raise OutputError(
                f"{self.to.repo} does not keep {shard.file} in LFS, so it cannot be sent ahead of the commit.",
                hint="Check its .gitattributes, or grow without --stream-push and push the folder.",
            )
        folder.note_sent(shard, sha256)
        path.unlink()
        self._sent[shard.file] = addition
        size = format_bytes(shard.size)
        self.notify(f"{shard.file} sent ({size}).")

    def finish(self, folder: PartialFolder, files: set[str]) -> None:
        from huggingface_hub import CommitOperationAdd

        shards = [self._sent[file] for file in sorted(self._sent)]
        if not self._is_done(folder):
            small = [
                CommitOperationAdd(path.relative_to(folder.path).as_posix(), str(path))
                for name in sorted(files - self._sent.keys())
                for path in ([folder.path / name] if (folder.path / name).is_file() else sorted((folder.path / name).rglob("*")))
                if path.is_file()
            ]
            additions = [*shards, *small, *card(folder.path, files, self.to.repo, self.notify)]
            commit, pull_request = send(self.to, additions, self.title, AGAIN)
            nbytes = sum(a.upload_info.size for a in additions)
            done = Pushed(self.to.repo, f"{page()}/{self.to.repo}", commit, pull_request, len(additions), nbytes)
            folder.note_committed(asdict(done))
            folder.committed = asdict(done)
        self.pushed = Pushed(**folder.committed)
        folder.discard()

    def _is_done(self, folder: PartialFolder) -> bool:
        """Whether an earlier run made the commit, in this repository."""
        return bool(folder.committed) and folder.committed.get("repo") == self.to.repo


def _held(to: Destination, objects: set[tuple[int, str]]) -> set[tuple[int, str]]:
    """Of these sizes and SHA-256, those that the repository's storage has: an upload without a commit is not kept for ever."""
    from huggingface_hub.lfs import UploadInfo, post_lfs_batch_info

    infos = [UploadInfo(size=size, sample=b"", sha256=bytes.fromhex(sha256)) for size, sha256 in sorted(objects)]
    with explained(to.repo, AGAIN):
        answers, _, _ = post_lfs_batch_info(infos, token=None, repo_type="model", repo_id=to.repo)
    return {(int(a["size"]), str(a["oid"])) for a in answers if not a.get("actions")}


def _remembered(file: str, size: int, sha256: str) -> CommitOperationAdd:
    """The operation for a file that was sent by an earlier process, as the library leaves it after `preupload_lfs_files`."""
    from huggingface_hub import CommitOperationAdd

    addition = CommitOperationAdd(file, b"")
    addition.upload_info.size = size
    addition.upload_info.sha256 = bytes.fromhex(sha256)
    addition._upload_mode, addition._should_ignore, addition._is_uploaded = "lfs", False, True
    return addition
