"""Publishing while growing: a shard is uploaded when it is finished and then removed here, for models larger than the disk.

At most two shards lie on the disk: one is uploaded while the next is written. The journal notes what was uploaded, so that an interrupted growth
can resume. The commit comes last and names all files at once, so that a repository never shows an incomplete model.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

from hf_grow.checkpoint.hub import progress_bars_disabled
from hf_grow.checkpoint.hub_errors import hub_url, upload_errors
from hf_grow.checkpoint.partial_folder import PartialFolder
from hf_grow.checkpoint.shard_sink import ShardSink
from hf_grow.checkpoint.writer import Shard
from hf_grow.common.units import format_bytes
from hf_grow.errors import OutputError
from hf_grow.publish.push import Destination, PushResult, card_additions, commit_files

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

SHARD_SIZE = 5 * 10**9
RETRY = "Repeat the command with --resume; uploaded shards are neither written nor sent again."


class StreamSink(ShardSink):
    """Uploads shards to a destination that `prepare_repo` returned. `pushed` is set at the end."""

    window = 2

    def __init__(self, to: Destination, title: str, notify: Callable[[str], None] = lambda message: None) -> None:
        self.to = to
        self.title = title
        self.notify = notify
        self.pushed: PushResult | None = None
        self._sent: dict[str, CommitOperationAdd] = {}

    def already_sent(self, folder: PartialFolder) -> Mapping[str, str]:
        if not folder.sent:
            return {}
        committed = self._is_committed(folder)
        stored = set(folder.sent.values()) if committed else _stored_objects(self.to, set(folder.sent.values()))
        kept = {file for file, facts in folder.sent.items() if facts in stored}
        for file in kept:
            (folder.path / file).unlink(missing_ok=True)  # the run ended between noting and removing it
            if not committed:
                self._sent[file] = self._uploaded_before(file, *folder.sent[file])
        lost = len(folder.sent) - len(kept)
        self.notify(
            f"{len(kept)} shards were uploaded by the interrupted run."
            + f" {lost} are no longer on the Hub and are written again." * bool(lost)
        )
        return {file: folder.sent[file][1] for file in kept}

    def accept(self, folder: PartialFolder, shard: Shard, sha256: str) -> None:
        from huggingface_hub import CommitOperationAdd

        path = folder.path / shard.file
        addition = CommitOperationAdd(shard.file, str(path))
        addition.upload_info.sha256 = bytes.fromhex(sha256)
        self._upload(addition)
        folder.note_sent(shard, sha256)
        path.unlink()
        self._sent[shard.file] = addition
        self.notify(f"{shard.file} uploaded ({format_bytes(shard.size)}).")

    def finish(self, folder: PartialFolder, files: set[str]) -> None:
        from huggingface_hub import CommitOperationAdd

        if not self._is_committed(folder):
            shards = [self._sent[file] for file in sorted(self._sent)]
            small = [
                CommitOperationAdd(path.relative_to(folder.path).as_posix(), str(path))
                for name in sorted(files - self._sent.keys())
                for path in ([folder.path / name] if (folder.path / name).is_file() else sorted((folder.path / name).rglob("*")))
                if path.is_file()
            ]
            additions = [*shards, *small, *card_additions(folder.path, files, self.to.repo, self.notify)]
            commit, pull_request = commit_files(self.to, additions, self.title, RETRY)
            nbytes = sum(a.upload_info.size for a in additions)
            pushed = PushResult(self.to.repo, f"{hub_url()}/{self.to.repo}", commit, pull_request, len(additions), nbytes)
            folder.note_committed(asdict(pushed))
            folder.committed = asdict(pushed)
        self.pushed = PushResult(**folder.committed)
        folder.discard()

    def _is_committed(self, folder: PartialFolder) -> bool:
        """Whether an earlier run made the commit, in this repository."""
        return bool(folder.committed) and folder.committed.get("repo") == self.to.repo

    def _upload(self, addition: CommitOperationAdd) -> None:
        """Uploads a shard ahead of its commit. Raises OutputError if the repository does not store it with LFS."""
        from huggingface_hub import HfApi

        api = HfApi(library_name="hf-grow")
        with upload_errors(self.to.repo, RETRY), progress_bars_disabled():
            api.preupload_lfs_files(self.to.repo, [addition], revision=self.to.revision, create_pr=self.to.create_pr)
        if addition.path_or_fileobj != b"":  # the library releases what it uploaded
            raise OutputError(
                f"{self.to.repo} does not store {addition.path_in_repo} with LFS, so it cannot be uploaded ahead of the commit.",
                hint="Check its .gitattributes, or grow without --stream-push and push the folder.",
            )

    def _uploaded_before(self, file: str, size: int, sha256: str) -> CommitOperationAdd:
        """The operation for a shard that an earlier run uploaded and removed: an empty stream with the shard's size and hash, of which the
        library uploads nothing, because the Hub has the object."""
        from huggingface_hub import CommitOperationAdd
        from huggingface_hub.utils import logging as hub_logging

        addition = CommitOperationAdd(file, io.BytesIO())
        addition.upload_info.size = size
        addition.upload_info.sha256 = bytes.fromhex(sha256)
        verbosity = hub_logging.get_verbosity()
        hub_logging.set_verbosity(logging.ERROR)  # no warning that a stream is not uploaded through Xet
        try:
            self._upload(addition)
        finally:
            hub_logging.set_verbosity(verbosity)
        return addition


def _stored_objects(to: Destination, objects: set[tuple[int, str]]) -> set[tuple[int, str]]:
    """Those of `objects` (size, SHA-256) that the repository's storage still has: uploads without a commit are not kept forever."""
    from huggingface_hub.lfs import UploadInfo, post_lfs_batch_info

    infos = [UploadInfo(size=size, sample=b"", sha256=bytes.fromhex(sha256)) for size, sha256 in sorted(objects)]
    with upload_errors(to.repo, RETRY):
        answers, _, _ = post_lfs_batch_info(infos, token=None, repo_type="model", repo_id=to.repo)
    return {(int(a["size"]), str(a["oid"])) for a in answers if not a.get("actions")}
