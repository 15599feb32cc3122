"""Reading from the Hugging Face Hub: file listings, safetensors headers by byte range, downloads, the cache.

huggingface_hub does the work; it is imported inside the functions, so that planning from a folder does not load it.
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

from hf_grow.checkpoint.byte_ranges import content_range, open_range
from hf_grow.checkpoint.hub_errors import Unreachable, cache_folder, example, http_error, hub_url, read_errors
from hf_grow.checkpoint.safetensors_header import TensorLocation, header_length, read_header
from hf_grow.common.safe_files import MAX_FILE_BYTES, open_regular, read_bytes
from hf_grow.common.units import format_bytes
from hf_grow.errors import SourceError

LISTING_TIMEOUT = 15  # seconds without a response
TRIES = 3  # for a header, when the connection fails
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Listing:
    """The files of one commit of a Hub repository."""

    ref: str
    revision: str | None
    """As requested: a branch, a tag or a commit."""
    commit: str
    sizes: Mapping[str, int | None]
    sha256: Mapping[str, str]
    """SHA-256 of the files stored with LFS, such as the weights."""
    blobs: Mapping[str, str] = field(default_factory=dict)
    """Git SHA-1 of the other files."""


def offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def check_id(ref: str) -> None:
    """Raises SourceError for an invalid Hub id."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(ref)
    except HFValidationError:
        raise SourceError(f"{ref!r} is neither a folder nor a Hub id.", hint="A Hub id reads OWNER/NAME, as in " + example(ref)) from None


def fetch_listing(ref: str, revision: str | None) -> Listing:
    """Resolves `revision` to a commit and lists its files, in one request. Raises SourceError; Unreachable without a usable response."""
    from huggingface_hub import HfApi

    with read_errors(ref, revision):
        try:
            info = HfApi(library_name="hf-grow").model_info(ref, revision=revision, files_metadata=True, timeout=LISTING_TIMEOUT)
            files = info.siblings or []
            sizes = {f.rfilename: f.size for f in files}
            sha256 = {f.rfilename: f.lfs.sha256 for f in files if f.lfs is not None}
            blobs = {f.rfilename: f.blob_id for f in files if f.lfs is None and f.blob_id}
            commit = info.sha
        except (KeyError, TypeError, AttributeError, ValueError):
            commit = None
        if not commit or not re.fullmatch(r"[0-9a-f]{40}", commit):
            raise Unreachable(f"{hub_url()} does not respond like a Hugging Face Hub.", hint="Check HF_ENDPOINT and the proxy settings.")
    return Listing(ref, revision, commit, sizes, {n: s for n, s in sha256.items() if _SHA256.fullmatch(s)}, blobs)


def fetch_small_file(listing: Listing, name: str) -> Path:
    """Path of a small file of the repository in the cache, downloaded if needed and checked against its listed hash. Raises SourceError."""
    from huggingface_hub import HfApi

    if (listing.sizes.get(name) or 0) > MAX_FILE_BYTES:
        raise SourceError(f"{listing.ref}/{name} is {listing.sizes[name]} bytes, more than any valid file of its kind.")
    api = HfApi(library_name="hf-grow")
    with read_errors(listing.ref, listing.revision), progress_bars_disabled():
        # By branch name first: this records in the cache which commit the branch is, for later offline use.
        path = Path(api.hf_hub_download(listing.ref, name, revision=listing.revision))
        if path.parent.name != listing.commit:  # the branch moved since it was listed
            path = Path(api.hf_hub_download(listing.ref, name, revision=listing.commit))
    check_hash(listing, name, path)
    return path


def check_hash(listing: Listing, name: str, path: Path) -> None:
    """Raises SourceError if a small local file does not have the listed hash; huggingface_hub does not compare it when downloading."""
    data = read_bytes(path)
    listed, actual = listing.blobs.get(name), hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    if name in listing.sha256:
        listed, actual = listing.sha256[name], hashlib.sha256(data).hexdigest()
    if listed not in (None, actual):
        raise SourceError(
            f"{name} of {listing.ref} is not the one that was listed.",
            hint=f"Remove {path} and the file it links to, then try again. If it happens again, the connection or the Hub is at fault.",
        )


def fetch_header(listing: Listing, file: str) -> tuple[dict[str, TensorLocation], int]:
    """Tensors and size in bytes of a weight file. Only its header is read: from the cache, else by byte ranges. Raises SourceError."""
    from huggingface_hub import HfApi, hf_hub_url

    where, listed = f"{listing.ref}/{file}", listing.sizes.get(file)
    cached = cached_file(listing.ref, listing.commit, file)
    if cached is not None:
        with open_regular(cached) as handle:
            stored = os.fstat(handle.fileno()).st_size
            return read_header(handle.read(8), handle.read, stored, where), stored
    if listed is not None and listed < 8:  # no range of it can be requested
        header_length(b"", listed, where)
    url = hf_hub_url(listing.ref, file, revision=listing.commit, endpoint=HfApi().endpoint)
    with read_errors(listing.ref, listing.revision):
        # Two requests, the first for 8 bytes: one request of a generous size would fetch the weights of a small file.
        prefix, total = _read_range(url, 0, 8)
        size = listed if total is None else total
        if size is None or listed not in (None, size):
            raise SourceError(f"{where} is served with {size} bytes, but listed with {listed}.", hint="Try again later.")
        return read_header(prefix, lambda count: _read_range(url, 8, count)[0], size, where), size


def _read_range(url: str, start: int, count: int) -> tuple[bytes, int | None]:
    """`count` bytes from `start`, and the file's total size if the server sends it. Reads no more even if the server ignores the range."""
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
    with open_range(url, start, start + count) as response:
        first, total = content_range(response)
        received = bytearray()
        for chunk in response.iter_raw():
            received += chunk
            if len(received) >= start - first + count:
                break
    return bytes(received[start - first : start - first + count]), total


def download(listing: Listing, files: Sequence[str]) -> Path:
    """The snapshot folder in the cache with `files`; files already cached are not downloaded again.

    Raises SourceError, also for a file other than weights without its listed hash (`verify` checks the weights).
    """
    from huggingface_hub import HfApi

    patterns = [glob.escape(f) for f in files]
    with read_errors(listing.ref, listing.revision), progress_bars():
        folder = Path(HfApi(library_name="hf-grow").snapshot_download(listing.ref, revision=listing.commit, allow_patterns=patterns))
    for name in files:
        if not name.endswith(".safetensors"):
            check_hash(listing, name, folder / name)
    return folder


def download_size(listing: Listing, files: Sequence[str]) -> int:
    """Bytes that `download` would transfer. Raises SourceError if the disk of the cache has less free space."""
    missing = sum(listing.sizes.get(f) or 0 for f in files if cached_file(listing.ref, listing.commit, f) is None)
    cache = existing = cache_folder()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if missing > free:
        raise SourceError(
            f"{listing.ref} needs {format_bytes(missing)} more in {cache}, but only {format_bytes(free)} are free there.",
            hint="Free some space, or set HF_HOME to a folder on a larger disk.",
        )
    return missing


def cached_file(ref: str, revision: str | None, name: str) -> Path | None:
    """Path of a file in the cache, or None."""
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


def progress_bars() -> AbstractContextManager[None]:
    """huggingface_hub's progress bars on a terminal or with TQDM_POSITION=-1 (as its documentation says), else none: they would fill a log."""
    return nullcontext() if sys.stderr.isatty() or os.environ.get("TQDM_POSITION") == "-1" else progress_bars_disabled()


@contextmanager
def progress_bars_disabled() -> Iterator[None]:
    """Disables the progress bars of huggingface_hub."""
    from huggingface_hub import constants
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars  # type: ignore[attr-defined]

    # HF_HUB_DISABLE_PROGRESS_BARS takes precedence; the library warns if it is overridden.
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is not None or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
