"""Opens text sources: local files, or a dataset on the Hub."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_grow.checkpoint import hub
from hf_grow.checkpoint.hub_errors import Unreachable, cache_folder, read_errors
from hf_grow.checkpoint.model_ids import why_not_hub_id
from hf_grow.common.extras import require_packages
from hf_grow.common.safe_files import read_text
from hf_grow.errors import GrowError, InputError, SourceError
from hf_grow.training.config.data_options import TextOptions
from hf_grow.training.data.readers import FORMATS, choose_field, format_of, read_documents
from hf_grow.training.data.replay_files import RECORD_FILE, check_complete

if TYPE_CHECKING:
    from datasets import IterableDataset

Notify = Callable[[str], None]

_METADATA_FILES = {
    RECORD_FILE, "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "growth.json", "config.json",
}  # fmt: skip
"""Common JSON metadata files in data folders, which hold no documents."""
_README = re.compile(r"(readme|licen[cs]e|changelog|copying|notice)\b", re.IGNORECASE)
_FORMATS_HINT = f"Supported: {', '.join(FORMATS)}, all but .parquet also compressed (.gz, .bz2, .xz)."


@dataclass(frozen=True)
class TextSource:
    """Text that was located, and is read by `documents`."""

    label: str
    """The path as the user wrote it."""
    identity: Mapping[str, Any]
    """JSON data that changes whenever the documents may have changed: part of the cache key."""
    _open: Callable[[bool], IterableDataset]
    files: Sequence[Path] = ()
    """Local files in reading order; empty for a Hub dataset."""

    @property
    def nbytes(self) -> int | None:
        """Total size of the files; None for a Hub dataset."""
        return sum(f.stat().st_size for f in self.files) if self.files else None

    def documents(self, *, streaming: bool = True) -> IterableDataset:
        """{"text": str} for every document. With ``streaming=False`` a Hub dataset is downloaded first. Raises InputError, SourceError."""
        with explain_read_errors(self.label):
            return self._open(streaming)


def find_text(options: TextOptions, *, notify: Notify = lambda message: None) -> TextSource:
    """Locates the files or the Hub dataset that `options.path` names. Raises InputError if there are none, or none that can be read."""
    label = ", ".join(options.path)
    if not options.path:
        raise InputError("A text source has an empty path.")
    remote = [p for p in options.path if not _is_local(p)]
    if not remote:
        return _local(label, options)
    if len(options.path) > 1:
        raise InputError(f"{label}: a Hub dataset must be a source of its own.", hint="List it as a separate source.")
    return _on_the_hub(remote[0], options, notify)


@contextmanager
def explain_read_errors(label: str) -> Iterator[None]:
    """Turns exceptions raised while reading the source `label` into InputError or SourceError."""
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
    return bool(why_not_hub_id(path)) and ("/" in path or path.startswith((".", "~", "\\")))  # old Hub datasets have no owner


# ---- files ---------------------------------------------------------------------------------------------------------------------------


def _local(label: str, options: TextOptions) -> TextSource:
    for key in ("name", "revision", "files"):
        if getattr(options, key) is not None:
            raise InputError(f"{label}: `{key}` applies to Hub datasets only.")
    if options.split != "train":
        raise InputError(f"{label}: local files have no split {options.split!r}.", hint="Give the files of that split as path.")
    files = tuple(dict.fromkeys(file for path in options.path for file in _expand(path)))
    stats = [f.stat() for f in files]
    if not any(s.st_size for s in stats):
        raise InputError(f"{label} is empty.", hint=f"{len(files)} file{'s' * (len(files) > 1)} of 0 bytes.")
    names = [str(f) for f in files]
    reading = {"text_field": options.text_field, "limit": options.limit}

    def read(streaming: bool) -> IterableDataset:
        from datasets import Features, IterableDataset, Value

        # datasets takes a list for shards, so that a resumed stream starts at the file where it stopped. A limit counts over all files.
        return IterableDataset.from_generator(
            read_documents,
            features=Features({"text": Value("string"), "frame": Value("string")}),
            gen_kwargs={"files": names if options.limit is None else tuple(names), **reading},
        )

    identity = {"files": [[n, s.st_size, s.st_mtime_ns] for n, s in zip(names, stats, strict=True)], **reading}
    return TextSource(label, identity, read, files)


def _expand(path: str) -> list[Path]:
    """The files that a path or glob names, sorted by path. Raises InputError."""
    expanded = Path(path).expanduser()
    if expanded.is_dir():
        return _files_in(path, expanded)
    if expanded.is_file():
        if format_of(expanded) is None:
            raise InputError(f"{path} has an unsupported format.", hint=_FORMATS_HINT)
        return [expanded.absolute()]
    if glob.has_magic(path):
        matches = [Path(p).absolute() for p in sorted(glob.glob(str(expanded), recursive=True)) if Path(p).is_file()]
        if not matches:
            raise InputError(f"No file matches {path}.", hint="** matches folders of any depth, as in corpus/**/*.md.")
        unknown = next((p for p in matches if format_of(p) is None), None)
        if unknown is not None:
            raise InputError(f"{path} matches {unknown.name}, which has an unsupported format.", hint=_FORMATS_HINT)
        return matches
    raise InputError(f"There is no file or folder {path!r}.", hint="Check the path; a Hub dataset is given as OWNER/NAME.")


def _files_in(path: str, folder: Path) -> list[Path]:
    """The text files of a folder at any depth, which must all have one format. Hidden files are skipped."""
    check_complete(folder)
    by_format: dict[str, list[Path]] = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        hidden = any(part.startswith((".", "__")) for part in file.relative_to(folder).parts)
        if not hidden and file.name not in _METADATA_FILES and (kind := format_of(file)) is not None:
            by_format.setdefault(kind, []).append(file.absolute())
    if len(by_format) > 1 and "text" in by_format:
        # Beside data files a README describes them; in a folder of text files it is a document.
        by_format["text"] = [f for f in by_format["text"] if not _README.match(f.name)]
        by_format = {k: v for k, v in by_format.items() if v}
    if not by_format:
        raise InputError(f"The folder {path} contains no text files.", hint=_FORMATS_HINT)
    if len(by_format) > 1:
        counts = ", ".join(f"{len(v)} {k}" for k, v in by_format.items())
        raise InputError(f"The folder {path} contains files of several formats ({counts}).", hint=f"Use a glob, such as {path}/**/*.jsonl.")
    return next(iter(by_format.values()))


# ---- the Hub -------------------------------------------------------------------------------------------------------------------------


def _on_the_hub(ref: str, options: TextOptions, notify: Notify) -> TextSource:
    require_packages("datasets")
    if "://" in ref:
        raise InputError(f"{ref} is a URL.", hint="Give the id of the dataset alone: OWNER/NAME.")
    if ref.count("/") != 1:
        raise InputError(f"There is no file or folder {ref!r}.", hint="Check the path; a Hub dataset is given as OWNER/NAME.")
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

    selection = {k: getattr(options, k) for k in ("name", "split", "files", "text_field", "limit")}
    return TextSource(ref, {"hub": ref, "commit": commit, **selection}, read)


def _has_text(row: Mapping[str, Any]) -> bool:
    text = row["text"]
    return bool(text) and not text.isspace()


def _columns(data: IterableDataset) -> dict[str, bool]:
    """Column name -> whether it holds strings: from the features, else from the first row."""
    if data.features is not None:
        return {name: getattr(f, "dtype", None) in ("string", "large_string") for name, f in data.features.items()}
    return {name: isinstance(value, str) for name, value in next(iter(data), {}).items()}


def _commit(ref: str, revision: str | None, notify: Notify) -> str:
    """The commit hash of `revision`; if the Hub cannot be reached, the one in its cache. Raises SourceError."""
    from huggingface_hub import HfApi

    # Where huggingface_hub stores the commit that a branch last pointed to.
    cached = cache_folder() / f"datasets--{ref.replace('/', '--')}" / "refs" / (revision or "main")
    try:
        if hub.offline():
            raise Unreachable(f"{ref} is not in the cache, and HF_HUB_OFFLINE is set.", hint="Unset HF_HUB_OFFLINE.")
        with read_errors(f"datasets/{ref}", revision):
            commit = HfApi(library_name="hf-grow").dataset_info(ref, revision=revision, timeout=hub.LISTING_TIMEOUT).sha
        if not commit:
            raise SourceError(f"The Hub returned no commit for {ref}.", hint="Try again later.")
    except Unreachable:
        if not cached.is_file():
            raise
        notify(f"The Hub cannot be reached; using {ref} from the cache.")
        return read_text(cached, max_bytes=200).strip()
    with suppress(OSError):  # a read-only cache is not an error
        cached.parent.mkdir(parents=True, exist_ok=True)
        cached.write_text(commit, encoding="utf-8")
    return commit


def _explain(label: str, error: Exception) -> InputError:
    text = " ".join(str(error).split())
    if "scripts are no longer supported" in text:
        return InputError(
            f"{label} is a dataset with a loading script, and scripts are not run.",
            hint="Many have a converted branch (revision: refs/convert/parquet); otherwise convert it to Parquet or JSON Lines.",
        )
    if "Config name is missing" in text or "BuilderConfig" in text:
        return InputError(f"{label} needs another `name`: {text[:300]}")
    if "nknown split" in text or "Bad split" in text:
        return InputError(f"{label} has no such split: {text[:300]}")
    if "gated" in text or "doesn't exist on the Hub" in text:
        return SourceError(
            f"{label} cannot be accessed: it is gated or private.",
            hint="Accept its terms on its page on the Hub, then log in with `hf auth login` (or set HF_TOKEN).",
        )
    if isinstance(error, FileNotFoundError) or "Couldn't find cache" in text:
        return InputError(
            f"{label} contains no such files, or none of a supported format.", hint="`files` is a glob inside the repository."
        )
    if isinstance(error, ConnectionError):
        return SourceError(f"{label} could not be read from the Hub ({type(error).__name__}).", hint="Check the network and try again.")
    return InputError(f"{label} could not be read: {text[:300] or type(error).__name__}.")
