"""How a growth reads its sources, is written and is published: the keyword arguments, flags and YAML keys that all methods share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from hf_grow.checkpoint.writer import DEFAULT_MEMORY, DEFAULT_SHARD_SIZE, DEFAULT_SOURCE_CACHE
from hf_grow.options import Bytes, Excludes, Options, Requires
from hf_grow.publish.push import Destination
from hf_grow.publish.stream import SHARD_SIZE as STREAM_SHARD_SIZE


class OutputOptions(Options):
    """How the result is written and published; the same for every method."""

    max_shard_size: Annotated[Bytes, Field(ge=1)] | None = None
    """Largest weight file, such as 10GB. Default: 50GB, as in transformers; with --stream-push 5GB."""
    resume: bool = False
    """Continue an interrupted run: only unfinished tensors are written again. With --overwrite, an existing output is replaced when all is written."""
    overwrite: bool = False
    """Replace an existing output, which stays until the new one is complete. An interrupted run is discarded, or with --resume continued."""
    memory_budget: Annotated[Bytes, Field(ge=1 << 20)] = DEFAULT_MEMORY
    """Memory for computing tensors that are not copies. Default: 256MiB."""
    allow_nonfinite: bool = False
    """Accept weights that are NaN or infinite."""
    stream_source: bool = False
    """Fetch each tensor of a Hub source when it is needed and delete it after its last use, instead of downloading the whole source first."""
    source_cache: Annotated[Bytes, Field(ge=0), Requires("stream_source")] = DEFAULT_SOURCE_CACHE
    """With --stream-source, disk space for tensors that are needed again later; others are fetched again. Default: 2GB."""
    with_optimizer: str | None = None
    """Folder of a Trainer checkpoint of the source, with optimizer.pt, optimizer.bin, FSDP's optimizer_0, optimizer.json (hf-grow train under
    FSDP2), or DeepSpeed's state after ds_to_universal: its optimizer state is grown too, so that training can resume from the result."""
    optimizer_policy: Annotated[Literal["map", "keep-and-zero", "reset"], Requires("with_optimizer")] = "map"
    """Initial optimizer state of new entries: the mapped state (map), zero (keep-and-zero), or no moments for any parameter (reset)."""
    exact_steps: Annotated[bool, Requires("with_optimizer"), Requires("optimizer_policy", ("map", "keep-and-zero"))] = False
    """Write optimizer groups with which AdamW repeats the small model's steps exactly; for an optimizer made from
    hf_grow.training.growth_state.trajectory.param_groups."""
    push: str | None = None
    """Publish the result as this repository on the Hub, OWNER/NAME; see hf-grow push."""
    private: Annotated[bool, Requires("push")] = False
    """With --push, make the repository private."""
    push_revision: Annotated[str | None, Requires("push")] = None
    """With --push, branch to commit to; created if it does not exist."""
    create_pr: Annotated[bool, Requires("push")] = False
    """With --push, open a pull request instead of committing."""
    message: Annotated[str | None, Requires("push")] = None
    """With --push, first line of the commit message."""
    stream_push: Annotated[bool, Requires("push"), Excludes("with_optimizer")] = False
    """With --push, upload each shard when it is finished and delete it here: at most two shards are on the disk. The commit comes last."""

    @property
    def shard_size(self) -> int:
        return self.max_shard_size or (STREAM_SHARD_SIZE if self.stream_push else DEFAULT_SHARD_SIZE)

    @property
    def destination(self) -> Destination | None:
        """Where the result is published, if anywhere."""
        if self.push is None:
            return None
        return Destination(self.push, self.private, self.push_revision, self.create_pr, self.message)
