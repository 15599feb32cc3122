"""The model card of a source checkpoint: license, languages and datasets that a grown model inherits.

Read from README.md of a local source, if the folder still holds the same config.json; else from the Hub at the recorded commit, through the cache.
Only values of the expected form in its metadata count: the file may be anything.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_grow.checkpoint import hub
from hf_grow.common.safe_files import open_regular, read_json
from hf_grow.errors import GrowError, SourceError
from hf_grow.publish.names import is_hub_id

README = "README.md"
MAX_METADATA = 256_000
"""Characters. Metadata with the text of a license or many evaluations reach about 50,000."""
MOST = 200
"""Languages or datasets inherited at most."""

_BLOCK = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}")
_LICENSE_NAME = re.compile(r"[A-Za-z0-9][\w .+-]{0,80}")
_LINK = re.compile(r"https://[\w.-]+(?:/[\w.~%+/-]*)?|[\w-][\w.-]{0,80}", re.ASCII)
_LANGUAGE = re.compile(r"[a-z]{2,3}(?:-[A-Za-z0-9]{2,8})*|code|multilingual")
_DATASET = re.compile(r"[\w][\w.-]{0,95}(?:/[\w][\w.-]{0,95})?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class SourceCard:
    """The metadata of a source's card. ``problem``: why it is not available; the rest is then empty."""

    ref: str
    revision: str = ""
    license: str = ""
    """Identifier of the Hub; 'other' if `license_name` names it."""
    license_name: str = ""
    license_link: str = ""
    language: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    base_model: str = ""
    """A Hub id."""
    problem: str = ""

    @property
    def license_label(self) -> str:
        return self.license_name if self.license == "other" and self.license_name else self.license


def read_card(ref: str, revision: str, config: Mapping[str, Any] | None, *, offline: bool) -> SourceCard:
    """The card of a source, as growth.json names it: a folder if `revision` is empty. Never raises; see `problem`."""
    try:
        path = _hub_card(ref, revision, offline) if revision else _folder_card(ref, config)
        return parse_card(ref, revision, _text(path))
    except GrowError as error:
        return SourceCard(ref, revision, problem=error.message)


def latest_card(ref: str, *, offline: bool) -> SourceCard:
    """The current card of a Hub repository."""
    try:
        hub.check_id(ref)
        return parse_card(ref, "", _text(_fetched(ref, None, offline)))
    except GrowError as error:
        return SourceCard(ref, problem=error.message)


def _folder_card(ref: str, config: Mapping[str, Any] | None) -> Path:
    folder = Path(ref).expanduser()
    if not folder.is_dir():
        raise SourceError("the source folder no longer exists")
    try:
        same = config is not None and read_json(folder / "config.json", "") == config
    except GrowError:
        same = False
    if not same:
        raise SourceError("the source folder now holds another model")
    if not (folder / README).is_file():
        raise SourceError(f"the source folder has no {README}")
    return folder / README


def _hub_card(ref: str, revision: str, offline: bool) -> Path:
    hub.check_id(ref)
    if not _COMMIT.fullmatch(revision):
        raise SourceError(f"growth.json names no commit of {ref}")
    return _fetched(ref, revision, offline)


def _fetched(ref: str, revision: str | None, offline: bool) -> Path:
    cached = hub.cached_file(ref, revision, README)
    if cached is not None:
        return cached
    if offline or hub.offline():
        why = "--offline" if offline else "HF_HUB_OFFLINE"
        raise SourceError(f"the card of {ref} is not in the cache, and the Hub was not queried ({why})")
    remote = hub.fetch_listing(ref, revision)
    if README not in remote.sizes:
        raise SourceError(f"{ref} has no {README}")
    return hub.fetch_small_file(remote, README)


def _text(path: Path) -> str:
    try:
        with open_regular(path) as handle:
            return handle.read(4 * (MAX_METADATA + 2)).decode("utf-8-sig", errors="replace")[: MAX_METADATA + 2]
    except (SourceError, OSError) as error:
        raise SourceError(f"the source's {README} cannot be read: {error}") from None


def parse_card(ref: str, revision: str, text: str) -> SourceCard:
    """The metadata at the top of a card. Raises SourceError if there is none."""
    import yaml

    match = _BLOCK.match(text)
    if match is None:
        begun = text.lstrip().startswith("---")
        raise SourceError("the metadata of the source's card have no end" if begun else "the source's card has no metadata")
    try:
        # BaseLoader: every scalar stays a string, so that `language: no` is Norwegian; and no merge keys, which could grow without bound.
        data = yaml.load(match[1], Loader=yaml.BaseLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise SourceError("the metadata of the source's card is not valid YAML") from None
    if not isinstance(data, dict):
        raise SourceError("the metadata of the source's card is not a mapping")
    links = _matching(data.get("license_link"), _LINK)
    licenses = _matching(data.get("license"), _LICENSE)
    return SourceCard(
        ref,
        revision,
        problem=f"the source's card names several licenses: {', '.join(licenses)}" if len(licenses) > 1 else "",
        license=licenses[0] if len(licenses) == 1 else "",
        license_name=next(iter(_matching(data.get("license_name"), _LICENSE_NAME)), ""),
        license_link=_absolute(links[0], ref, revision) if links else "",
        language=_matching(data.get("language"), _LANGUAGE),
        datasets=_matching(data.get("datasets"), _DATASET),
        base_model=next((m for m in _strings(data.get("base_model")) if is_hub_id(m)), ""),
    )


def _strings(value: Any) -> list[str]:
    return [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, str)]


def _matching(value: Any, pattern: re.Pattern[str]) -> tuple[str, ...]:
    """The distinct strings of a value (one, or a list) that match `pattern`."""
    return tuple(dict.fromkeys(v for v in _strings(value) if pattern.fullmatch(v)))[:MOST]


def _absolute(link: str, ref: str, revision: str) -> str:
    """A link to a file of the source's repository as an absolute URL."""
    return link if link.startswith("https://") or not is_hub_id(ref) else f"https://huggingface.co/{ref}/blob/{revision or 'main'}/{link}"
