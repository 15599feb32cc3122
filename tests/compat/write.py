"""Grows tiny checkpoints of every case for check.py, and stores the logits that transformers 5 gives them. Run by `make test-compat`.

    python tests/compat/write.py FOLDER

FOLDER/CASE/GROWTH is a grown checkpoint in bf16; FOLDER/logits.safetensors holds the tokens, and the fp32 logits under CASE/GROWTH;
FOLDER/tokenizer.json a text, and what the tokenizer that transformers 5 saved beside the source of TOKENIZED makes of it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from exact import logits
from models import BY_NAME, CASES, Case, make, save, tokens

from hf_grow import api
from hf_grow.model.architecture import Architecture
from hf_grow.model.param_count import count_parameters

LENGTH = 48  # many times the sliding windows, and far enough for the rotary settings to matter
ROTARY = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
"""Far from every family's default: a reader that takes the default is seen."""
SCALED = [
    Case("llama-linear", "llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}}),
    Case("qwen2-yarn", "qwen2", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0,
                                                     "original_max_position_embeddings": 32}}),
    Case("qwen3_moe-yarn", "qwen3_moe", {**BY_NAME["qwen3_moe"].options,
                                         "rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0,
                                                             "original_max_position_embeddings": 32}}),
]  # fmt: skip
"""Long contexts, as Llama 2 and Qwen publish them; llama3 is in CASES."""

TOKENIZED = "llama"
TEXT = "a grown model <mark> reads b"

Steps = list[tuple[str, dict[str, Any]]]


def growths(arch: Architecture) -> dict[str, Steps]:
    """Names of folders -> methods with their options, one after the other."""
    kv = 10 if arch.size("group") == 1 else arch.size("kv")
    inter = "expert_intermediate" if "moe_intermediate_size" in arch.config else "intermediate"
    odd = {"hidden": 60, "heads": 10, "kv_heads": kv, inter: 50}
    hybrid = {"to": 3 * count_parameters(arch).total, "multiple_of": 4, "min_depth": arch.layers + 1, "max_depth": arch.layers + 2}
    found: dict[str, Steps] = {
        "dus": [("dus", {})],
        "identity": [("identity", {})],
        "tile-x2": [("tile", {"factor": 2})],
        "tile-odd": [("tile", odd)],
        "tile-odd-dus": [("tile", odd), ("dus", {})],
        "hybrid": [("hybrid", hybrid)],
    }
    if not arch.has_norm_over("head_dim"):  # q and k norms share rms_norm_eps
        found["tile-odd-eps"] = [("tile", {**odd, "rms_mode": "eps"})]
    if arch.is_moe:
        found["experts"] = [("experts", {"experts": 2 * arch.size("experts"), "top_k": 2 * arch.top_k})]
        found["experts-add"] = [("experts", {"add": 1, "router_noise": 0.01})]
    elif not (arch.get("attention_bias") and arch.family.model_type == "llama") and not arch.get("use_sliding_window"):
        found["experts"] = [("experts", {"experts": 4, "init": "noise"})]
        found["experts-fine"] = [("experts", {"experts": 8, "init": "fine-grained", "router": "orthogonal"})]
        found["experts-drop-identity"] = [("experts", {"experts": 3, "init": "drop"}), ("identity", {})]
    if arch.family.model_type == "qwen2_moe":  # transformers 4 wants head_dim * heads = hidden_size there
        square = arch.size("head_dim") * arch.heads == arch.size("hidden")
        found = {label: steps for label, steps in found.items() if square and "odd" not in label and label != "hybrid"}
    return found


def write(case: Case, folder: Path) -> dict[str, torch.Tensor]:
    """Grows one case in every way; the logits of the results, by CASE/GROWTH."""
    changes = {} if "rope_parameters" in case.options else ROTARY
    model = make(case, dtype=torch.bfloat16, **changes)
    first = save(model, folder / "sources" / case.name)
    if case.name == TOKENIZED:
        (folder / "tokenizer.json").write_text(json.dumps({"text": TEXT, "ids": save_tokenizer(first)}))
    found = {"tokens": tokens(model, LENGTH)}
    for label, steps in growths(Architecture(case.config)).items():
        source = first
        for at, (method, options) in enumerate(steps, 1):
            out = folder / case.name / label if at == len(steps) else folder / "sources" / f"{case.name}-{label}"
            api.grow(source, out, method, max_shard_size=100_000, **options)
            source = out
        grown = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
        )
        found[f"{case.name}/{label}"] = logits(grown.eval(), found["tokens"])
    return found


def save_tokenizer(folder: Path) -> list[int]:
    """A tokenizer with a special token of its own, saved by transformers 5; the ids of TEXT."""
    plain = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", "<s>", "a", "b", "grown", "model", "reads"])}, "<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<unk>", bos_token="<s>", extra_special_tokens=["<mark>"], add_bos_token=False
    )
    tokenizer.save_pretrained(folder)
    ids: list[int] = tokenizer(TEXT)["input_ids"]
    return ids


def main() -> None:
    folder = Path(sys.argv[1])
    stored: dict[str, torch.Tensor] = {}
    for case in [*CASES, *SCALED]:
        stored |= write(case, folder)
    save_file(stored, folder / "logits.safetensors")
    print(f"{len(stored) - 1} grown checkpoints of {len(CASES) + len(SCALED)} cases in {folder}")


if __name__ == "__main__":
    main()
