"""Reads a saved LoRA adapter with a strict schema.

peft passes adapter_config.json on unchecked: `megatron_core` names a module to import, and `target_modules` may be any regular expression. So only
the keys that merging needs are read, with their types; any other key with an effect is refused; and the updated modules and their ranks are read
from the names and shapes of the weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from hf_grow.checkpoint.safetensors_header import read_file_header
from hf_grow.common.safe_files import read_json
from hf_grow.errors import InputError, SourceError
from hf_grow.options import Options, parse

ADAPTER, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

IGNORED = {
    "auto_mapping", "peft_version", "revision", "task_type", "inference_mode", "lora_dropout", "megatron_core", "qalora_group_size",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
}  # fmt: skip
"""Keys without an effect on the merged weights, or redundant to the names of the weights."""
PLAIN_INITIALIZATIONS = (True, False, "gaussian", "orthogonal")
"""Values of init_lora_weights that leave the base model unchanged; the others subtract from it."""
_PLAIN = re.compile(r"\^?[A-Za-z0-9_.]{1,500}")
_UPDATE = re.compile(r"base_model\.model\.(.+?)\.lora_(A|embedding_A)(?:\.weight)?")


class AdapterConfig(Options):
    """The keys of adapter_config.json that merging needs, under peft's names."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    peft_type: Literal["LORA"]
    base_model_name_or_path: str | None = None
    r: Annotated[int, Field(ge=1)] = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    lora_bias: bool = False
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(default={})
    alpha_pattern: dict[str, float] = Field(default={})
    modules_to_save: list[str] | None = None
    layer_replication: Any = None


@dataclass(frozen=True)
class Adapter:
    """An adapter with a valid config and weights that match it."""

    folder: Path
    config: AdapterConfig
    modules: tuple[str, ...]
    """Updated modules of the model, by their full names."""
    layers: tuple[int, ...] | None
    """Source layer of every layer, if the adapter has `layer_replication`."""

    def to_json(self) -> dict[str, Any]:
        """For growth.json."""
        parts = sorted({m.rpartition(".")[2] for m in self.modules})
        c = self.config
        return {"r": c.r, "lora_alpha": c.lora_alpha, "target_modules": parts, "layer_replication": c.layer_replication}

    def lora_config_arguments(self) -> dict[str, Any]:
        """Arguments of LoraConfig, without `layer_replication`: the base model has these layers already."""
        arguments = self.config.model_dump(exclude={"peft_type", "base_model_name_or_path", "layer_replication"})
        return {**arguments, "target_modules": list(self.modules), "task_type": "CAUSAL_LM"}


def read_adapter(folder: Path) -> Adapter:
    """The adapter in ``folder``. Raises SourceError if there is none, if it is damaged, or if it needs what cannot be merged."""
    data = read_json(folder / ADAPTER, f"{folder} is not an adapter: {ADAPTER} is missing.")
    if data.get("peft_type") != "LORA":
        raise SourceError(f"{folder} is not a LoRA adapter.", hint="hf-grow merges LoRA only.")
    known = {k: v for k, v in data.items() if k in AdapterConfig.model_fields and v is not None}
    initialization = data.get("init_lora_weights")
    unsupported = [
        k
        for k, v in data.items()
        if k not in AdapterConfig.model_fields and k not in IGNORED and k != "init_lora_weights" and _has_effect(v)
    ]
    if unsupported:
        raise SourceError(
            f"{folder / ADAPTER} sets {', '.join(sorted(unsupported)[:6])}, which hf-grow cannot merge.",
            hint="Merge it with peft, if you trust it.",
        )
    if initialization is not None and not any(
        initialization is p or (isinstance(p, str) and initialization == p) for p in PLAIN_INITIALIZATIONS
    ):
        raise SourceError(
            f"{folder / ADAPTER} has init_lora_weights {initialization!r}, which changes the base model too.",
            hint="Save it again with save_pretrained(DIR, path_initial_model_for_weight_conversion=...), which makes it plain LoRA.",
        )
    try:
        config = parse(AdapterConfig, known, where=str(folder / ADAPTER))
    except InputError as error:
        raise SourceError(error.message, hint=error.hint) from None
    patterns = [p for p in (*config.rank_pattern, *config.alpha_pattern, *(config.modules_to_save or ())) if not _PLAIN.fullmatch(p)]
    if patterns:
        raise SourceError(f"{folder / ADAPTER} has the module pattern {patterns[0][:80]!r}; only plain names are supported.")
    return Adapter(folder, config, _updated_modules(folder, config), replicated_layers(config.layer_replication))


def _has_effect(value: Any) -> bool:
    """Whether a value of an unknown key is other than null, false, zero or empty, or a mapping of such values."""
    return any(map(_has_effect, value.values())) if isinstance(value, Mapping) else bool(value)


def _updated_modules(folder: Path, config: AdapterConfig) -> tuple[str, ...]:
    """The modules with weights. Raises SourceError if a rank differs from the config's, by which peft allocates memory."""
    if not (folder / WEIGHTS).is_file():
        raise SourceError(f"{folder} has no {WEIGHTS}.", hint="Pickled adapters are not loaded: save it again with peft.")
    ranks: dict[str, int] = {}
    for name, stored in read_file_header(folder / WEIGHTS)[0].items():
        if (match := _UPDATE.fullmatch(name)) and stored.shape:
            ranks[match[1]] = stored.shape[0]
    if not ranks:
        raise SourceError(f"{folder / WEIGHTS} contains no LoRA weights.")
    for module, rank in ranks.items():
        expected = next((r for p, r in config.rank_pattern.items() if _rank_pattern_matches(p, module)), config.r)
        if rank != expected:
            raise SourceError(f"{folder / WEIGHTS} has rank {rank} for {module}, but {ADAPTER} has {expected}.")
    return tuple(ranks)


def _rank_pattern_matches(pattern: str, module: str) -> bool:
    """Whether a key of rank_pattern matches a module, as in peft: the full name after ^, else a suffix of whole parts."""
    return module == pattern[1:] if pattern.startswith("^") else f".{module}".endswith(f".{pattern}")


def replicated_layers(pairs: Any) -> tuple[int, ...] | None:
    """The layers of `layer_replication` ([[0, 3], [1, 4]], ends excluded); None for None. Raises SourceError for another value."""
    if pairs is None:
        return None
    valid = isinstance(pairs, list) and all(
        isinstance(p, list)
        and len(p) == 2
        and all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 100_000 for i in p)
        and p[0] < p[1]
        for p in pairs
    )
    if not valid or not pairs:
        raise SourceError(f"layer_replication {str(pairs)[:80]} is not a list of [start, end] pairs.")
    if sum(stop - start for start, stop in pairs) > 100_000:
        raise SourceError("layer_replication makes more than 100,000 layers.")
    return tuple(i for start, stop in pairs for i in range(start, stop))
