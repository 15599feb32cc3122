"""Sending a finished folder to the Hub, as one commit.

Weights go first and the commit comes last, so that a repository never looks whole before it is. What was sent stays on the Hub's side: an
interrupted push, repeated, sends only what is missing there. A token is left to huggingface_hub: it is neither read, shown nor stored here.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hf_grow.checkpoint.hub import no_bars
from hf_grow.checkpoint.hub_errors import page
from hf_grow.checkpoint.reader import GROWTH, INDEX
from hf_grow.checkpoint.writer import Progress
from hf_grow.errors import InputError, OutputError
from hf_grow.publish.manifest import CARD, Cargo, check_content, survey
from hf_grow.publish.refusals import check_login, check_repo_id, explained

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

MOST_SEARCHED = 1 << 26
"""Bytes; files other than weights are searched for the token up to this size."""
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


@dataclass(frozen=True)
class Destination:
    repo: str
    """OWNER/NAME; NAME alone is one of the token's account."""
    private: bool = False
    revision: str | None = None
    """Branch, made if need be."""
    create_pr: bool = False
    message: str | None = None


@dataclass(frozen=True)
class Pushed:
    repo: str
    url: str
    commit: str
    pull_request: str | None
    files: int
    nbytes: int
    """Of the model; how much of it had to be sent, the Hub decides."""


def check_destination(to: Destination) -> None:
    """Raises OutputError for a name that cannot be, and where there is no token; asks nobody."""
    check_repo_id(to.repo)
    check_login()


def prepare(to: Destination) -> Destination:
    """Makes the repository and the branch where they are not there, and gives the full id. Raises OutputError, ExecutionError.

    Comes before long work: a token that may not write, a name that cannot be or a branch that is not there is told at once.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    check_destination(to)
    api = HfApi(library_name="hf-grow")
    with explained(to.repo, "Try again."):
        made = api.create_repo(to.repo, private=to.private or None, exist_ok=True)
        to = replace(to, repo=made.repo_id)
        if to.private and not api.model_info(to.repo).private:
            raise OutputError(
                f"{to.repo} exists and is public, but --private was asked for.", hint="Take another name, or make it private on its page."
            )
        if to.revision and not to.create_pr and not to.revision.startswith("refs/"):
            api.create_branch(to.repo, branch=to.revision, exist_ok=True)
        # Asks how a file would be stored, which only those may know who may send it; a small text is not sent before its commit.
        api.preupload_lfs_files(to.repo, [CommitOperationAdd(CARD, b"-")], revision=to.revision, create_pr=to.create_pr)
    return to


def push(
    folder: Path,
    to: Destination,
    *,
    progress: Progress = lambda nbytes: None,
    notify: Callable[[str], None] = lambda message: None,
) -> Pushed:
    """Publishes a checkpoint folder. Raises InputError for what may not be published, OutputError, ExecutionError (then: repeat).

    `progress` follows the reading that comes first: every weight file is compared with growth.json before a byte leaves.
    """
    from huggingface_hub import CommitOperationAdd

    cargo = survey(folder)
    check_destination(to)
    cards = card(folder, cargo.files, to.repo, notify)
    to = prepare(to)
    for doubt in cargo.doubts:
        notify(doubt)
    check_content(cargo, progress)
    additions = []
    with explained(to.repo, again(folder, to)):
        for name, path in cargo.files.items():
            addition = CommitOperationAdd(name, str(path))
            if name in cargo.sha256:
                addition.upload_info.sha256 = bytes.fromhex(cargo.sha256[name])
            additions.append(addition)
    additions += cards
    commit, pull_request = send(to, additions, cargo.title, again(folder, to))
    if to.create_pr and not pull_request:
        notify("Nothing differs from what is there, so no pull request was opened.")
    return Pushed(to.repo, f"{page()}/{to.repo}", commit, pull_request, len(additions), cargo.nbytes)


def again(folder: Path, to: Destination) -> str:
    """How to go on after a failure."""
    words = ["hf-grow", "push", str(folder), to.repo, *(["--private"] if to.private else []), *(["--create-pr"] if to.create_pr else [])]
    for flag, value in (("--revision", to.revision), ("--message", to.message)):
        words += [flag, value] if value else []
    return f"Repeat with `{shlex.join(words)}`; what arrived is not sent again."


def card(folder: Path, files: Collection[str], repo: str, notify: Callable[[str], None]) -> list[CommitOperationAdd]:
    """A model card, and what goes with it, for a folder that has none; `notify` hears what its publisher should know."""
    from huggingface_hub import CommitOperationAdd

    if CARD in files:
        return []
    if GROWTH not in files:
        raise InputError(
            f"{folder} has no {CARD}, and no {GROWTH} from which one could be written.", hint=f"Put a {CARD} there that says what it is."
        )
    from hf_grow.publish.card import CardOptions, make_card

    made = make_card(folder, CardOptions(name=repo))
    for note in made.notes:
        notify(note)
    return [CommitOperationAdd(name, text.encode()) for name, text in {CARD: made.text, **made.files}.items() if name not in files]


def send(to: Destination, additions: list[CommitOperationAdd], title: str, again: str) -> tuple[str, str | None]:
    """One commit of all files, after their content went up; gives its id and the address of a pull request.

    Weight files of an earlier model go in the same commit: a reader would take an old model.safetensors before a new index. Raises InputError
    where a file holds the token that sends it.
    """
    from huggingface_hub import CommitOperationDelete, HfApi

    api = HfApi(library_name="hf-grow")
    with explained(to.repo, again), no_bars():  # the library draws several lines a file
        _refuse_token(additions)
        there = api.list_repo_files(to.repo, revision=to.revision)
        if ".gitignore" in there:
            # The library leaves out what the repository ignores, and says nothing.
            api.preupload_lfs_files(to.repo, additions, revision=to.revision, create_pr=to.create_pr, free_memory=False)
            if ignored := [a.path_in_repo for a in additions if a._should_ignore]:
                more = f" and {len(ignored) - 1} more" if len(ignored) > 1 else ""
                raise OutputError(f"The .gitignore of {to.repo} keeps out {ignored[0]}{more}.", hint=f"Change it there. {again}")
        new = {a.path_in_repo for a in additions}
        stale = [CommitOperationDelete(n) for n in there if n not in new and (n == INDEX or _WEIGHTS.fullmatch(n))]
        made = api.create_commit(
            to.repo,
            [*stale, *additions],
            commit_message=to.message or title,
            revision=to.revision,
            create_pr=to.create_pr,
        )
    return made.oid, made.pr_url


def _refuse_token(additions: list[CommitOperationAdd]) -> None:
    from huggingface_hub import get_token

    token = (get_token() or "").encode()
    for addition in additions if token else ():
        if addition.upload_info.size <= MOST_SEARCHED and not addition.path_in_repo.endswith(".safetensors"):
            with addition.as_file() as handle:
                if token in handle.read():
                    raise InputError(f"{addition.path_in_repo} holds your access token.", hint="Take it out; nothing was published.")


def on_the_hub(cargo: Cargo, to: Destination, progress: Progress = lambda nbytes: None) -> set[str] | None:
    """Weight files that this revision of the repository has already, byte for byte; None if there is no such repository or branch."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    check_repo_id(to.repo)
    with explained(to.repo, "Try again."):
        api = HfApi(library_name="hf-grow")
        try:
            repo = to.repo if "/" in to.repo else f"{api.whoami()['name']}/{to.repo}"
            info = api.model_info(repo, revision=to.revision, files_metadata=True)
        except (RepositoryNotFoundError, RevisionNotFoundError):
            return None
        except HfHubHTTPError as error:
            if error.response.status_code == 401 and not get_token():  # what is not there or private
                return None
            raise
    there = {f.rfilename: f.lfs.sha256 for f in info.siblings or [] if f.lfs is not None}
    if there.keys() & set(cargo.weights):
        check_content(cargo, progress)
    return {name for name in cargo.weights if name in there and there[name] == cargo.sha256[name]}
