"""The manifest of an upload: which files of a folder are published, and the checks that may refuse them.

Refused: incomplete folders, weights other than growth.json records, failed verifications. Left out, and reported: the state of a training run,
pickles, weights outside the index, hidden files, names that are not printable UTF-8.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from hf_grow.checkpoint.journal import JOURNAL
from hf_grow.checkpoint.provenance import describe_training, recorded_files, training_stages, training_totals
from hf_grow.checkpoint.reader import GROWTH, SINGLE, open_folder
from hf_grow.checkpoint.source import EXCLUDED, is_contained
from hf_grow.checkpoint.writer import Progress
from hf_grow.errors import InputError, VerificationError
from hf_grow.growth.plan import check_source
from hf_grow.publish.names import is_local_path

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
class Manifest:
    """The files of one model to publish, and its growth.json."""

    folder: Path
    files: Mapping[str, Path]
    """Path in the repository -> file."""
    weights: tuple[str, ...]
    """Names of the weight files."""
    left_out: tuple[str, ...]
    """Files and folders that are not published."""
    growth: Mapping[str, Any] | None
    """growth.json, if there is one."""
    sha256: dict[str, str] = field(default_factory=dict)
    """Weight file -> SHA-256, filled by `check_weights`."""

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
            trained = describe_training(training_totals(training_stages(self.growth)))
            return title_of(self.growth["growth"]["method"], self.growth["source"]["ref"]) + (f", {trained}" if trained else "")
        except (AssertionError, KeyError, TypeError):
            return "Upload with hf-grow"

    @property
    def warnings(self) -> list[str]:
        """What the publisher should know before uploading."""
        if self.growth is None:
            return []
        messages = [] if self.growth.get("verification") else [f"It was not verified: run `hf-grow verify SOURCE {self.folder}` first."]
        source = self.growth.get("source")
        messages += path_warnings(str(source.get("ref", "")) if isinstance(source, dict) else "")
        shown = sorted(
            {p for stage in training_stages(self.growth) for p in _local_paths({k: stage.get(k) for k in ("model", "recipe", "data")})}
        )
        more = f" and {len(shown) - 1} more" if len(shown) > 1 else ""
        return messages + (
            [f"{GROWTH} will show your path {shown[0]}{more}, under training; edit them there to change that."] if shown else []
        )


def title_of(method: str, ref: str) -> str:
    return f"{method} growth of {Path(ref).name} with hf-grow"


def path_warnings(ref: str, *, change: str = "edit source.ref to change that") -> list[str]:
    """A warning if growth.json will show a path of this machine."""
    return [f"{GROWTH} will show your path {ref}; {change}."] if ref.startswith(("/", "~", ".")) else []


def _local_paths(value: Any, depth: int = 0) -> Iterator[str]:
    """All paths of this machine in a part of a record."""
    if isinstance(value, str):
        yield from [value] if is_local_path(value) else []
    elif isinstance(value, dict | list) and depth < 20:
        for inside in value.values() if isinstance(value, dict) else value:
            yield from _local_paths(inside, depth + 1)


def make_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder, from file names, headers and growth.json. Raises InputError, SourceError or VerificationError."""
    if folder.name.endswith(".partial") or (folder / JOURNAL).exists():
        raise InputError(f"{folder} is not finished.", hint="Repeat the command that wrote it with --resume, then publish the result.")
    checkpoint = open_folder(folder)
    check_source(checkpoint.info)
    _check_record(checkpoint.growth, {f: int(facts["size"]) for f, facts in checkpoint.files.items()})
    files: dict[str, Path] = {}
    left_out: list[str] = []
    for root, folders, names in os.walk(folder):
        parent = Path(root)
        for name in sorted(folders):
            if _is_private(name) or (parent / name).is_symlink():
                folders.remove(name)
                left_out.append(_printable(f"{(parent / name).relative_to(folder).as_posix()}/"))
        for name in names:
            path = parent / name
            relative = path.relative_to(folder).as_posix()
            weight = relative in checkpoint.files
            if weight or not (_is_private(name) or name.lower().endswith(EXCLUDED) or not is_contained(folder, path) or not path.is_file()):
                files[relative] = path
            else:
                left_out.append(_printable(relative))
    return Manifest(folder, dict(sorted(files.items())), tuple(checkpoint.files), tuple(sorted(left_out)), checkpoint.growth)


def check_weights(manifest: Manifest, progress: Progress = lambda nbytes: None) -> None:
    """Computes the SHA-256 of every weight file. Raises VerificationError if growth.json records another."""
    from hf_grow.checkpoint.transfer import file_sha256

    recorded = recorded_files(manifest.growth)
    for name in manifest.weights:
        manifest.sha256[name] = file_sha256(manifest.files[name], progress)
        if name in recorded and recorded[name].get("sha256", manifest.sha256[name]) != manifest.sha256[name]:
            raise _changed_file(name)


def _printable(name: str) -> str:
    return name if name.isprintable() else ascii(name)[1:-1]


def _is_private(name: str) -> bool:
    hidden = name.startswith(".") and name not in HIDDEN_BUT_PUBLIC
    return hidden or not name.isprintable() or name.endswith(".partial") or any(fnmatchcase(name, pattern) for pattern in TRAINING)


def _check_record(growth: Mapping[str, Any] | None, sizes: Mapping[str, int]) -> None:
    recorded = recorded_files(growth)
    for name in recorded.keys() | (sizes.keys() if recorded else set()):
        if name not in recorded or recorded[name].get("size") != sizes.get(name):
            raise _changed_file(name)
    verification = (growth or {}).get("verification")
    if isinstance(verification, dict) and not verification.get("ok"):
        checks = verification.get("checks")
        checks = [c for c in checks if isinstance(c, dict)] if isinstance(checks, list) else []
        failed = ", ".join(str(c.get("name"))[:40] for c in checks if c.get("status") == "fail")
        raise VerificationError(
            f"This growth failed its verification ({failed or 'see ' + GROWTH}).",
            hint="Grow it again; a model that fails its verification is not published.",
        )


def _changed_file(name: str) -> VerificationError:
    return VerificationError(
        f"{name if name != SINGLE else 'The weight file'} is not the one that {GROWTH} records.",
        hint=f"It changed after {GROWTH} was written. Save a model trained with another tool to its own folder, without this {GROWTH}.",
    )
