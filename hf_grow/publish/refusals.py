"""What can go wrong while publishing, in plain words.

As where the Hub is read: nothing of a server's answer is repeated, since it could hold a token or a signed address.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from hf_grow.checkpoint.hub_errors import clean_log, http_error, page
from hf_grow.errors import ExecutionError, GrowError, OutputError

_QUOTA = re.compile(r"storage|quota|billing|payment", re.IGNORECASE)


def check_repo_id(repo: str) -> None:
    """Raises OutputError for what can be no repository."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise OutputError(f"{repo!r} can be no repository on the Hub.", hint="It reads OWNER/NAME, as in my-name/my-model-10.7B.") from None


def check_login() -> None:
    """Raises OutputError where nothing could be published at all; asks nobody."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise OutputError("The Hub is not asked (HF_HUB_OFFLINE), so nothing can be published.", hint="Unset HF_HUB_OFFLINE.")
    token = get_token()
    if token and not re.fullmatch(r"[!-~]+", token):
        raise OutputError(
            "The token holds characters that no token has.", hint="Log in again with `hf auth login`, or set another HF_TOKEN."
        )
    if not token:
        raise OutputError("Publishing needs a token with the right to write.", hint="Log in with `hf auth login`, or set HF_TOKEN.")


@contextmanager
def explained(repo: str, again: str) -> Iterator[None]:
    """Turns what huggingface_hub raises into OutputError or ExecutionError; `again` says how to go on after a failure."""
    clean_log()
    try:
        yield
    except GrowError:
        raise
    except (http_error(), OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise _explain(error, repo, again) from None


def _explain(error: BaseException, repo: str, again: str) -> GrowError:
    from huggingface_hub import errors

    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # the library's frame around what broke in a thread
        return _explain(error.__cause__, repo, again)
    if isinstance(error, errors.LocalTokenNotFoundError):
        return OutputError("Publishing needs a token with the right to write.", hint="Log in with `hf auth login`, or set HF_TOKEN.")
    if isinstance(error, errors.RevisionNotFoundError):
        return OutputError(f"{repo} has no such branch or pull request.", hint="Give an existing one, or the name of a new branch.")
    if isinstance(error, errors.HfHubHTTPError):
        return _by_status(error, repo, again)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return OutputError("The Hub is not asked (HF_HUB_OFFLINE), so nothing can be published.", hint="Unset HF_HUB_OFFLINE.")
    if isinstance(error, http_error()):
        return ExecutionError(f"The connection to {page()} failed ({type(error).__name__}).", hint=f"Check the network. {again}")
    if isinstance(error, OSError) and error.errno:
        return ExecutionError(f"Publishing {repo} failed: {os.strerror(error.errno)}.", hint=again)
    if isinstance(error, UnicodeDecodeError):  # the only file that the library reads as text
        return OutputError("README.md is not UTF-8 text.", hint="Save it as UTF-8. Or remove README.md; a new one is then written.")
    if isinstance(error, ValueError) and "README.md" in str(error):
        return OutputError(
            "The Hub does not accept the metadata at the top of README.md.",
            hint="Check its YAML: license, language, tags and base_model have fixed forms. Or remove README.md; a new one is then written.",
        )
    if _QUOTA.search(str(error)):
        return _full(repo, again)
    return ExecutionError(f"{page()} did not take {repo} ({type(error).__name__}).", hint=again)


def _by_status(error: BaseException, repo: str, again: str) -> GrowError:
    from huggingface_hub import errors

    assert isinstance(error, errors.HfHubHTTPError)
    status, owner = error.response.status_code, repo.rpartition("/")[0] or "your account"
    if status in (402, 413, 507) or (status == 403 and _QUOTA.search(error.server_message or "")):
        return _full(repo, again)
    if status == 401 and not isinstance(error, errors.RepositoryNotFoundError):
        return OutputError(f"{page()} does not accept your token.", hint="Log in again with `hf auth login`, or set another HF_TOKEN.")
    if status == 403:
        return OutputError(
            f"Your token may not write to {repo}.",
            hint=f"Use one with write access to {owner}, or --create-pr; `hf auth whoami` names your account and organisations.",
        )
    if status in (401, 404):
        return OutputError(
            f"There is no repository {repo} on {page()} that you may see, and it cannot be made.",
            hint=f"Check that {owner} exists and that your token has access to it; `hf auth whoami` names your account and organisations.",
        )
    if status in (409, 412):
        return ExecutionError(f"{repo} was changed by somebody else meanwhile.", hint=again)
    if status == 429:
        return ExecutionError(f"{page()} asks for fewer requests.", hint=f"Wait a few minutes. {again}")
    if status < 500:
        return OutputError(
            f"{page()} refuses this (status {status}).", hint="Check the name of the repository, the revision and the files."
        )
    return ExecutionError(f"{page()} failed (status {status}).", hint=again)


def _full(repo: str, again: str) -> ExecutionError:
    owner = repo.rpartition("/")[0] or "your account"
    return ExecutionError(f"The storage of {owner} on {page()} is used up.", hint=f"Free some or extend it. {again}")
