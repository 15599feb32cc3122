"""Uploading a finished folder to the Hub as one commit.

Weights are uploaded first and committed last, so that a repository never shows an incomplete model. Uploaded files stay on the Hub's storage: an
interrupted push, repeated, uploads only what is missing. The token is handled by huggingface_hub alone.
"""

from __future__ import annotations

import base64
import re
import shlex
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from hf_grow.checkpoint.hub import progress_bars_disabled
from hf_grow.checkpoint.hub_errors import check_login, check_repo_id, hub_url, upload_errors
from hf_grow.checkpoint.reader import GROWTH, INDEX
from hf_grow.checkpoint.writer import Progress
from hf_grow.errors import InputError, OutputError
from hf_grow.publish.manifest import CARD, Manifest, check_weights

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

MOST_SEARCHED = 1 << 26
"""Bytes; files other than weights are searched for the token up to this size."""
FILES_PER_REQUEST = 256
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


@dataclass(frozen=True)
class Destination:
    """Where and how a model is published."""

    repo: str
    """OWNER/NAME, or NAME in the account of the token."""
    private: bool = False
    revision: str | None = None
    """Branch, created if needed."""
    create_pr: bool = False
    message: str | None = None
    """First line of the commit message."""


@dataclass(frozen=True)
class PushResult:
    """The commit that `push` made."""

    repo: str
    url: str
    commit: str
    pull_request: str | None
    files: int
    nbytes: int
    """Size of the model; the Hub decides how much of it had to be uploaded."""


def check_destination(to: Destination) -> None:
    """Raises OutputError for an invalid repository id or without a token; makes no request."""
    check_repo_id(to.repo)
    check_login()


def prepare_repo(to: Destination) -> Destination:
    """Creates the repository and the branch if needed; returns `to` with the full id. Raises OutputError, ExecutionError.

    Called before long work, so that missing permissions, an invalid name or a missing branch are reported at once.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    check_destination(to)
    api = HfApi(library_name="hf-grow")
    with upload_errors(to.repo, "Try again."):
        to = replace(to, repo=api.create_repo(to.repo, private=to.private or None, exist_ok=True).repo_id)
        if to.private and not api.model_info(to.repo).private:
            raise OutputError(
                f"{to.repo} exists and is public, but --private is set.", hint="Use another name, or make it private on its page."
            )
        if to.revision and not to.create_pr and not to.revision.startswith("refs/"):
            api.create_branch(to.repo, branch=to.revision, exist_ok=True)
        # Fails without write permission. Uploads nothing: a small text goes with its commit.
        api.preupload_lfs_files(to.repo, [CommitOperationAdd(CARD, b"-")], revision=to.revision, create_pr=to.create_pr)
    return to


def push(
    manifest: Manifest,
    to: Destination,
    *,
    progress: Progress = lambda nbytes: None,
    notify: Callable[[str], None] = lambda message: None,
) -> PushResult:
    """Publishes the folder of a manifest. Raises OutputError, VerificationError, ExecutionError (then a retry may help).

    `progress` counts the bytes hashed: all weights are compared with growth.json before anything is uploaded.
    """
    from huggingface_hub import CommitOperationAdd

    folder = manifest.folder
    check_destination(to)
    card = card_additions(folder, manifest.files, to.repo, notify)
    to = prepare_repo(to)
    for warning in manifest.warnings:
        notify(warning)
    check_weights(manifest, progress)
    additions = []
    with upload_errors(to.repo, retry_hint(folder, to)):
        for name, path in manifest.files.items():
            addition = CommitOperationAdd(name, str(path))
            if name in manifest.sha256:
                addition.upload_info.sha256 = bytes.fromhex(manifest.sha256[name])
            additions.append(addition)
    additions += card
    commit, pull_request = commit_files(to, additions, manifest.title, retry_hint(folder, to))
    if to.create_pr and not pull_request:
        notify("Nothing differs from the repository, so no pull request was opened.")
    return PushResult(to.repo, f"{hub_url()}/{to.repo}", commit, pull_request, len(additions), manifest.nbytes)


def retry_hint(folder: Path, to: Destination) -> str:
    """The command that continues a failed push."""
    words = ["hf-grow", "push", str(folder), to.repo, *(["--private"] if to.private else []), *(["--create-pr"] if to.create_pr else [])]
    for flag, value in (("--revision", to.revision), ("--message", to.message)):
        words += [flag, value] if value else []
    return f"Repeat with `{shlex.join(words)}`; uploaded files are not sent again."


def card_additions(folder: Path, files: Collection[str], repo: str, notify: Callable[[str], None]) -> list[CommitOperationAdd]:
    """The model card and its files, for a folder without a README.md; `notify` gets the notes for its publisher."""
    from huggingface_hub import CommitOperationAdd

    if CARD in files:
        return []
    if GROWTH not in files:
        raise InputError(f"{folder} has no {CARD}, and no {GROWTH} to write one from.", hint=f"Add a {CARD} that describes the model.")
    from hf_grow.publish.card import CardOptions, make_card

    card = make_card(folder, CardOptions(name=repo))
    for note in card.notes:
        notify(note)
    return [CommitOperationAdd(name, text.encode()) for name, text in {CARD: card.text, **card.files}.items() if name not in files]


def commit_files(to: Destination, additions: list[CommitOperationAdd], title: str, retry: str) -> tuple[str, str | None]:
    """Uploads and commits all files at once; returns the commit's id and the URL of the pull request, if any.

    Weight files of an earlier model are deleted in the same commit: readers prefer an old model.safetensors to a new index. Raises InputError
    for a file that holds the token in use, OutputError where the repository's .gitignore excludes a file.
    """
    from huggingface_hub import CommitOperationDelete, HfApi

    api = HfApi(library_name="hf-grow")
    with upload_errors(to.repo, retry), progress_bars_disabled():  # the library draws several lines for each file
        _refuse_token(additions)
        existing = api.list_repo_files(to.repo, revision=to.revision)
        if ".gitignore" in existing and (ignored := _ignored(to, additions)):
            more = f" and {len(ignored) - 1} more" if len(ignored) > 1 else ""
            raise OutputError(f"The .gitignore of {to.repo} excludes {ignored[0]}{more}.", hint=f"Change it there. {retry}")
        new = {a.path_in_repo for a in additions}
        stale = [CommitOperationDelete(n) for n in existing if n not in new and (n == INDEX or _WEIGHTS.fullmatch(n))]
        made = api.create_commit(
            to.repo,
            [*stale, *additions],
            commit_message=to.message or title,
            revision=to.revision,
            create_pr=to.create_pr,
        )
    return made.oid, made.pr_url


def _ignored(to: Destination, additions: list[CommitOperationAdd]) -> list[str]:
    """Files that the repository's .gitignore excludes, as the Hub answers; `create_commit` drops them without an error."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff  # type: ignore[attr-defined]

    url = (
        f"{HfApi().endpoint}/api/models/{to.repo}/preupload/{quote(to.revision or 'main', safe='')}{'?create_pr=1' if to.create_pr else ''}"
    )
    ignored: list[str] = []
    for start in range(0, len(additions), FILES_PER_REQUEST):
        files = [
            {"path": a.path_in_repo, "size": a.upload_info.size, "sample": base64.b64encode(a.upload_info.sample).decode()}
            for a in additions[start : start + FILES_PER_REQUEST]
        ]
        response = http_backoff("POST", url, json={"files": files}, headers=build_hf_headers(library_name="hf-grow"))
        hf_raise_for_status(response)
        ignored += [f["path"] for f in response.json()["files"] if f["shouldIgnore"]]
    return ignored


def _refuse_token(additions: list[CommitOperationAdd]) -> None:
    from huggingface_hub import get_token

    token = (get_token() or "").encode()
    for addition in additions if token else ():
        if addition.upload_info.size <= MOST_SEARCHED and not addition.path_in_repo.endswith(".safetensors"):
            with addition.as_file() as handle:
                if token in handle.read():
                    raise InputError(f"{addition.path_in_repo} holds your access token.", hint="Remove it; nothing was published.")


def uploaded_weights(manifest: Manifest, to: Destination, progress: Progress = lambda nbytes: None) -> set[str] | None:
    """Weight files that this revision of the repository already has, byte for byte; None without such a repository or branch."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    check_repo_id(to.repo)
    with upload_errors(to.repo, "Try again."):
        api = HfApi(library_name="hf-grow")
        try:
            repo = to.repo if "/" in to.repo else f"{api.whoami()['name']}/{to.repo}"
            info = api.model_info(repo, revision=to.revision, files_metadata=True)
        except (RepositoryNotFoundError, RevisionNotFoundError):
            return None
        except HfHubHTTPError as error:
            if error.response.status_code == 401 and not get_token():  # missing or private
                return None
            raise
    remote = {f.rfilename: f.lfs.sha256 for f in info.siblings or [] if f.lfs is not None}
    if remote.keys() & set(manifest.weights):
        check_weights(manifest, progress)
    return {name for name in manifest.weights if name in remote and remote[name] == manifest.sha256[name]}
