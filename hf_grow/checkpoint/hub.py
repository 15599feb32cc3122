"""Reading from the Hugging Face Hub: listing a commit, headers by byte range, downloads, the cache.

huggingface_hub does the work and is imported only when needed.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from hf_grow.checkpoint.byte_ranges import opened, span
from hf_grow.checkpoint.hub_errors import Unreachable as Unreachable
from hf_grow.checkpoint.hub_errors import cache_folder as cache_folder
from hf_grow.checkpoint.hub_errors import example, http_error, page
from hf_grow.checkpoint.hub_errors import explained as explained
from hf_grow.checkpoint.safetensors_header import Stored, header_length, read_header
from hf_grow.common.safe_files import MAX_FILE_BYTES, open_regular, read_bytes
from hf_grow.common.units import format_bytes
from hf_grow.errors import SourceError

LOOK_UP_TIMEOUT = 15  # seconds without an answer
TRIES = 3  # for a header whose connection breaks off
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Remote:
    """One commit of a Hub repository."""

    ref: str
    revision: str | None
    """As asked for: a branch, a tag or a commit."""
    commit: str
    sizes: Mapping[str, int | None]
    sha256: Mapping[str, str]
    """Of the files that are stored with LFS, as the weights are."""
    blobs: Mapping[str, str] = field(default_factory=dict)
    """Git's SHA-1 of the others."""


def offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def check_id(ref: str) -> None:
    """Raises SourceError for what is neither a folder nor possible as a Hub id."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(ref)
    except HFValidationError:
        raise SourceError(f"{ref!r} is neither a folder nor a Hub id.", hint="A Hub id reads OWNER/NAME, as in " + example(ref)) from None


def look_up(ref: str, revision: str | None) -> Remote:
    """One request: which commit `revision` is, and which files it has. Raises SourceError; Unreachable if there was no answer to rely on."""
    from huggingface_hub import HfApi

    with explained(ref, revision):
        try:
            info = HfApi(library_name="hf-grow").model_info(ref, revision=revision, files_metadata=True, timeout=LOOK_UP_TIMEOUT)
            files = info.siblings or []
            sizes = {f.rfilename: f.size for f in files}
            sha256 = {f.rfilename: f.lfs.sha256 for f in files if f.lfs is not None}
            blobs = {f.rfilename: f.blob_id for f in files if f.lfs is None and f.blob_id}
            commit = info.sha
        except (KeyError, TypeError, AttributeError, ValueError):
            commit = None
        if not commit or not re.fullmatch(r"[0-9a-f]{40}", commit):
            raise Unreachable(f"{page()} does not answer like a Hugging Face Hub.", hint="Check HF_ENDPOINT and the proxy settings.")
    return Remote(ref, revision, commit, sizes, {n: s for n, s in sha256.items() if _SHA256.fullmatch(s)}, blobs)


def fetch_json(remote: Remote, name: str) -> Path:
    """A small file of the repository, through the cache. Raises SourceError."""
    from huggingface_hub import HfApi

    if (remote.sizes.get(name) or 0) > MAX_FILE_BYTES:
        raise SourceError(f"{remote.ref}/{name} is {remote.sizes[name]} bytes; that is no plausible file of its kind.")
    api = HfApi(library_name="hf-grow")
    with explained(remote.ref, remote.revision), no_bars():
        # By the name asked for first: this notes in the cache which commit the branch is, and offline use finds it later.
        path = Path(api.hf_hub_download(remote.ref, name, revision=remote.revision))
        if path.parent.name != remote.commit:  # the branch moved on since we looked
            path = Path(api.hf_hub_download(remote.ref, name, revision=remote.commit))
    check_whole(remote, name, path)
    return path


def check_whole(remote: Remote, name: str, path: Path) -> None:
    """Raises SourceError if a small file that is here is not the one that was listed, by its hash (which downloading does not compare)."""
    data = read_bytes(path)
    listed, found = remote.blobs.get(name), hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    if name in remote.sha256:
        listed, found = remote.sha256[name], hashlib.sha256(data).hexdigest()
    if listed not in (None, found):
        raise SourceError(
            f"{name} of {remote.ref} is not the one that was listed.",
            hint=f"Remove {path} and what it links to, then try again; if it comes back, the connection or the Hub is at fault.",
        )


def fetch_header(remote: Remote, file: str) -> tuple[dict[str, Stored], int]:
    """Tensors and size of a weight file, of which only the header is read: from the cache, else by byte ranges. Raises SourceError."""
    from huggingface_hub import HfApi, hf_hub_url

    where, listed = f"{remote.ref}/{file}", remote.sizes.get(file)
    cached = cached_file(remote.ref, remote.commit, file)
    if cached is not None:
        with open_regular(cached) as handle:
            stored = os.fstat(handle.fileno()).st_size
            return read_header(handle.read(8), handle.read, stored, where), stored
    if listed is not None and listed < 8:  # no range of it could be asked for
        header_length(b"", listed, where)
    url = hf_hub_url(remote.ref, file, revision=remote.commit, endpoint=HfApi().endpoint)
    with explained(remote.ref, remote.revision):
        # Two requests, the first for 8 bytes: asking for "surely enough" at once would fetch weights of a small file.
        prefix, total = _read_range(url, 0, 8)
        size = listed if total is None else total
        if size is None or listed not in (None, size):
            raise SourceError(f"{where} is served with {size} bytes, but listed with {listed}.", hint="Try again later.")
        return read_header(prefix, lambda count: _read_range(url, 8, count)[0], size, where), size


def _read_range(url: str, start: int, count: int) -> tuple[bytes, int | None]:
    """`count` bytes from `start`, and the whole file's size if the server tells. Reads no more even from a server that ignores ranges."""
    from huggingface_hub.errors import HfHubHTTPError

    for attempt in range(TRIES):
        try:
            return _read_range_once(url, start, count) if count else (b"", None)
        except http_error() as error:
            if isinstance(error, HfHubHTTPError) or attempt == TRIES - 1:
                raise
            time.sleep(0.5 * 2**attempt)
    raise AssertionError


def _read_range_once(url: str, start: int, count: int) -> tuple[bytes, int | None]:
    with opened(url, start, start + count) as response:
        first, total = span(response)
        got = bytearray()
        for chunk in response.iter_raw():
            got += chunk
            if len(got) >= start - first + count:
                break
    return bytes(got[start - first : start - first + count]), total


def download(remote: Remote, files: Sequence[str]) -> Path:
    """The snapshot folder holding `files`; those in the cache already are not fetched again. Raises SourceError, also where a file that is no
    weight has not the hash that was listed (`verify` compares the weights)."""
    from huggingface_hub import HfApi

    patterns = [glob.escape(f) for f in files]
    with explained(remote.ref, remote.revision), bars():
        folder = Path(HfApi(library_name="hf-grow").snapshot_download(remote.ref, revision=remote.commit, allow_patterns=patterns))
    for name in files:
        if not name.endswith(".safetensors"):
            check_whole(remote, name, folder / name)
    return folder


def bytes_to_fetch(remote: Remote, files: Sequence[str]) -> int:
    """What `download` would transfer. Raises SourceError if the disk of the cache plainly has no room for it."""
    missing = sum(remote.sizes.get(f) or 0 for f in files if cached_file(remote.ref, remote.commit, f) is None)
    cache = there = cache_folder()
    while not there.exists() and there != there.parent:
        there = there.parent
    free = shutil.disk_usage(there).free
    if missing > free:
        raise SourceError(
            f"{remote.ref} needs {format_bytes(missing)} more in {cache}, but only {format_bytes(free)} are free there.",
            hint="Make room, or set HF_HOME to a folder on a larger disk.",
        )
    return missing


def cached_file(ref: str, revision: str | None, name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(ref, name, revision=revision)
    return Path(path) if isinstance(path, str) else None


def blob_sha256(path: Path) -> str | None:
    """SHA-256 of an LFS file in the cache: the name of the blob that the snapshot links to. One link only: blobs may be links themselves."""
    try:
        name = Path(os.readlink(path)).name
    except OSError:
        return None
    return name if _SHA256.fullmatch(name) else None


def bars() -> AbstractContextManager[None]:
    """huggingface_hub's progress bars where somebody sees them, or asks for them as its documentation says; those of Xet would fill a log."""
    return nullcontext() if sys.stderr.isatty() or os.environ.get("TQDM_POSITION") == "-1" else no_bars()


@contextmanager
def no_bars() -> Iterator[None]:
    """Without the progress bars of huggingface_hub."""
    from huggingface_hub import constants
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars  # type: ignore[attr-defined]

    # A user's HF_HUB_DISABLE_PROGRESS_BARS has the last word; the library warns if it is contradicted.
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is not None or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
