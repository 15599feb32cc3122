"""The trained small model, kept from one demo to the next.

Its folder is named by a digest of everything that decides its weights, so a stale one is never found; it appears by one rename, so an
interrupted demo leaves nothing that looks whole.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from hf_grow._version import __version__
from hf_grow.demo.settings import Pretraining
from hf_grow.errors import OutputError
from hf_grow.training.data.cache import default_root

__all__ = ["default_root", "fetch", "key"]


def key(settings: Pretraining, corpus_digest: str) -> str:
    """What the small model follows from: the settings, the text, and the programs that trained it."""
    parts = {
        "settings": asdict(settings),
        "corpus": corpus_digest,
        "python": list(sys.version_info[:3]),
        "versions": {"hf-grow": __version__, **{name: version(name) for name in ("torch", "transformers", "tokenizers")}},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def fetch(root: Path, name: str, make: Callable[[Path], None], *, fresh: bool = False) -> tuple[Path, bool]:
    """The cached folder `name`, and whether it was there; `make` fills a new one where it was not, or where `fresh` asks for it."""
    folder = root / "demo" / name
    if folder.is_dir() and not fresh:
        return folder, True
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"The cache {folder.parent} cannot be written: {error.strerror}.", hint="Set XDG_CACHE_HOME to a folder of yours."
        ) from None
    # Beside its final place, so that the rename stays within one file system; removed on every way out, Ctrl-C included.
    with tempfile.TemporaryDirectory(prefix=f"{name}.partial-", dir=folder.parent) as partial:
        made = Path(partial) / "made"
        made.mkdir()
        make(made)
        if folder.is_dir():
            # Out of the way in one step; whoever reads the old folder at this moment keeps its open files.
            folder.rename(Path(partial) / "old")
        made.rename(folder)
    return folder, False
