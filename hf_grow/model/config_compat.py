"""config.json and tokenizer_config.json in every spelling that their readers want."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_grow.errors import SourceError
from hf_grow.model.architecture import Architecture
from hf_grow.model.family import Config


def portable_config(config: Config) -> dict[str, Any]:
    """`config` with every spelling that readers want: transformers 4.x and 5.x, vLLM, llama.cpp's converter.

    transformers 5 writes rope_parameters / dtype and drops rope_theta / rope_scaling / torch_dtype; 4.x ignores the new keys and then
    uses default theta without a word. head_dim is made explicit: without it, an old reader derives it from hidden_size.
    """
    arch = Architecture(config)
    out = {k: v for k, v in config.items() if k not in ("_name_or_path", "transformers_version")}
    out.setdefault("architectures", [arch.family.architecture])
    out["head_dim"] = arch.size("head_dim")
    out["num_key_value_heads"] = arch.size("kv")
    out["tie_word_embeddings"] = arch.tied
    for alias, canonical in arch.family.aliases.items():
        out[alias] = out[canonical] = arch.get(canonical)
    dtype = out.get("dtype") or out.get("torch_dtype")
    if dtype:
        out["dtype"] = out["torch_dtype"] = dtype
    out.pop("rope_scaling", None)
    return {**out, **_rope(arch)}


def portable_tokenizer_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json as transformers 4.x reads it as well.

    transformers 5 names the class of a tokenizer.json TokenizersBackend, which 4.x does not know; its name there, PreTrainedTokenizerFast, is one
    that both know. A list under extra_special_tokens, an error in 4.x, is additional_special_tokens there, and 5.x reads that key too.
    """
    out = dict(config)
    if out.get("tokenizer_class") == "TokenizersBackend":
        out["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(out.get("extra_special_tokens"), list):
        out.setdefault("additional_special_tokens", out.pop("extra_special_tokens"))
    return out


def _rope(arch: Architecture) -> dict[str, Any]:
    """The rotary settings in both spellings. As transformers does, rope_scaling goes before rope_parameters, and a theta inside before one outside."""
    given = arch.get("rope_scaling") or arch.get("rope_parameters") or {}
    if not isinstance(given, Mapping):
        raise SourceError(f"config.json: the rotary settings must be an object, got {str(given)[:80]}.")
    scaling = dict(given)
    theta = scaling.pop("rope_theta", arch.get("rope_theta"))
    old_type = scaling.pop("type", "default")
    scaling.setdefault("rope_type", old_type)
    plain = scaling["rope_type"] == "default"
    return {
        "rope_theta": theta,
        **({} if plain else {"rope_scaling": scaling}),  # transformers 5 warns of the key even where it is null
        "rope_parameters": {"rope_theta": theta, **({"rope_type": "default"} if plain else scaling)},
    }
