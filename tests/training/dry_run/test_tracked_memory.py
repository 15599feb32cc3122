"""The memory that a dry run estimates is within 15 % of what torch's memory tracker counts, optimizer step included."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
from tracked import peaks, read_case

from hf_grow.model.architecture import Architecture
from hf_grow.model.meta_model import meta_model
from hf_grow.model.param_count import count_parameters
from hf_grow.training.distributed.launch import Launch
from hf_grow.training.dry_run.dry_run import recipe_memory
from hf_grow.training.dry_run.memory import MemoryEstimate, distillation_bytes
from hf_grow.training.setup.model_setup import plan_updates, with_lora

LLAMA = {
    "model_type": "llama", "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6, "num_attention_heads": 16,
    "num_key_value_heads": 4, "vocab_size": 16000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
BLOCKS = LLAMA | {"vocab_size": 2000}
"""Weights outside the head."""
MIXTRAL = {
    "model_type": "mixtral", "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": 8000, "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
SMALL = LLAMA | {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 2000}
"""For what reads values: real tensors."""
BF16, SAVING, ACCUMULATED = {"bf16": True}, {"activation_checkpointing": True}, {"gradient_accumulation_steps": 2}
LAUNCHES = {"one": (1, "one"), "ddp": (4, "ddp"), "fsdp2": (4, "fsdp2")}


def case(launch: str, config: dict[str, Any] = LLAMA, length: int = 2048, **recipe: Any) -> dict[str, Any]:
    given = {k: recipe.pop(k) for k in ("grow", "real") if k in recipe}
    return {"config": config, "length": length, "launch": LAUNCHES[launch], "recipe": {"per_device_train_batch_size": 1, **recipe}, **given}


EWC = {"kind": "ewc", "lambda": 10, "fisher": "fisher.safetensors"}
CASES = {
    **{f"{how}, fp32": case(how) for how in LAUNCHES},
    **{f"{how}, bf16": case(how, **BF16) for how in LAUNCHES},
    **{f"{how}, bf16, checkpointing": case(how, **BF16, **SAVING) for how in LAUNCHES},
    "one, accumulated": case("one", **ACCUMULATED),
    "fsdp2, accumulated, blocks": case("fsdp2", BLOCKS, 256, **BF16, **SAVING, **ACCUMULATED),
    "fsdp2, blocks": case("fsdp2", BLOCKS, 256, **BF16, **SAVING),
    "one, EWC": case("one", regularizer=EWC),
    "fsdp2, EWC in bf16": case("fsdp2", SMALL, 512, regularizer={**EWC, "storage": "bf16"}, real=True, **BF16),
    "fsdp2, EWC proximal": case("fsdp2", SMALL, 256, regularizer={**EWC, "form": "proximal"}, real=True),
    "one, L2-SP": case("one", regularizer={"kind": "l2sp", "lambda": 1}),
    "fsdp2, SI": case("fsdp2", SMALL, 256, regularizer={"kind": "si", "lambda": 1}, real=True),
    "one, collapsed": case("one", SMALL, 256, regularizer={**EWC, "collapsed": True}, grow=("fpi", {"intermediate": 1024}), real=True),
    "one, LoRA": case("one", SMALL, 512, lora={"r": 16, "new_in_full": False}, real=True),
    "one, LoRA, bf16": case("one", SMALL, 512, lora={"r": 16, "new_in_full": False}, real=True, **BF16),
    "one, distillation": case("one", distill={"dtype": "bfloat16", "shard": False}, grow=("identity", {"layers_to": 8})),
    "fsdp2, distillation, bf16": case("fsdp2", distill={"dtype": "bfloat16", "shard": False}, grow=("identity", {"layers_to": 8}), **BF16),
    "one, experts": case("one", MIXTRAL, 256, real=True),
    "fsdp2, experts, bf16": case("fsdp2", MIXTRAL, 1024, **BF16),
    "one, warm-up of rows": case("one", SMALL, 64, warmup={"lr": 0.1}, grow=("fpi", {"intermediate": 1024}), real=True),
    "fsdp2, warm-up of rows": case("fsdp2", SMALL, 64, warmup={"lr": 0.1}, grow=("fpi", {"intermediate": 1024}), real=True),
    "one, depth": case("one", grow=("identity", {"layers_to": 8})),
}
QUICK = (
    "one, bf16", "ddp, bf16, checkpointing", "fsdp2, bf16, checkpointing", "fsdp2, accumulated, blocks", "one, EWC", "fsdp2, EWC in bf16", "fsdp2, SI",
    "one, collapsed", "one, LoRA", "one, distillation", "fsdp2, experts, bf16", "fsdp2, warm-up of rows",
)  # fmt: skip
"""The others only in slow tests."""


def estimate(given: dict[str, Any], folder: Path) -> MemoryEstimate:
    recipe, arguments, plan, config = read_case(given, folder)
    arch, launch, width = Architecture(config), Launch(*given["launch"]), 4
    model = meta_model(config)
    planned = plan_updates(model, plan, recipe)
    planned.updates.freeze(model)
    trained: Any = model if recipe.lora is None else with_lora(model, planned.new, recipe.lora)[0]
    teachers = logits = 0
    if recipe.distill is not None:
        teachers = 2 * count_parameters(Architecture(given["config"])).total
        logits = distillation_bytes(recipe.distill, config["vocab_size"], given["length"], 2, 4)
    return recipe_memory(
        recipe, arguments, arch, plan, width=width, length=given["length"], planned=planned, launch=launch, teachers=teachers, logits=logits,
        parameters=sum(p.numel() for p in trained.parameters()),
        trainable=sum(p.numel() for p in trained.parameters() if p.requires_grad),
    )  # fmt: skip


def compare(names: Collection[str], folder: Path) -> None:
    far = {}
    for name, found in zip(names, peaks([CASES[n] for n in names]), strict=True):
        ratio = estimate(CASES[name], folder / name).total / found["Total"]
        print(f"{name:32} {found['Total'] / 1e6:8.0f} MB {ratio - 1:+.1%}")
        if not 0.85 < ratio < 1.15:
            far[name] = ratio
    assert not far


def test_estimates_are_near_what_is_tracked(tmp_path: Path) -> None:
    compare(QUICK, tmp_path)


@pytest.mark.slow
def test_estimates_of_every_case(tmp_path: Path) -> None:
    compare(CASES.keys() - set(QUICK), tmp_path)


SOLAR = LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000}
LARGE = {
    "blocks of SOLAR's size": {**case("fsdp2", SOLAR, 4096, **BF16, **SAVING), "launch": (8, "fsdp2")},
    "SOLAR": {**case("fsdp2", SOLAR | {"num_hidden_layers": 48}, 4096, **BF16, **SAVING, **ACCUMULATED), "launch": (8, "fsdp2")},
    "SOLAR, whole": case("one", SOLAR | {"num_hidden_layers": 48}, 4096, regularizer={**EWC, "storage": "bf16"}, **BF16),
}


@pytest.mark.slow
def test_estimates_of_large_models(tmp_path: Path) -> None:
    for (name, given), found in zip(LARGE.items(), peaks(list(LARGE.values())), strict=True):
        total = estimate(given, tmp_path).total
        print(name, f"{found['Total'] / 1e9:.2f} GB tracked, {total / 1e9:.2f} estimated")
        assert 0.85 < total / found["Total"] < 1.15, name
