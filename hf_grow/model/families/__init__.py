"""The supported model families. A new one is a file beside this, a line here, and its case in the tests."""

from __future__ import annotations

from hf_grow.model.families.llama import LLAMA
from hf_grow.model.families.mistral import MISTRAL
from hf_grow.model.families.mixtral import MIXTRAL
from hf_grow.model.families.qwen2 import QWEN2
from hf_grow.model.families.qwen2_moe import QWEN2_MOE
from hf_grow.model.families.qwen3 import QWEN3
from hf_grow.model.families.qwen3_moe import QWEN3_MOE
from hf_grow.model.family import Family

FAMILIES: dict[str, Family] = {f.model_type: f for f in (LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE)}
"""By model_type."""
