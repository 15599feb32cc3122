"""One way to open text: files on this machine, or a data set on the Hub.

A Source knows what its documents follow from (`identity`), so that what is made of them can be cached; `documents()` reads them.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_grow.checkpoint import hub
from hf_grow.checkpoint.model_ids import path_because
from hf_grow.common.extras import require_packages
from hf_grow.common.safe_files import read_text
from hf_grow.errors import GrowError, InputError, SourceError
from hf_grow.training.config.data_options import TextOptions
from hf_grow.training.data.readers import FORMATS, choose_field, format_of, read_documents
from hf_grow.training.data.replay_files import RECORD, command, read_record

if TYPE_CHECKING:
    from datasets import IterableDataset

Notify = Callable[[str], None]

_RECORDS = {RECORD, "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "growth.json", "config.json"}
"""JSON files that lie beside data and are none."""
_ABOUT = re.compile(r"(readme|licen[cs]e|changelog|copying|notice)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """Text that was found and may be read."""

    label: str
    """What the user wrote."""
    identity: Mapping[str, Any]
    """JSON data that changes whenever the documents could."""
    _open: Callable[[bool], IterableDataset]
    files: Sequence[Path] = field(default=())
    """Of a source on this machine."""

    @property
    def nbytes(self) -> int | None:
        """Size of the files; None on the Hub."""
        return sum(f.stat().st_size for f in self.files) if self.files else None

    def documents(self, *, streaming: bool = True) -> IterableDataset:
        """{"text": str} for each document. Without `streaming` a data set on the Hub is downloaded first. Raises InputError."""
        with readable(self.label):
            return self._open(streaming)


def find(options: TextOptions, *, notify: Notify = lambda message: None) -> Source:
    """What `options.path` names. Raises InputError where there is none, or none that can be read."""
    label = ", ".join(options.path)
    if not options.path:
        raise InputError("A source of text has an empty path.")
    remote = [p for p in options.path if not _is_local(p)]
    if not remote:
        return _local(label, options)
    if len(options.path) > 1:
        raise InputError(f"{label}: a data set on the Hub stands alone.", hint="Write it as a source of its own.")
    return _on_the_hub(remote[0], options, notify)


@contextmanager
def readable(label: str) -> Iterator[None]:
    """Turns what reading raises into InputError."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except GrowError:
        raise
    except (DatasetsError, OSError, ValueError, RuntimeError, NotImplementedError) as error:
        raise _explain(label, error) from None


def _is_local(path: str) -> bool:
    if Path(path).expanduser().exists() or glob.has_magic(path) or format_of(Path(path)) is not None:
        return True
    return bool(path_because(path)) and ("/" in path or path.startswith((".", "~", "\\")))  # old data sets on the Hub have no owner


# ---- files ---------------------------------------------------------------------------------------------------------------------------


def _local(label: str, options: TextOptions) -> Source:
    for key in ("name", "revision", "files"):
        if getattr(options, key) is not None:
            raise InputError(f"{label}: `{key}` is for data sets on the Hub.")
    if options.split != "train":
        raise InputError(f"{label}: files have no split {options.split!r}.", hint="Give the files of that split as path.")
    files: dict[Path, None] = {}
    for path in options.path:
        files |= dict.fromkeys(_expand(path))
    if not any(f.stat().st_size for f in files):
        raise InputError(f"{label} is empty.", hint=f"{len(files)} file{'s' * (len(files) > 1)}, no bytes.")
    names = [str(f) for f in files]

    def read(streaming: bool) -> IterableDataset:
        from datasets import Features, IterableDataset, Value

        # A list is a list of shards: reading on begins with the file it stood in. But a limit counts the documents of all files.
        return IterableDataset.from_generator(
            read_documents,
            features=Features({"text": Value("string"), "frame": Value("string")}),
            gen_kwargs={
                "files": names if options.limit is None else tuple(names),
                "text_field": options.text_field,
                "limit": options.limit,
            },
        )

    identity = {
        "files": [[n, f.stat().st_size, f.stat().st_mtime_ns] for n, f in zip(names, files, strict=True)],
        "text_field": options.text_field,
        "limit": options.limit,
    }
    return Source(label, identity, read, tuple(files))


def _expand(path: str) -> list[Path]:
    """The files that a path names, in the order of their names. Raises InputError."""
    expanded = Path(path).expanduser()
    if expanded.is_dir():
        found = sorted(p for p in expanded.rglob("*") if p.is_file() and not _hidden(p.relative_to(expanded)))
        return _of_one_kind(path, expanded, found)
    if expanded.is_file():
        if format_of(expanded) is None:
            raise InputError(f"{path} is of no known format.", hint=_formats())
        return [expanded.absolute()]
    if glob.has_magic(path):
        matches = [Path(p).absolute() for p in sorted(glob.glob(str(expanded), recursive=True))]
        matches = [p for p in matches if p.is_file()]
        if not matches:
            raise InputError(f"No file matches {path}.", hint="** stands for folders of any depth, as in corpus/**/*.md.")
        unknown = next((p for p in matches if format_of(p) is None), None)
        if unknown is not None:
            raise InputError(f"{path} matches {unknown.name}, which is of no known format.", hint=_formats())
        return matches
    raise InputError(f"There is no file or folder {path!r}.", hint="Check the path; a data set on the Hub reads OWNER/NAME.")


def _of_one_kind(path: str, folder: Path, found: Sequence[Path]) -> list[Path]:
    _check_replay(folder)
    kinds: dict[str, list[Path]] = {}
    for file in found:
        kind = format_of(file)
        if kind is not None and file.name not in _RECORDS:
            kinds.setdefault(kind, []).append(file.absolute())
    if len(kinds) > 1 and "text" in kinds:
        # Beside data, a README is about it; in a folder of documents it is one of them.
        kinds["text"] = [f for f in kinds["text"] if not _ABOUT.match(f.name)]
        kinds = {k: v for k, v in kinds.items() if v}
    if not kinds:
        raise InputError(f"The folder {path} holds no text.", hint=_formats())
    if len(kinds) > 1:
        counts = ", ".join(f"{len(v)} {k}" for k, v in kinds.items())
        raise InputError(
            f"The folder {path} holds files of several kinds ({counts}).", hint=f"Choose with a glob, as in {path}/**/*.jsonl."
        )
    return next(iter(kinds.values()))


def _check_replay(folder: Path) -> None:
    record = read_record(folder)
    if record is not None and not record["complete"]:
        raise InputError(
            f"The replay in {folder} is unfinished ({record['counts']['tokens']:,} of {record['tokens']:,} tokens).",
            hint=f"Finish it: {command(record, folder)}",
        )


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "__")) for part in path.parts)


def _formats() -> str:
    return f"Known: {', '.join(FORMATS)}, all but .parquet also compressed (.gz, .bz2, .xz)."


# ---- the Hub -------------------------------------------------------------------------------------------------------------------------


def _on_the_hub(ref: str, options: TextOptions, notify: Notify) -> Source:
    require_packages("datasets")
    if "://" in ref:
        raise InputError(f"{ref} is an address.", hint="Give the id of the data set alone: OWNER/NAME.")
    if ref.count("/") != 1:
        raise InputError(f"There is no file or folder {ref!r}.", hint="Check the path; a data set on the Hub reads OWNER/NAME.")
    hub.check_id(ref)
    commit = _commit(ref, options.revision, notify)

    def read(streaming: bool) -> IterableDataset:
        from datasets import load_dataset

        streaming = streaming or options.limit is not None
        data = load_dataset(ref, options.name, split=options.split, revision=commit, data_files=options.files, streaming=streaming)
        data = data if streaming else data.to_iterable_dataset()
        column = choose_field(ref, _columns(data), options.text_field)
        data = data.select_columns([column])
        data = data.rename_column(column, "text") if column != "text" else data
        data = data.filter(_has_text)
        return data.take(options.limit) if options.limit is not None else data

    asked = {k: getattr(options, k) for k in ("name", "split", "files", "text_field", "limit")}
    return Source(ref, {"hub": ref, "commit": commit, **asked}, read)


def _has_text(row: Mapping[str, Any]) -> bool:
    text = row["text"]
    return bool(text) and not text.isspace()


def _columns(data: IterableDataset) -> dict[str, bool]:
    """Column -> whether it holds strings. Where nothing says so, the first row does."""
    if data.features is not None:
        return {name: getattr(f, "dtype", None) in ("string", "large_string") for name, f in data.features.items()}
    return {name: isinstance(value, str) for name, value in next(iter(data), {}).items()}


def _commit(ref: str, revision: str | None, notify: Notify) -> str:
    """Which commit `revision` is; where the Hub gives no answer, the one in its cache. Raises SourceError."""
    from huggingface_hub import HfApi

    # Where the Hub's own tools note which commit a branch was when it was last asked for.
    seen = hub.cache_folder() / f"datasets--{ref.replace('/', '--')}" / "refs" / (revision or "main")
    try:
        if hub.offline():
            raise hub.Unreachable(f"The Hub is not asked (HF_HUB_OFFLINE), and {ref} is not in the cache.", hint="Unset HF_HUB_OFFLINE.")
        with hub.explained(f"datasets/{ref}", revision):
            commit = HfApi(library_name="hf-grow").dataset_info(ref, revision=revision, timeout=hub.LOOK_UP_TIMEOUT).sha
        if not commit:
            raise SourceError(f"The Hub names no commit of {ref}.", hint="Try again later.")
    except hub.Unreachable:
        if not seen.is_file():
            raise
        notify(f"The Hub gives no answer; using {ref} from the cache.")
        return read_text(seen, most=200).strip()
    with suppress(OSError):  # a cache that cannot be written is no reason to stop
        seen.parent.mkdir(parents=True, exist_ok=True)
        seen.write_text(commit, encoding="utf-8")
    return commit


def _explain(label: str, error: Exception) -> InputError:
    text = " ".join(str(error).split())
    if "scripts are no longer supported" in text:
        return InputError(
            f"{label} is a data set made by a script, and scripts are not run.",
            hint="Many have a converted branch (revision: refs/convert/parquet); else convert it to Parquet or jsonl.",
        )
    if "Config name is missing" in text or "BuilderConfig" in text:
        return InputError(f"{label} wants another `name`: {text[:300]}")
    if "nknown split" in text or "Bad split" in text:
        return InputError(f"{label} has no such split: {text[:300]}")
    if "gated" in text or "doesn't exist on the Hub" in text:
        return SourceError(
            f"{label} may not be read: it is gated, or private.",
            hint="Accept its terms on its page on the Hub, then log in with `hf auth login` (or set HF_TOKEN).",
        )
    if isinstance(error, FileNotFoundError) or "Couldn't find cache" in text:
        return InputError(f"{label} holds no such files, or none of a known format.", hint="`files` is a glob inside the repository.")
    if isinstance(error, ConnectionError):
        return SourceError(f"{label} could not be read from the Hub ({type(error).__name__}).", hint="Check the network and try again.")
    return InputError(f"{label} could not be read: {text[:300] or type(error).__name__}.")
