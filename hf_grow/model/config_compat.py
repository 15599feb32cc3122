"""config.json and tokenizer_config.json that transformers 4.x and 5.x, vLLM and llama.cpp can all read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_grow.errors import SourceError
from hf_grow.model.architecture import Architecture
from hf_grow.model.family import Config


def portable_config(config: Config) -> dict[str, Any]:
    """`config` with both old and new spellings of its keys.

    transformers 5 writes rope_parameters / dtype instead of rope_theta / rope_scaling / torch_dtype; 4.x ignores the new keys and silently uses
    the default theta. head_dim is made explicit, since old readers derive it from hidden_size. Raises SourceError as `Architecture` does.
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
    """tokenizer_config.json that transformers 4.x reads as well.

    transformers 5 names the class TokenizersBackend, which 4.x does not know; both know PreTrainedTokenizerFast. A list under
    extra_special_tokens is an error in 4.x; both read additional_special_tokens.
    """
    out = dict(config)
    if out.get("tokenizer_class") == "TokenizersBackend":
        out["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(out.get("extra_special_tokens"), list):
        out.setdefault("additional_special_tokens", out.pop("extra_special_tokens"))
    return out


def _rope(arch: Architecture) -> dict[str, Any]:
    """Rotary settings in both spellings. As in transformers, rope_scaling overrides rope_parameters, and a theta inside them the outer one."""
    given = arch.get("rope_scaling") or arch.get("rope_parameters") or {}
    if not isinstance(given, Mapping):
        raise SourceError(f"config.json: the rotary settings must be an object, got {str(given)[:80]}.")
    scaling = dict(given)
    theta = scaling.pop("rope_theta", arch.get("rope_theta"))
    old_type = scaling.pop("type", "default")
    scaling.setdefault("rope_type", old_type)
    is_default = scaling["rope_type"] == "default"
    return {
        "rope_theta": theta,
        **({} if is_default else {"rope_scaling": scaling}),  # transformers 5 warns about the key even if it is null
        "rope_parameters": {"rope_theta": theta, **({"rope_type": "default"} if is_default else scaling)},
    }
