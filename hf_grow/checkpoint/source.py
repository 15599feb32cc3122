"""Opens a source checkpoint: a folder, or a repository on the Hugging Face Hub.

Planning reads config, index and weight headers, never the weights: a few hundred kilobytes for a 7B model.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from hf_grow.checkpoint import hub
from hf_grow.checkpoint.fused_experts import unfuse_experts
from hf_grow.checkpoint.hub_errors import Unreachable, cache_folder
from hf_grow.checkpoint.model_ids import ALIASES, MODELS, similar_ids, why_not_hub_id
from hf_grow.checkpoint.reader import (
    GROWTH,
    INDEX,
    SINGLE,
    TEMPLATES,
    Checkpoint,
    add_shard_tensors,
    check_index,
    no_safetensors_error,
    open_folder,
    parse_index,
)
from hf_grow.checkpoint.safetensors_header import TensorLocation
from hf_grow.common.safe_files import read_bytes, read_json, to_json
from hf_grow.common.units import format_bytes
from hf_grow.errors import InputError, SourceError
from hf_grow.model.config_compat import portable_tokenizer_config

CONFIG = "config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
MAX_COMPANION_BYTES = 1 << 30

COMPANIONS = (
    "tokenizer.json",
    "tokenizer.model*",  # Mistral's repositories have tokenizer.model.v3
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "*.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
    f"{TEMPLATES}/*.jinja",
    "generation_config.json",
    "*.py",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
)
"""Files that are copied to a grown checkpoint; case-insensitive. The model card is not: the grown model gets its own."""

# Never copied: weights and pickles of any name, and the scripts that DeepSpeed adds to its checkpoints.
EXCLUDED = (
    "zero_to_fp32.py",
    "zero_to_torch.py",
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".pkl",
    ".pickle",
    ".h5",
    ".msgpack",
    ".gguf",
    ".onnx",
    ".npz",
    ".npy",
)


def open_source(
    ref: str, *, revision: str | None = None, weights: bool, notify: Callable[[str], None] = lambda message: None
) -> Checkpoint:
    """Opens a checkpoint: a folder, or a Hub id.

    Args:
        revision: branch, tag or commit on the Hub.
        weights: download the weights; without, only config, index and headers are read.
        notify: called with messages for the user.

    Raises SourceError if it is missing, damaged, invalid or not accessible, and InputError for a revision of a folder.
    """
    if _is_folder(ref):
        if revision:
            raise InputError(f"{ref} is a folder and has no revision {revision!r}.", hint="Remove --revision, or give a Hub id.")
        return open_folder(Path(ref).expanduser(), ref=ref)
    name = ALIASES.get(ref.lower(), ref)
    if name.lower() != ref.lower():
        notify(f"{ref} is short for {name}.")
    hub.check_id(name)
    if hub.offline():
        return _from_cache(name, revision, weights, notify)
    try:
        remote = hub.fetch_listing(name, revision)
    except Unreachable as error:
        try:
            checkpoint = _from_cache(name, revision, weights, notify)
        except SourceError:
            raise error from None
        notify(f"{error.message} Using the copy in the cache (commit {checkpoint.revision[:12]}).")
        return checkpoint
    checkpoint = _headers(remote)
    return _download(remote, checkpoint, notify) if weights else checkpoint


def with_weights(checkpoint: Checkpoint, notify: Callable[[str], None] = lambda message: None) -> Checkpoint:
    """The checkpoint with its weights on this machine: unchanged for a folder, else downloaded at its commit. Raises SourceError."""
    if checkpoint.folder is None:
        return _download(hub.fetch_listing(checkpoint.ref, checkpoint.revision), checkpoint, notify)
    if checkpoint.revision and not companions(checkpoint.folder):
        notify(f"The cached copy of {checkpoint.ref} has no tokenizer; the grown checkpoint will have none either.")
    return checkpoint


def prefer_cached(checkpoint: Checkpoint) -> Checkpoint:
    """The cached copy of a checkpoint on the Hub if all its weights are cached; else the checkpoint itself."""
    if checkpoint.folder is not None or not all(hub.cached_file(checkpoint.ref, checkpoint.revision, f) for f in checkpoint.files):
        return checkpoint
    return replace(_from_cache(checkpoint.ref, checkpoint.revision, False, lambda message: None), donors=checkpoint.donors)


def fetch_companions(checkpoint: Checkpoint) -> Path:
    """Downloads config and companion files of a checkpoint on the Hub, without weights; returns their folder. Raises SourceError."""
    remote = hub.fetch_listing(checkpoint.ref, checkpoint.revision)
    return hub.download(remote, [f for f in remote.sizes if f == CONFIG or is_companion(f)])


def is_companion(path: str) -> bool:
    """Whether a file, by its path relative to the checkpoint, is copied to a grown checkpoint."""
    # fnmatch's * also matches slashes, but LICENSE* must not match inside a folder LICENSES
    return not path.lower().endswith(EXCLUDED) and any(
        pattern.count("/") == path.count("/") and fnmatchcase(path.lower(), pattern.lower()) for pattern in COMPANIONS
    )


def companions(folder: Path) -> list[Path]:
    """Relative paths of the companion files in `folder`, without links that point outside (except into the Hub cache)."""
    candidates = [Path(n) for n in os.listdir(folder)]
    candidates += [Path(p.parent.name, p.name) for p in folder.glob("*/*") if p.parent.name == TEMPLATES]
    return sorted(p for p in candidates if is_companion(p.as_posix()) and (folder / p).is_file() and is_contained(folder, folder / p))


def companion_bytes(path: Path) -> bytes:
    """The content to copy: unchanged, except that tokenizer_config.json is made readable by older versions."""
    data = read_bytes(path, max_bytes=MAX_COMPANION_BYTES)
    if path.name != TOKENIZER_CONFIG:
        return data
    try:
        config = read_json(path)
    except SourceError:  # unusable for any reader, and not needed for growth
        return data
    portable = portable_tokenizer_config(config)
    return data if portable == config else to_json(portable).encode()


def is_contained(folder: Path, path: Path) -> bool:
    """Whether a path, links resolved, is inside `folder`, or is a link of the Hub cache into its own blobs."""
    if path.resolve().is_relative_to(folder.resolve()):
        return True
    if folder.parent.name != "snapshots" or not path.is_symlink():
        return False
    # Files of a snapshot are links into ../../blobs. Only the first link counts: a blob may be a link into a store shared by repositories.
    target = Path(os.path.normpath(path.parent.resolve() / os.readlink(path)))
    return target.parent == folder.resolve().parent.parent / "blobs"


def _is_folder(ref: str) -> bool:
    path = os.path.expanduser(ref)
    if os.path.isdir(path):
        return True
    if os.path.isfile(path):
        if ref.endswith(".gguf"):
            raise no_safetensors_error([os.path.basename(path)], os.path.dirname(path) or ".")
        raise SourceError(f"{ref} is a file.", hint=f"Give the folder of the whole checkpoint, as in {os.path.dirname(ref) or '.'}.")
    if "://" in ref:
        raise SourceError(f"{ref} is a URL.", hint="Give only the id of the Hub repository: OWNER/NAME.")
    why = "" if ref.lower() in ALIASES or ref in MODELS else why_not_hub_id(ref)
    if why:
        raise SourceError(f"There is no folder {ref!r}{why}", hint=_suggestion(path))
    return False


def _suggestion(path: str) -> str:
    """A hint for a folder that was not found: similar names next to it, or on the Hub."""
    parent, name = os.path.split(path.rstrip("/"))
    try:
        folders = sorted(e.name for e in os.scandir(parent or ".") if e.is_dir() and not e.name.startswith("."))
    except OSError:
        folders = []
    similar = [os.path.join(parent, n) for n in difflib.get_close_matches(name, folders, 1, 0.75)] + similar_ids(path.strip("/"), 1)
    return f"Did you mean {' or '.join(similar)}?" if similar else "Check the path; a Hub id has the form OWNER/NAME."


def _headers(remote: hub.Listing) -> Checkpoint:
    """The checkpoint of a commit, from config, index and headers."""
    ref, names = remote.ref, remote.sizes
    if SINGLE not in names and INDEX not in names:
        raise no_safetensors_error([n for n in names if "/" not in n], ref)
    if CONFIG not in names:
        raise SourceError(f"{ref} is not a checkpoint: it has no {CONFIG}.")
    config = read_json(hub.fetch_small_file(remote, CONFIG), "")
    weight_map = {} if SINGLE in names else parse_index(read_json(hub.fetch_small_file(remote, INDEX), ""), f"{ref}/{INDEX}")
    shards = sorted(set(weight_map.values())) or [SINGLE]
    missing = [s for s in shards if s not in names]
    if missing:
        raise SourceError(
            f"{ref}: the index names {missing[0]}, which the repository does not have ({len(missing)} such files).",
            hint="The repository is incomplete; use another revision, or contact its owner.",
        )
    tensors: dict[str, TensorLocation] = {}
    files: dict[str, Mapping[str, object]] = {}
    with ThreadPoolExecutor(min(8, len(shards))) as pool:
        for file, (found, size) in zip(shards, pool.map(lambda shard: hub.fetch_header(remote, shard), shards), strict=True):
            add_shard_tensors(tensors, found, file, weight_map, ref)
            files[file] = _identity(size, remote.sha256.get(file))
    check_index(tensors, weight_map, ref)
    growth = read_json(hub.fetch_small_file(remote, GROWTH), "") if GROWTH in names else None
    return Checkpoint(ref, remote.commit, config, unfuse_experts(config, tensors, ref), files, None, growth)


def _download(remote: hub.Listing, checkpoint: Checkpoint, notify: Callable[[str], None]) -> Checkpoint:
    wanted = [f for f in remote.sizes if f in checkpoint.files or f in (CONFIG, GROWTH) or is_companion(f)]
    if SINGLE not in checkpoint.files:
        wanted.append(INDEX)
    size = hub.download_size(remote, wanted)
    if size:
        notify(f"Downloading {format_bytes(size)} of {remote.ref} to {cache_folder()}.")
    return _snapshot(hub.download(remote, wanted), remote.ref, remote.commit, remote.sha256)


def _snapshot(folder: Path, ref: str, commit: str, sha256: Mapping[str, str]) -> Checkpoint:
    checkpoint = open_folder(folder, ref=ref, revision=commit)
    known = {file: sha256.get(file) or hub.blob_sha256(folder / file) for file in checkpoint.files}
    # The SHA-256 replaces the modification time, so that a plan made from headers only has the same fingerprint.
    return replace(
        checkpoint, files={f: _identity(entry["size"], known[f]) if known[f] else entry for f, entry in checkpoint.files.items()}
    )


def _identity(size: int, sha256: str | None) -> dict[str, int | str]:
    return {"size": size, "sha256": sha256} if sha256 else {"size": size}


def _from_cache(ref: str, revision: str | None, weights: bool, notify: Callable[[str], None]) -> Checkpoint:
    """A checkpoint from the Hub cache. Raises SourceError if it is incomplete there."""
    config = hub.cached_file(ref, revision, CONFIG)
    if config is None:
        raise _not_cached_error(f"{ref}{f' at revision {revision}' if revision else ''} is not in the cache", ref, revision)
    folder = config.parent
    missing = [SINGLE]
    if (folder / SINGLE).is_file():
        missing = []
    elif (folder / INDEX).is_file():
        shards = set(parse_index(read_json(folder / INDEX, ""), f"{ref}/{INDEX}").values())
        missing = sorted(s for s in shards if not (folder / s).is_file())
    if missing:
        raise _not_cached_error(f"the cached copy of {ref} (commit {folder.name[:12]}) lacks {_list_some(missing)}", ref, revision)
    if weights and not companions(folder):
        notify(f"The cached copy of {ref} has no tokenizer; the grown checkpoint will have none either.")
    return _snapshot(folder, ref, folder.name, {})


def _not_cached_error(what: str, ref: str, revision: str | None) -> SourceError:
    return SourceError(
        f"HF_HUB_OFFLINE is set, and {what}.",
        hint=f"Unset HF_HUB_OFFLINE, or download it first: hf download {ref}{f' --revision {revision}' if revision else ''}",
    )


def _list_some(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more files" if len(names) > most else "")
