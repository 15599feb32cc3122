"""What a plan knows of a source checkpoint: config, tensor headers and files, no weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from hf_grow.growth.tensormap import Shape, Source
from hf_grow.model.architecture import Architecture

DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}
"""Safetensors dtype -> bytes per value."""
DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
"""Safetensors dtype -> torch dtype."""


@dataclass(frozen=True)
class TensorInfo:
    """Dtype (a safetensors name such as BF16) and shape of a tensor."""

    dtype: str
    shape: Shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    @staticmethod
    def from_json(dtype: Any, shape: Any) -> TensorInfo:
        """From untrusted data. Raises ValueError."""
        if dtype not in DTYPE_BYTES or not isinstance(shape, list) or not all(isinstance(n, int) for n in shape):
            raise ValueError(f"{str(dtype)[:40]} {str(shape)[:40]} is not a tensor")
        return TensorInfo(dtype, tuple(shape))


@dataclass(frozen=True)
class SourceInfo:
    """A source checkpoint without its weights: its config and the headers of its files."""

    ref: str
    """Folder or Hub id, as the user gave it."""
    revision: str
    """Hub commit; empty for a folder."""
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Weight files: size, and what identifies their content (SHA-256 from the Hub, modification time of a local file)."""
    history: tuple[Mapping[str, Any], ...] = ()
    """Earlier growths of this checkpoint, oldest first."""
    donors: Mapping[str, SourceInfo] = field(default_factory=dict)
    """Additional source checkpoints by their labels (`Source.checkpoint`)."""
    head: Literal["", "equal", "own"] = ""
    """A stored head although config.json ties it: 'equal' to the embedding, or its 'own' (`config` is then untied); empty if not compared."""

    @cached_property
    def architecture(self) -> Architecture:
        return Architecture(self.config)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights, without `others`."""
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def refs(self) -> str:
        """The names of all source checkpoints, for display."""
        return ", ".join([self.ref, *(other.ref for other in self.donors.values())])

    @cached_property
    def by_key(self) -> Mapping[str, TensorInfo]:
        """Tensors of all source checkpoints by `Source.key`."""
        more = {Source(n, label).key: t for label, other in self.donors.items() for n, t in other.tensors.items()}
        return {**self.tensors, **more}

    @cached_property
    def scope_shapes(self) -> Mapping[str, Shape]:
        return {key: t.shape for key, t in self.by_key.items()}

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {
            "ref": self.ref,
            "revision": self.revision,
            "config": dict(self.config),
            "files": {k: dict(v) for k, v in self.files.items()},
            "tensors": {n: [t.dtype, list(t.shape)] for n, t in self.tensors.items()},
            "history": [dict(h) for h in self.history],
        }
        return data | ({"others": {label: other.to_json() for label, other in self.donors.items()}} if self.donors else {})

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> SourceInfo:
        """From untrusted data. Raises KeyError, TypeError or ValueError."""
        tensors = {n: TensorInfo.from_json(d, shape) for n, (d, shape) in data["tensors"].items()}
        files = {k: dict(v) for k, v in data["files"].items()}
        others = {str(label): SourceInfo.from_json(other) for label, other in data.get("others", {}).items()}
        return SourceInfo(data["ref"], data["revision"], dict(data["config"]), tensors, files, tuple(map(dict, data["history"])), others)
