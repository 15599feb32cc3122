"""Byte ranges of files on the Hub, resumed where a connection breaks off."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from hf_grow.checkpoint.hub_errors import Unreachable, clean_log, explained, http_error, page
from hf_grow.errors import SourceError

TRIES = 6  # without a single byte between them
PAUSE = 0.5  # seconds before the second, then twice as long each


@contextmanager
def opened(url: str, start: int, stop: int) -> Iterator[Any]:
    """The answer to a request for bytes [start, stop), to be read by `iter_raw`; a 206 is of exactly this range. Raises as huggingface_hub does."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff  # type: ignore[attr-defined]

    clean_log()
    # identity: a range of a compressed answer would be of no use.
    headers = {**build_hf_headers(library_name="hf-grow"), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with http_stream_backoff("GET", url, headers=headers, timeout=timeout, max_retries=2, retry_on_exceptions=()) as response:
        hf_raise_for_status(response)
        if response.status_code == 206 and span(response)[0] != start:
            raise Unreachable(f"{page()} answers byte ranges wrongly.", hint="Try again, or download the model first (hf download).")
        yield response


def span(response: Any) -> tuple[int, int | None]:
    """Where the answer's bytes begin, and the whole file's size if the server tells."""
    if response.status_code != 206:
        length = response.headers.get("Content-Length", "")
        return 0, int(length) if length.isdigit() else None
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    return (int(found[1]), int(found[2]) if found[2].isdigit() else None) if found else (-1, None)


def fetch_range(
    ref: str, commit: str, file: str, start: int, stop: int, size: int, sha256: str | None,
    tags: MutableMapping[tuple[str, str], str] | None = None,
) -> Iterator[bytes]:  # fmt: skip
    """Bytes [start, stop) of a file of one commit, in pieces. Raises SourceError; Unreachable where the network failed for good.

    The file must be the one that was listed: of this commit and size and, where the Hub names it, this SHA-256. ``tags`` keeps the ETag that each
    host gave each file, which must stay the same.
    """
    from huggingface_hub import HfApi, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    url = hf_hub_url(ref, file, revision=commit, endpoint=HfApi().endpoint)
    tries, tags = 0, {} if tags is None else tags
    while start < stop:
        try:
            with opened(url, start, stop) as response:
                _check_same(response, ref, commit, file, size, sha256, tags)
                for piece in response.iter_raw():
                    yield piece[: stop - start]
                    start, tries = start + len(piece), 0
                    if start >= stop:
                        return
            tries += 1  # an answer that ends early, without an error
        except GeneratorExit:
            raise
        except BaseException as error:
            with explained(ref, commit):
                if isinstance(error, HfHubHTTPError) or not isinstance(error, http_error()):
                    raise
                tries += 1
                if tries >= TRIES:
                    raise
        if tries >= TRIES:
            raise Unreachable(f"{page()} breaks off in {file} of {ref}.", hint="Check the network and try again.")
        if tries:
            time.sleep(PAUSE * 2 ** (tries - 1))


def _check_same(
    response: Any, ref: str, commit: str, file: str, size: int, sha256: str | None, tags: MutableMapping[tuple[str, str], str]
) -> None:
    if response.status_code != 206:
        raise SourceError(
            f"{page()} sends all of {file} where a range is asked for.",
            hint="Leave --stream-source out: the whole model is then downloaded first.",
        )
    answers = [*response.history, response]
    named = {r.headers["X-Linked-Etag"].strip('"') for r in answers if "X-Linked-Etag" in r.headers}
    commits = {r.headers["X-Repo-Commit"] for r in answers if "X-Repo-Commit" in r.headers}
    # A weak ETag (W/...) promises no equal bytes; hosts have ETags of their own.
    strong = [(r.url.host, r.headers["ETag"]) for r in answers if r.headers.get("ETag", "").startswith('"')]
    changed = any(tags.setdefault((file, host), tag) != tag for host, tag in strong)
    if span(response)[1] not in (None, size) or (sha256 and named - {sha256}) or commits - {commit} or changed:
        raise SourceError(
            f"{file} of {ref} is not the one that was listed.", hint="It changed while it was read: start again with --overwrite."
        )
