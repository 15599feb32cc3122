"""Reading a checkpoint folder whose files are not to be trusted: config, index and the headers of the weight files."""

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
TEMPLATES = "additional_chat_templates"
PIECE = 1 << 20
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose config and headers were read and found sound. ``folder`` is None while the weights are only on the Hub."""

    ref: str
    revision: str
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorLocation]
    files: Mapping[str, Mapping[str, Any]]
    folder: Path | None = None
    growth: Mapping[str, Any] | None = None
    """The growth.json beside the weights, if it was grown."""
    donors: Mapping[str, Checkpoint] = field(default_factory=dict)
    """Further checkpoints that a growth reads, by their label."""
    head: Literal["", "equal", "own"] = ""
    """See SourceInfo; `config` says what holds, not what config.json says."""

    @cached_property
    def info(self) -> SourceInfo:
        others = {label: other.info for label, other in self.donors.items()}
        tensors = {n: t.info for n, t in self.tensors.items()}
        return SourceInfo(self.ref, self.revision, self.config, tensors, self.files, growth_history(self.growth), others, self.head)

    def find(self, key: str) -> tuple[Path, TensorLocation]:
        """The file and the place of a source tensor by `Source.key`."""
        label, _, name = key.rpartition("::")
        checkpoint = self.donors[label] if label else self
        stored = checkpoint.tensors[name]
        return checkpoint.path(stored.file), stored

    @property
    def head_unresolved(self) -> bool:
        """Whether a head is stored that config.json ties to the embedding, and nobody has compared the two; see `heads`."""
        return not self.head and self.config.get("tie_word_embeddings") is True and self.tensors.keys() >= {HEAD, EMBEDDING}

    def with_resolved_head(self, same: bool) -> Checkpoint:
        if same:
            return replace(self, head="equal")
        return replace(self, head="own", config={**self.config, "tie_word_embeddings": False})

    def path(self, file: str) -> Path:
        assert self.folder is not None, "the weights are not on this machine"
        return self.folder / file


def open_folder(folder: Path, *, ref: str | None = None, revision: str = "") -> Checkpoint:
    """Reads config, index and headers of a checkpoint folder, and a tied head where one is stored. Raises SourceError with what is wrong."""
    try:
        return _open_folder(folder, ref or str(folder), revision)
    except OSError as error:
        raise SourceError(f"Cannot read {folder}: {error_text(error)}.") from None


def _open_folder(folder: Path, ref: str, revision: str) -> Checkpoint:
    check_no_special_files(folder, TEMPLATES)
    weight_map = _weight_map(folder, ref)  # first: adapters and GGUF folders have no config.json, and a refusal of their own
    config = read_json(folder / "config.json", f"{ref} is no checkpoint: it has no config.json.")
    tensors: dict[str, TensorLocation] = {}
    files: dict[str, dict[str, Any]] = {}
    for file in sorted(set(weight_map.values())) if weight_map else [SINGLE]:
        found, stat = read_file_header(folder / file)
        files[file] = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        add_shard_tensors(tensors, found, file, weight_map, ref)
    check_index(tensors, weight_map, ref)
    growth = folder / GROWTH
    tensors = unfuse_experts(config, tensors, ref)
    checkpoint = Checkpoint(ref, revision, config, tensors, files, folder, read_json(growth) if os.path.lexists(growth) else None)
    return checkpoint.with_resolved_head(_same_bytes(checkpoint, HEAD, EMBEDDING)) if checkpoint.head_unresolved else checkpoint


def _same_bytes(checkpoint: Checkpoint, name: str, other: str) -> bool:
    (path, a), (beside, b) = checkpoint.find(name), checkpoint.find(other)
    if a.info != b.info:
        return False
    with open_regular(path) as mine, open_regular(beside) as theirs:
        return all(
            os.pread(mine.fileno(), min(PIECE, a.stop - at), at)
            == os.pread(theirs.fileno(), min(PIECE, a.stop - at), b.start + at - a.start)
            for at in range(a.start, a.stop, PIECE)
        )


def add_shard_tensors(
    into: dict[str, TensorLocation], found: Mapping[str, TensorLocation], file: str, weight_map: Mapping[str, str], ref: str
) -> None:
    """Adds a shard's tensors. Raises SourceError for one that the index puts elsewhere, or that stands twice."""
    for name, stored in found.items():
        if name in into or (weight_map and weight_map.get(name) != file):
            raise SourceError(
                f"{ref}: {name} stands in {file}, but the index puts it in {weight_map.get(name, 'no file')}.",
                hint="The index and the shards are of different checkpoints; download it again.",
            )
        into[name] = stored


def check_index(tensors: Mapping[str, TensorLocation], weight_map: Mapping[str, str], ref: str) -> None:
    absent = [n for n in weight_map if n not in tensors]
    if absent:
        raise SourceError(
            f"{ref}: the index promises {absent[0]} in {weight_map[absent[0]]}, which does not hold it ({len(absent)} such tensors).",
            hint="The index and the shards are of different checkpoints; download it again.",
        )


def parse_index(data: Mapping[str, Any], where: str) -> dict[str, str]:
    """The weight map of an index. Raises SourceError if a file name could lead out of the folder."""
    weight_map = data.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{where} has no weight_map.")
    for name, file in weight_map.items():
        check_name(name, where)
        if not isinstance(file, str) or not _FILE_NAME.fullmatch(file):
            raise SourceError(
                f"{where} points {name} at {str(file)[:80]!r}; only plain names of .safetensors files in the same folder are allowed."
            )
    return weight_map


def _weight_map(folder: Path, ref: str) -> dict[str, str]:
    """Name -> file for a sharded checkpoint; empty for a single file."""
    if os.path.lexists(folder / SINGLE):
        return {}
    if os.path.lexists(folder / INDEX):
        weight_map = parse_index(read_json(folder / INDEX), str(folder / INDEX))
        for file in sorted(set(weight_map.values())):
            if not os.path.lexists(folder / file):
                raise SourceError(
                    f"{ref}: shard {file} is missing.", hint="Download the checkpoint again; every shard of the index is needed."
                )
        return weight_map
    raise no_safetensors_error([p.name for p in folder.iterdir()], ref)


def no_safetensors_error(names: list[str], ref: str) -> SourceError:
    """The right refusal for a checkpoint without model.safetensors and index, by the files it has."""
    if any(n.startswith("adapter_model") for n in names):
        return SourceError(f"{ref} is a PEFT adapter (LoRA), not a model.", hint=_merged(ref, "adapter_model.safetensors" in names))
    if any(n.endswith((".bin", ".pt", ".pth")) for n in names):
        return SourceError(
            f"{ref} has only pickled weights (.bin); pickles can run code and are never loaded.",
            hint="Convert it once, where you trust it: AutoModelForCausalLM.from_pretrained(ID).save_pretrained(DIR) writes safetensors.",
        )
    if files := sorted(n for n in names if n.endswith(".gguf")):
        return SourceError(
            f"{ref} is a GGUF checkpoint; growth needs safetensors, best those that it was made from.",
            hint=f"Or dequantize_command it (pip install gguf): {dequantize_command(ref, files[0])}",
        )
    return SourceError(f"{ref} has no {SINGLE} and no {INDEX}.")


def _merged(ref: str, safe: bool) -> str:
    if not safe:
        return "Its weights are pickled. Where you trust it, load it with peft and save it again, then: hf-grow merge ADAPTER -o OUT"
    name = Path(ref).name
    if os.path.isdir(os.path.expanduser(ref)):
        return f"Merge it first: {shlex.join(['hf-grow', 'merge', ref, '-o', f'{name}-merged'])}"
    fetch = shlex.join(["hf", "download", ref, "--local-dir", name])
    return f"Merge it first: {fetch} && {shlex.join(['hf-grow', 'merge', name, '-o', f'{name}-merged'])}"


def dequantize_command(ref: str, file: str) -> str:
    """A command that makes safetensors of a GGUF file. Its weights are plain numbers once they are loaded, but transformers takes the model for
    quantized as long as hf_quantizer stands, and does not save it."""
    code = (
        "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
        f"d, f, out = {os.path.expanduser(ref)!r}, {file!r}, {Path(file).stem!r}; "
        "m = M.from_pretrained(d, gguf_file=f, dtype='bfloat16'); m.hf_quantizer = None; "
        "vars(m.config).pop('quantization_config', 0); m.save_pretrained(out); T.from_pretrained(d, gguf_file=f).save_pretrained(out)"
    )
    return f"python -c {shlex.quote(code)}" if "$" in code or '"' in code or "`" in code or "\\" in code else f'python -c "{code}"'


def hash_weight_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Weight file -> size and SHA-256, by which `verify` and `push` know the weights again; every byte is read."""
    return {name: {"size": facts["size"], "sha256": file_sha256(folder / name)} for name, facts in open_folder(folder).files.items()}
