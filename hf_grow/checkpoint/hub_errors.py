"""Errors of huggingface_hub as errors of hf-grow: one context manager for reading, one for uploading.

No message repeats the server's response, which may hold a token or a signed URL; both are also redacted in the library's own log.
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

from hf_grow.checkpoint.model_ids import similar_ids
from hf_grow.errors import ExecutionError, GrowError, OutputError, SourceError

_QUOTA = re.compile(r"storage|quota|billing|payment", re.IGNORECASE)


class Unreachable(SourceError):
    """The Hub gave no usable response; a copy in the cache may be used instead."""


def cache_folder() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


class _Redact(logging.Filter):
    """Removes the query of every URL (storage URLs are signed) and everything that looks like a token."""

    def filter(self, record: logging.LogRecord) -> bool:
        text = re.sub(r"(https?://[^\s?]+)\?\S+", r"\1", record.getMessage())
        record.msg, record.args = re.sub(r"\b(Bearer |hf_)[\w.-]{8,}", r"\1...", text), ()
        return True


_REDACT = _Redact()


def redact_log() -> None:
    """Redacts signatures and tokens in what huggingface_hub logs from now on, such as its warnings about retries."""
    for name in ("huggingface_hub.utils._http", "huggingface_hub.file_download"):
        logging.getLogger(name).addFilter(_REDACT)


def hub_url() -> str:
    """URL of the Hub, without the user and password that HF_ENDPOINT may hold."""
    from huggingface_hub import constants

    parts = urlsplit(constants.ENDPOINT)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def example(ref: str) -> str:
    """A Hub id to show in a hint: a known one close to `ref`, if there is any."""
    return f"{next(iter(similar_ids(ref)), 'mistralai/Mistral-7B-v0.1')}."


def http_error() -> Any:
    """The base of network errors. Which HTTP library huggingface_hub uses depends on its version."""
    from huggingface_hub import errors

    return errors.HTTPError  # type: ignore[attr-defined]


@contextmanager
def read_errors(ref: str, revision: str | None) -> Iterator[None]:
    """Raises what huggingface_hub raises while reading `ref` as SourceError; Unreachable where the network or the server failed."""
    redact_log()
    try:
        yield
    except SourceError:
        raise
    except (http_error(), OSError, ValueError) as error:
        raise _read_error(error, ref, revision) from None


def _read_error(error: BaseException, ref: str, revision: str | None) -> SourceError:
    from huggingface_hub import errors, get_token

    retry = "Check the network and try again; files already downloaded are kept."
    if isinstance(error, errors.GatedRepoError):
        gate = f"{hub_url()}/{ref}"
        if get_token():
            return SourceError(
                f"{ref} is gated, and your account has no access to it.",
                hint=f"Request access or accept the license on {gate}, then run this again. `hf auth whoami` names the account.",
            )
        return SourceError(
            f"{ref} is gated: only accounts that accepted its license may read it.",
            hint=f"Accept the license on {gate}, then log in with `hf auth login` (or set HF_TOKEN).",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return SourceError(
            f"{ref} has no revision {revision!r}.", hint=f"Its branches, tags and commits are listed on {hub_url()}/{ref}/tree/main."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        known = similar_ids(ref)
        private = "check the id and the permissions of your token" if get_token() else "if it is private, log in with `hf auth login`"
        hint = f"Did you mean {' or '.join(known)}? Otherwise {private}." if known else private[0].upper() + private[1:] + "."
        return SourceError(f"There is no repository {ref} on {hub_url()}, or your token has no access to it.", hint=hint)
    if isinstance(error, errors.LocalEntryNotFoundError):
        # Raised where a request failed and the file is not in the cache: its cause is the error to report.
        return (
            _read_error(error.__cause__, ref, revision)
            if error.__cause__
            else Unreachable(f"{ref} could not be read from {hub_url()}.", hint=retry)
        )
    if isinstance(error, errors.EntryNotFoundError):
        return SourceError(f"A file of {ref} is listed by the Hub but cannot be downloaded (404).", hint="Try again later.")
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status == 401:
            return SourceError(f"{hub_url()} does not accept your token.", hint="Log in again with `hf auth login`, or unset HF_TOKEN.")
        if status == 403:
            return SourceError(
                f"Your token has no access to {ref}.", hint="Give it read permission for this repository, or use another token."
            )
        return Unreachable(f"{hub_url()} answered with status {status} for {ref}.", hint="Try again later.")
    if isinstance(error, http_error()):
        return Unreachable(f"{hub_url()} cannot be reached ({type(error).__name__}).", hint=retry)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return SourceError(f"The disk of {cache_folder()} is full.", hint="Make room, or set HF_HOME to a folder on a larger disk.")
    if isinstance(error, OSError) and error.errno:
        return SourceError(
            f"Cannot use the cache {cache_folder()}: {os.strerror(error.errno)}.", hint="Set HF_HOME to a folder that you can write to."
        )
    return SourceError(f"The download of {ref} failed ({type(error).__name__}).", hint=retry)


def check_repo_id(repo: str) -> None:
    """Raises OutputError for an invalid repository id."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise OutputError(f"{repo!r} is not a valid repository id.", hint="It reads OWNER/NAME, as in my-name/my-model-10.7B.") from None


def check_login() -> None:
    """Raises OutputError where offline mode is on or no usable token is set; makes no request."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise OutputError("Publishing needs the Hub, and HF_HUB_OFFLINE is set.", hint="Unset HF_HUB_OFFLINE.")
    token = get_token()
    if token and not re.fullmatch(r"[!-~]+", token):
        raise OutputError("The token contains invalid characters.", hint="Log in again with `hf auth login`, or set another HF_TOKEN.")
    if not token:
        raise OutputError("Publishing needs a token with write permission.", hint="Log in with `hf auth login`, or set HF_TOKEN.")


@contextmanager
def upload_errors(repo: str, retry: str) -> Iterator[None]:
    """Raises what huggingface_hub raises while uploading to `repo` as OutputError or ExecutionError; `retry`: the hint for errors worth a retry."""
    redact_log()
    try:
        yield
    except GrowError:
        raise
    except (http_error(), OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise _upload_error(error, repo, retry) from None


def _upload_error(error: BaseException, repo: str, retry: str) -> GrowError:
    from huggingface_hub import errors

    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # raised around an error in an upload thread
        return _upload_error(error.__cause__, repo, retry)
    if isinstance(error, errors.LocalTokenNotFoundError):
        return OutputError("Publishing needs a token with write permission.", hint="Log in with `hf auth login`, or set HF_TOKEN.")
    if isinstance(error, errors.RevisionNotFoundError):
        return OutputError(f"{repo} has no such branch or pull request.", hint="Give an existing one, or a new branch name.")
    if isinstance(error, errors.HfHubHTTPError):
        return _upload_error_by_status(error, repo, retry)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return OutputError("Publishing needs the Hub, and HF_HUB_OFFLINE is set.", hint="Unset HF_HUB_OFFLINE.")
    if isinstance(error, http_error()):
        return ExecutionError(f"The connection to {hub_url()} failed ({type(error).__name__}).", hint=f"Check the network. {retry}")
    if isinstance(error, OSError) and error.errno:
        return ExecutionError(f"Publishing {repo} failed: {os.strerror(error.errno)}.", hint=retry)
    if isinstance(error, UnicodeDecodeError):  # README.md is the only file that the library decodes
        return OutputError("README.md is not UTF-8 text.", hint="Save it as UTF-8. Or remove README.md; a new one is then written.")
    if isinstance(error, ValueError) and "README.md" in str(error):
        return OutputError(
            "The Hub does not accept the metadata at the top of README.md.",
            hint="Check its YAML: license, language, tags and base_model have fixed forms. Or remove README.md; a new one is then written.",
        )
    if _QUOTA.search(str(error)):
        return _quota_exceeded(repo, retry)
    return ExecutionError(f"Uploading {repo} to {hub_url()} failed ({type(error).__name__}).", hint=retry)


def _upload_error_by_status(error: BaseException, repo: str, retry: str) -> GrowError:
    from huggingface_hub import errors

    assert isinstance(error, errors.HfHubHTTPError)
    status, owner = error.response.status_code, repo.rpartition("/")[0] or "your account"
    if status in (402, 413, 507) or (status == 403 and _QUOTA.search(error.server_message or "")):
        return _quota_exceeded(repo, retry)
    if status == 401 and not isinstance(error, errors.RepositoryNotFoundError):
        return OutputError(f"{hub_url()} does not accept your token.", hint="Log in again with `hf auth login`, or set another HF_TOKEN.")
    if status == 403:
        return OutputError(
            f"Your token may not write to {repo}.",
            hint=f"Use one with write access to {owner}, or --create-pr; `hf auth whoami` names your account and organizations.",
        )
    if status in (401, 404):
        return OutputError(
            f"There is no repository {repo} on {hub_url()} that your token can access, and it cannot be created.",
            hint=f"Check that {owner} exists and that your token has access to it; `hf auth whoami` names your account and organizations.",
        )
    if status in (409, 412):
        return ExecutionError(f"{repo} was changed by another commit in the meantime.", hint=retry)
    if status == 429:
        return ExecutionError(f"{hub_url()} limits the rate of requests (status 429).", hint=f"Wait a few minutes. {retry}")
    if status < 500:
        return OutputError(
            f"{hub_url()} refuses the upload (status {status}).", hint="Check the name of the repository, the revision and the files."
        )
    return ExecutionError(f"{hub_url()} failed (status {status}).", hint=retry)


def _quota_exceeded(repo: str, retry: str) -> ExecutionError:
    owner = repo.rpartition("/")[0] or "your account"
    return ExecutionError(
        f"The storage quota of {owner} on {hub_url()} is exhausted.", hint=f"Free some storage, or extend the quota. {retry}"
    )
