"""What huggingface_hub raises while reading, in plain words.

Nothing of a server's answer is repeated in a message: it could hold a token or a signed address. The library's own warnings are cleaned of both.
"""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hf_grow.checkpoint.model_ids import near
from hf_grow.errors import SourceError


class Unreachable(SourceError):
    """No answer from the Hub, or none that helps; a copy in the cache will do."""


def cache_folder() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


class _Clean(logging.Filter):
    """Takes queries out of addresses (those of storage are signed, and whoever has one may use it) and whatever looks like a token."""

    def filter(self, record: logging.LogRecord) -> bool:
        text = re.sub(r"(https?://[^\s?]+)\?\S+", r"\1", record.getMessage())
        record.msg, record.args = re.sub(r"\b(Bearer |hf_)[\w.-]{8,}", r"\1...", text), ()
        return True


_CLEAN = _Clean()


def clean_log() -> None:
    """From here on huggingface_hub's warnings about its tries show no signature and no token."""
    for name in ("huggingface_hub.utils._http", "huggingface_hub.file_download"):
        logging.getLogger(name).addFilter(_CLEAN)


@contextmanager
def explained(ref: str, revision: str | None) -> Iterator[None]:
    """Turns what huggingface_hub raises into SourceError."""
    clean_log()
    try:
        yield
    except SourceError:
        raise
    except (http_error(), OSError, ValueError) as error:
        raise _explain(error, ref, revision) from None


def _explain(error: BaseException, ref: str, revision: str | None) -> SourceError:
    from huggingface_hub import errors, get_token

    again = "Check the network and try again; files that were finished are kept."
    if isinstance(error, errors.GatedRepoError):
        gate = f"{page()}/{ref}"
        if get_token():
            return SourceError(
                f"{ref} is gated, and the account of your token has no access.",
                hint=f"Ask for access or accept the licence on {gate}, then run this again. `hf auth whoami` names the account.",
            )
        return SourceError(
            f"{ref} is gated: only accounts that accepted its licence may read it.",
            hint=f"Accept the licence on {gate}, then log in with `hf auth login` (or set HF_TOKEN).",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return SourceError(
            f"{ref} has no revision {revision!r}.", hint=f"Its branches, tags and commits are listed on {page()}/{ref}/tree/main."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        known = near(ref)
        private = "check the id and the access of your token" if get_token() else "if it is private, log in with `hf auth login`"
        hint = f"Did you mean {' or '.join(known)}? Otherwise {private}." if known else private[0].upper() + private[1:] + "."
        return SourceError(f"There is no repository {ref} on {page()} that you may see.", hint=hint)
    if isinstance(error, errors.LocalEntryNotFoundError):
        # The library's way to say that something failed and the cache could not help; its cause is what matters.
        return (
            _explain(error.__cause__, ref, revision)
            if error.__cause__
            else Unreachable(f"{ref} could not be read from {page()}.", hint=again)
        )
    if isinstance(error, errors.EntryNotFoundError):
        return SourceError(f"A file of {ref} that the Hub lists is not there.", hint="Try again later.")
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status == 401:
            return SourceError(f"{page()} does not accept your token.", hint="Log in again with `hf auth login`, or unset HF_TOKEN.")
        if status == 403:
            return SourceError(
                f"Your token does not give access to {ref}.", hint="Give it the right to read this repository, or use another."
            )
        return Unreachable(f"{page()} answered with status {status} when asked for {ref}.", hint="Try again later.")
    if isinstance(error, http_error()):
        return Unreachable(f"{page()} cannot be reached ({type(error).__name__}).", hint=again)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return SourceError(f"The disk of {cache_folder()} is full.", hint="Make room, or set HF_HOME to a folder on a larger disk.")
    if isinstance(error, OSError) and error.errno:
        return SourceError(f"Cannot use the cache {cache_folder()}: {os.strerror(error.errno)}.", hint="Set HF_HOME to a folder of yours.")
    return SourceError(f"The download of {ref} failed ({type(error).__name__}).", hint=again)


def page() -> str:
    """Address of the Hub; without a user and password that an HF_ENDPOINT may hold."""
    from huggingface_hub import constants

    parts = urlsplit(constants.ENDPOINT)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def example(ref: str) -> str:
    return f"{next(iter(near(ref)), 'mistralai/Mistral-7B-v0.1')}."


def http_error() -> Any:
    """The base of network errors. Which HTTP library huggingface_hub uses depends on its version."""
    from huggingface_hub import errors

    return errors.HTTPError  # type: ignore[attr-defined]
