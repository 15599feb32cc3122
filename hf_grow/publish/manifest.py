"""What of a folder is published, and whether it may be.

Refused: what is not whole, what its own record contradicts, what failed its verification. Left out, and named: the state of a training run,
pickles, weights that no index knows, hidden files, names with control characters or that are no UTF-8.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from hf_grow.checkpoint.partial_folder import JOURNAL
from hf_grow.checkpoint.provenance import recorded_files, told, total, trainings
from hf_grow.checkpoint.reader import GROWTH, SINGLE, open_folder
from hf_grow.checkpoint.source import NEVER, is_inside
from hf_grow.checkpoint.writer import Progress
from hf_grow.errors import InputError, VerificationError
from hf_grow.growth.plan import check_source

CARD = "README.md"
TRAINING = (
    "trainer_state.json",
    "training.json",
    "events.jsonl",
    "checkpoint-*",
    "runs",
    "wandb",
    "logs",
)  # optimizer.pt and its like are pickles
HIDDEN_BUT_PUBLIC = (".gitattributes", ".eval_results")  # the Hub reads evaluation results from the latter


@dataclass(frozen=True)
class Cargo:
    """The files of one model, and what its growth.json says."""

    folder: Path
    files: Mapping[str, Path]
    """Path in the repository -> file."""
    weights: tuple[str, ...]
    left_out: tuple[str, ...]
    growth: Mapping[str, Any] | None
    sha256: dict[str, str] = field(default_factory=dict)
    """Of the weight files; filled by `check_content`."""

    @property
    def nbytes(self) -> int:
        return sum(path.stat().st_size for path in self.files.values())

    @property
    def weight_nbytes(self) -> int:
        return sum(self.files[name].stat().st_size for name in self.weights)

    @property
    def title(self) -> str:
        """First line of the commit."""
        try:
            assert self.growth is not None
            trained = told(total(trainings(self.growth)))
            return title_of(self.growth["growth"]["method"], self.growth["source"]["ref"]) + (f", {trained}" if trained else "")
        except (AssertionError, KeyError, TypeError):
            return "Upload with hf-grow"

    @property
    def doubts(self) -> list[str]:
        """What a publisher should know, though nothing forbids it."""
        if self.growth is None:
            return []
        found = [] if self.growth.get("verification") else [f"It was not verified; `hf-grow verify SOURCE {self.folder}` does that."]
        source = self.growth.get("source")
        found += path_shown(str(source.get("ref", "")) if isinstance(source, dict) else "")
        shown = sorted({p for stage in trainings(self.growth) for p in _paths({k: stage.get(k) for k in ("model", "recipe", "data")})})
        more = f" and {len(shown) - 1} more" if len(shown) > 1 else ""
        return found + (
            [f"{GROWTH} will show your path {shown[0]}{more}, under training; edit them there to change that."] if shown else []
        )


def title_of(method: str, ref: str) -> str:
    return f"{method} growth of {Path(ref).name} with hf-grow"


def path_shown(ref: str, *, change: str = "edit source.ref to change that") -> list[str]:
    """What to say where a record names a folder of this machine."""
    return [f"{GROWTH} will show your path {ref}; {change}."] if ref.startswith(("/", "~", ".")) else []


def _paths(value: Any, depth: int = 0) -> Iterator[str]:
    """The paths of this machine in a part of a record."""
    if isinstance(value, str):
        yield from [value] if value.startswith(("/", "~")) else []
    elif isinstance(value, dict | list) and depth < 20:
        for inside in value.values() if isinstance(value, dict) else value:
            yield from _paths(inside, depth + 1)


def survey(folder: Path) -> Cargo:
    """The cargo of a checkpoint folder, from names, headers and growth.json. Raises InputError, SourceError or VerificationError."""
    if folder.name.endswith(".partial") or (folder / JOURNAL).exists():
        raise InputError(f"{folder} is not finished.", hint="Repeat the command that began it with --resume, then publish the result.")
    checkpoint = open_folder(folder)
    check_source(checkpoint.info)
    _check_record(checkpoint.growth, {f: int(facts["size"]) for f, facts in checkpoint.files.items()})
    files: dict[str, Path] = {}
    left_out: list[str] = []
    for root, folders, names in os.walk(folder):
        here = Path(root)
        for name in sorted(folders):
            if _is_private(name) or (here / name).is_symlink():
                folders.remove(name)
                left_out.append(_told(f"{(here / name).relative_to(folder).as_posix()}/"))
        for name in names:
            path = here / name
            relative = path.relative_to(folder).as_posix()
            weight = relative in checkpoint.files
            if weight or not (_is_private(name) or name.lower().endswith(NEVER) or not is_inside(folder, path) or not path.is_file()):
                files[relative] = path
            else:
                left_out.append(_told(relative))
    return Cargo(folder, dict(sorted(files.items())), tuple(checkpoint.files), tuple(sorted(left_out)), checkpoint.growth)


def check_content(cargo: Cargo, progress: Progress = lambda nbytes: None) -> None:
    """Reads the weights once for their SHA-256. Raises VerificationError if growth.json records others."""
    from hf_grow.checkpoint.transfer import sha256_of

    recorded = recorded_files(cargo.growth)
    for name in cargo.weights:
        cargo.sha256[name] = sha256_of(cargo.files[name], progress)
        if name in recorded and recorded[name].get("sha256", cargo.sha256[name]) != cargo.sha256[name]:
            raise _changed(name)


def _told(name: str) -> str:
    return name if name.isprintable() else ascii(name)[1:-1]


def _is_private(name: str) -> bool:
    hidden = name.startswith(".") and name not in HIDDEN_BUT_PUBLIC
    return hidden or not name.isprintable() or name.endswith(".partial") or any(fnmatchcase(name, pattern) for pattern in TRAINING)


def _check_record(growth: Mapping[str, Any] | None, sizes: Mapping[str, int]) -> None:
    recorded = recorded_files(growth)
    for name in recorded.keys() | (sizes.keys() if recorded else set()):
        if name not in recorded or recorded[name].get("size") != sizes.get(name):
            raise _changed(name)
    verification = (growth or {}).get("verification")
    if isinstance(verification, dict) and not verification.get("ok"):
        checks = verification.get("checks")
        checks = [c for c in checks if isinstance(c, dict)] if isinstance(checks, list) else []
        failed = ", ".join(str(c.get("name"))[:40] for c in checks if c.get("status") == "fail")
        raise VerificationError(
            f"This growth failed its verification ({failed or 'see ' + GROWTH}).",
            hint="Grow it again; a model that is not what its record says is not published.",
        )


def _changed(name: str) -> VerificationError:
    return VerificationError(
        f"{name if name != SINGLE else 'The weight file'} is not the one that {GROWTH} records.",
        hint=f"It was changed since. A model that was trained with something else is saved to a folder of its own, without this {GROWTH}.",
    )
