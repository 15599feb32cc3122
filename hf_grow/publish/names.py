"""Names of models and files that may be shown in public: Hub ids, and paths of this machine reduced to their last part."""

from __future__ import annotations

import re
from pathlib import Path, PureWindowsPath

_HUB_ID = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", re.ASCII)
_LOCAL_PATH = re.compile(r"[/~]|\\\\|[A-Za-z]:[\\/]")


def is_hub_id(value: object) -> bool:
    """Whether `value` has the form OWNER/NAME."""
    return isinstance(value, str) and bool(_HUB_ID.fullmatch(value)) and ".." not in value and "--" not in value


def is_local_path(text: str) -> bool:
    """Whether `text` is a path that shows folders of a machine: absolute, or in somebody's home folder."""
    return bool(_LOCAL_PATH.match(text))


def folder_name(path: str) -> str:
    """The last part of a path, POSIX or Windows."""
    return Path(PureWindowsPath(path).as_posix()).expanduser().name or "source"


def public_path(text: str) -> str:
    """`text`, with a local path reduced to ./NAME."""
    return f"./{folder_name(text)}" if is_local_path(text) else text


def public_ref(ref: str, revision: str) -> str:
    """A source without folders of this machine: the Hub id where there is a `revision` (commit), else the name of the folder."""
    return ref if revision else folder_name(ref)
