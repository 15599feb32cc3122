"""Byte ranges of files on the Hub, resumed when the connection fails."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from hf_grow.checkpoint.hub_errors import Unreachable, http_error, hub_url, read_errors, redact_log
from hf_grow.errors import SourceError

TRIES = 6  # in a row without a byte received
PAUSE = 0.5  # seconds before the second try, doubled each time


@contextmanager
def open_range(url: str, start: int, stop: int) -> Iterator[Any]:
    """The streamed response to a request for bytes [start, stop), to be read by `iter_raw`. Raises what huggingface_hub raises."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff  # type: ignore[attr-defined]

    redact_log()
    # identity: a range of a compressed body is useless.
    headers = {**build_hf_headers(library_name="hf-grow"), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with http_stream_backoff("GET", url, headers=headers, timeout=timeout, max_retries=2, retry_on_exceptions=()) as response:
        hf_raise_for_status(response)
        if response.status_code == 206 and content_range(response)[0] != start:
            raise Unreachable(
                f"{hub_url()} returned another byte range than requested.", hint="Try again, or download the model first (hf download)."
            )
        yield response


def content_range(response: Any) -> tuple[int, int | None]:
    """Offset of the response's first byte, and the file's total size if the server sends it."""
    if response.status_code != 206:
        length = response.headers.get("Content-Length", "")
        return 0, int(length) if length.isdigit() else None
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    return (int(match[1]), int(match[2]) if match[2].isdigit() else None) if match else (-1, None)


def fetch_range(
    ref: str, commit: str, file: str, start: int, stop: int, size: int, sha256: str | None,
    tags: MutableMapping[tuple[str, str], str] | None = None,
) -> Iterator[bytes]:  # fmt: skip
    """Bytes [start, stop) of a file of one commit, in pieces. Raises SourceError; Unreachable after TRIES failures in a row.

    The file must still be the listed one: the same commit, `size` and, if the Hub names it, `sha256`. ``tags`` maps (file, host) to the ETag first
    seen, which must not change.
    """
    from huggingface_hub import HfApi, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    url = hf_hub_url(ref, file, revision=commit, endpoint=HfApi().endpoint)
    tries, tags = 0, {} if tags is None else tags
    while start < stop:
        try:
            with open_range(url, start, stop) as response:
                _check_same(response, ref, commit, file, size, sha256, tags)
                for piece in response.iter_raw():
                    yield piece[: stop - start]
                    start, tries = start + len(piece), 0
                    if start >= stop:
                        return
            tries += 1  # the response ended early without an error
        except GeneratorExit:
            raise
        except BaseException as error:
            with read_errors(ref, commit):
                if isinstance(error, HfHubHTTPError) or not isinstance(error, http_error()):
                    raise
                tries += 1
                if tries >= TRIES:
                    raise
        if tries >= TRIES:
            raise Unreachable(
                f"The connection to {hub_url()} failed repeatedly while reading {file} of {ref}.", hint="Check the network and try again."
            )
        if tries:
            time.sleep(PAUSE * 2 ** (tries - 1))


def _check_same(
    response: Any, ref: str, commit: str, file: str, size: int, sha256: str | None, tags: MutableMapping[tuple[str, str], str]
) -> None:
    if response.status_code != 206:
        raise SourceError(
            f"{hub_url()} does not support byte ranges: it sends all of {file}.",
            hint="Remove --stream-source: the whole model is then downloaded first.",
        )
    answers = [*response.history, response]
    named = {r.headers["X-Linked-Etag"].strip('"') for r in answers if "X-Linked-Etag" in r.headers}
    commits = {r.headers["X-Repo-Commit"] for r in answers if "X-Repo-Commit" in r.headers}
    # A weak ETag (W/...) does not guarantee equal bytes; each host has its own ETags.
    strong = [(r.url.host, r.headers["ETag"]) for r in answers if r.headers.get("ETag", "").startswith('"')]
    changed = any(tags.setdefault((file, host), tag) != tag for host, tag in strong)
    if content_range(response)[1] not in (None, size) or (sha256 and named - {sha256}) or commits - {commit} or changed:
        raise SourceError(
            f"{file} of {ref} is not the one that was listed.", hint="It changed while it was read: start again with --overwrite."
        )
