"""Opens an untrusted checkpoint folder: reads and validates config, index and safetensors headers."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from hf_grow.checkpoint.fused_experts import unfuse_experts
from hf_grow.checkpoint.provenance import growth_history
from hf_grow.checkpoint.safetensors_header import TensorLocation, check_name, read_file_header
from hf_grow.checkpoint.transfer import file_sha256
from hf_grow.common.safe_files import check_no_special_files, error_text, open_regular, read_json
from hf_grow.errors import SourceError
from hf_grow.growth.plan import EMBEDDING, HEAD
from hf_grow.growth.source_info import SourceInfo

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
GROWTH = "growth.json"
SHARDED_WEIGHTS = ("weights", "pytorch_model_fsdp_0")
"""Subfolders with the weights of a checkpoint of a sharded training: of `hf-grow train`, and of accelerate."""
TEMPLATES = "additional_chat_templates"
CHUNK_SIZE = 1 << 20
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint with validated config and headers; the weights are not read."""

    ref: str
    """Folder or Hub id, as the user named it."""
    revision: str
    """Commit on the Hub; empty for a folder."""
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorLocation]
    files: Mapping[str, Mapping[str, Any]]
    """Weight file -> size in bytes, and SHA-256 (Hub) or modification time (folder)."""
    folder: Path | None = None
    """Folder of the weights; None if they are only on the Hub."""
    growth: Mapping[str, Any] | None = None
    """Content of growth.json, if there is one."""
    donors: Mapping[str, Checkpoint] = field(default_factory=dict)
    """Further checkpoints that a growth reads, by label."""
    head: Literal["", "equal", "own"] = ""
    """See `SourceInfo.head`; `config` is corrected accordingly."""

    @cached_property
    def info(self) -> SourceInfo:
        donors = {label: donor.info for label, donor in self.donors.items()}
        tensors = {n: t.info for n, t in self.tensors.items()}
        return SourceInfo(self.ref, self.revision, self.config, tensors, self.files, growth_history(self.growth), donors, self.head)

    def find(self, key: str) -> tuple[Path, TensorLocation]:
        """File and location of a source tensor, by `Source.key`."""
        label, _, name = key.rpartition("::")
        checkpoint = self.donors[label] if label else self
        stored = checkpoint.tensors[name]
        return checkpoint.path(stored.file), stored

    @property
    def head_unresolved(self) -> bool:
        """Whether a stored head that config.json ties to the embedding was not yet compared with it; see `tied_heads`."""
        return not self.head and self.config.get("tie_word_embeddings") is True and self.tensors.keys() >= {HEAD, EMBEDDING}

    def with_resolved_head(self, equal: bool) -> Checkpoint:
        """The checkpoint after comparing head and embedding."""
        if equal:
            return replace(self, head="equal")
        return replace(self, head="own", config={**self.config, "tie_word_embeddings": False})

    def path(self, file: str) -> Path:
        assert self.folder is not None, "the weights are not on this machine"
        return self.folder / file


def open_folder(folder: Path, *, ref: str | None = None, revision: str = "") -> Checkpoint:
    """Reads config, index and headers of a checkpoint folder, and compares a stored tied head with the embedding. Raises SourceError."""
    try:
        return _open_folder(folder, ref or str(folder), revision)
    except OSError as error:
        raise SourceError(f"Cannot read {folder}: {error_text(error)}.") from None


def _open_folder(folder: Path, ref: str, revision: str) -> Checkpoint:
    check_no_special_files(folder, TEMPLATES)
    weight_map = _weight_map(folder, ref)  # first: adapters and GGUF folders have no config.json, but their own error
    config = read_json(folder / "config.json", f"{ref} is not a checkpoint: it has no config.json.")
    tensors: dict[str, TensorLocation] = {}
    files: dict[str, dict[str, Any]] = {}
    for file in sorted(set(weight_map.values())) if weight_map else [SINGLE]:
        header, stat = read_file_header(folder / file)
        files[file] = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        add_shard_tensors(tensors, header, file, weight_map, ref)
    check_index(tensors, weight_map, ref)
    growth = folder / GROWTH
    tensors = unfuse_experts(config, tensors, ref)
    checkpoint = Checkpoint(ref, revision, config, tensors, files, folder, read_json(growth) if os.path.lexists(growth) else None)
    return checkpoint.with_resolved_head(_same_bytes(checkpoint, HEAD, EMBEDDING)) if checkpoint.head_unresolved else checkpoint


def _same_bytes(checkpoint: Checkpoint, name: str, other: str) -> bool:
    (path, a), (other_path, b) = checkpoint.find(name), checkpoint.find(other)
    if a.info != b.info:
        return False
    with open_regular(path) as mine, open_regular(other_path) as theirs:
        return all(
            os.pread(mine.fileno(), min(CHUNK_SIZE, a.stop - at), at)
            == os.pread(theirs.fileno(), min(CHUNK_SIZE, a.stop - at), b.start + at - a.start)
            for at in range(a.start, a.stop, CHUNK_SIZE)
        )


def add_shard_tensors(
    tensors: dict[str, TensorLocation], header: Mapping[str, TensorLocation], file: str, weight_map: Mapping[str, str], ref: str
) -> None:
    """Adds the tensors of one shard to `tensors`. Raises SourceError for duplicates, and for tensors that the index assigns to another file."""
    for name, stored in header.items():
        if name in tensors or (weight_map and weight_map.get(name) != file):
            raise SourceError(
                f"{ref}: {name} is in {file}, but the index lists it in {weight_map.get(name, 'no file')}.",
                hint="The index and the shards belong to different checkpoints; download it again.",
            )
        tensors[name] = stored


def check_index(tensors: Mapping[str, TensorLocation], weight_map: Mapping[str, str], ref: str) -> None:
    """Raises SourceError if a tensor of the index is missing."""
    missing = [n for n in weight_map if n not in tensors]
    if missing:
        raise SourceError(
            f"{ref}: the index lists {missing[0]} in {weight_map[missing[0]]}, which does not contain it ({len(missing)} such tensors).",
            hint="The index and the shards belong to different checkpoints; download it again.",
        )


def parse_index(data: Mapping[str, Any], where: str) -> dict[str, str]:
    """The weight map of an index, tensor -> file. Raises SourceError if a file name could point outside the folder."""
    weight_map = data.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{where} has no weight_map.")
    for name, file in weight_map.items():
        check_name(name, where)
        if not isinstance(file, str) or not _FILE_NAME.fullmatch(file):
            raise SourceError(f"{where}: {name} is in {str(file)[:80]!r}; only names of .safetensors files in the same folder are allowed.")
    return weight_map


def _weight_map(folder: Path, ref: str) -> dict[str, str]:
    """Tensor -> file of a sharded checkpoint; empty for a single file."""
    if os.path.lexists(folder / SINGLE):
        return {}
    if os.path.lexists(folder / INDEX):
        weight_map = parse_index(read_json(folder / INDEX), str(folder / INDEX))
        for file in sorted(set(weight_map.values())):
            if not os.path.lexists(folder / file):
                raise SourceError(f"{ref}: shard {file} is missing.", hint="Download the checkpoint again, with all shards of the index.")
        return weight_map
    raise no_safetensors_error([p.name for p in folder.iterdir()], ref)


def no_safetensors_error(names: list[str], ref: str) -> SourceError:
    """The error for a checkpoint without safetensors weights, depending on the files it has."""
    if any(n.startswith("adapter_model") for n in names):
        return SourceError(f"{ref} is a PEFT adapter (LoRA), not a model.", hint=_merge_hint(ref, "adapter_model.safetensors" in names))
    if any(n in SHARDED_WEIGHTS for n in names):
        merge = shlex.join(["hf-grow", "merge", ref, "-o", f"{Path(ref).name}-merged"])
        return SourceError(f"{ref} is a checkpoint of a sharded training (FSDP2), not a plain model.", hint=f"Merge its shards: {merge}")
    if any(n.endswith((".bin", ".pt", ".pth")) for n in names):
        return SourceError(
            f"{ref} has only pickled weights (.bin), which can run code and are never loaded.",
            hint="If you trust it, convert it to safetensors: AutoModelForCausalLM.from_pretrained(ID).save_pretrained(DIR)",
        )
    if files := sorted(n for n in names if n.endswith(".gguf")):
        return SourceError(
            f"{ref} is a GGUF checkpoint; use the safetensors checkpoint it was made from.",
            hint=f"Or dequantize_command it (pip install gguf): {dequantize_command(ref, files[0])}",
        )
    return SourceError(f"{ref} has no {SINGLE} and no {INDEX}.")


def _merge_hint(ref: str, safe: bool) -> str:
    if not safe:
        return "Its weights are pickled. If you trust it, load it with peft and save it again, then: hf-grow merge ADAPTER -o OUT"
    name = Path(ref).name
    if os.path.isdir(os.path.expanduser(ref)):
        return f"Merge it first: {shlex.join(['hf-grow', 'merge', ref, '-o', f'{name}-merged'])}"
    fetch = shlex.join(["hf", "download", ref, "--local-dir", name])
    return f"Merge it first: {fetch} && {shlex.join(['hf-grow', 'merge', name, '-o', f'{name}-merged'])}"


def dequantize_command(ref: str, file: str) -> str:
    """A command that converts a GGUF file to safetensors. transformers dequantizes while loading, but refuses to save the model as long as
    hf_quantizer is set."""
    code = (
        "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
        f"d, f, out = {os.path.expanduser(ref)!r}, {file!r}, {Path(file).stem!r}; "
        "m = M.from_pretrained(d, gguf_file=f, dtype='bfloat16'); m.hf_quantizer = None; "
        "vars(m.config).pop('quantization_config', 0); m.save_pretrained(out); T.from_pretrained(d, gguf_file=f).save_pretrained(out)"
    )
    return f"python -c {shlex.quote(code)}" if "$" in code or '"' in code or "`" in code or "\\" in code else f'python -c "{code}"'


def hash_weight_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Weight file -> size and SHA-256, by which `verify` and `push` recognize the weights; reads every byte."""
    return {name: {"size": facts["size"], "sha256": file_sha256(folder / name)} for name, facts in open_folder(folder).files.items()}
