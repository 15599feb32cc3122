"""Writes the files of a grown folder other than its weights."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_grow._version import __version__
from hf_grow.checkpoint.partial_folder import PartialFolder
from hf_grow.checkpoint.provenance import format_growth_json
from hf_grow.checkpoint.reader import GROWTH, INDEX, Checkpoint
from hf_grow.checkpoint.safetensors_header import TensorLocation
from hf_grow.checkpoint.source import companions
from hf_grow.checkpoint.writer import Shard, build_index
from hf_grow.growth.plan import GrowthPlan, training_lists


def write_metadata(
    plan: GrowthPlan, companion_folder: Path, folder: PartialFolder, shards: Sequence[Shard], hashes: Mapping[str, str]
) -> set[str]:
    """Writes config, index and growth.json, and copies the companion files of `companion_folder`. Returns the names of all files of the output."""
    files = {s.file for s in shards} | {"config.json", GROWTH}
    for relative in companions(companion_folder):
        folder.copy_companion(companion_folder, relative)
        files.add(relative.parts[0])
    folder.write_json("config.json", plan.growth.config)
    index = build_index(shards)
    if index:
        folder.write_json(INDEX, index)
        files.add(INDEX)
    record = growth_record(plan, {s.file: {"size": s.size, "sha256": hashes[s.file]} for s in shards})
    folder.write_file(GROWTH, format_growth_json(record).encode())
    return files


def growth_record(plan: GrowthPlan, files: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """growth.json of a plan that was carried out. ``files``: size and digest of each weight file; empty for a growth that was not written."""
    record = plan.to_json()
    record["target"]["files"] = files
    record["growth"]["training"] = training_lists(plan)
    record["made_by"] = versions()  # no time: equal plans give equal bytes
    return record


def unwritten_checkpoint(plan: GrowthPlan, source: Checkpoint) -> Checkpoint:
    """The target of a plan as a checkpoint without weight files, in the source's folder (tokenizer, license)."""
    tensors = {n: TensorLocation("", t.dtype, t.shape, 0, 0) for n, t in plan.targets.items()}
    return Checkpoint(source.ref, source.revision, plan.growth.config, tensors, {}, source.folder, growth_record(plan, {}))


def versions() -> dict[str, str]:
    """Versions of hf-grow, Python and the libraries, without importing them."""
    out = {"hf_grow": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "safetensors", "numpy"):
        try:
            out[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return out
