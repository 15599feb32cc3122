"""FLOPs by hand: every product of matrices written out, for what trains and what does not; memory of distillation's logits; one-off passes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from models import BY_NAME, real_config
from trained import grown, recipe, run

from hf_grow.model.flops import Training, count_flops
from hf_grow.model.meta_model import meta_model
from hf_grow.training.config.distill_options import DistillOptions, Teacher
from hf_grow.training.dry_run import memory
from hf_grow.training.param_updates.param_flops import training_of
from hf_grow.training.trainer.events import EVENTS_FILE, read_events

LENGTH = 12


def parts(config: Any) -> dict[str, float]:
    """Forward FLOPs of one token: projections of a block, its attention, its FFN, the head."""
    h, size = config.hidden_size, config.head_dim or config.hidden_size // config.num_attention_heads
    q, kv = config.num_attention_heads * size, config.num_key_value_heads * size
    return {
        "projections": 2 * h * (2 * q + 2 * kv), "attention": 2 * 2 * LENGTH * q, "ffn": 2 * 3 * h * config.intermediate_size,
        "head": 2 * h * config.vocab_size,
    }  # fmt: skip


def block(p: dict[str, float]) -> float:
    return p["projections"] + p["attention"] + p["ffn"]


@pytest.mark.parametrize("case", ["llama", "llama-tied", "qwen3"])
def test_forward_and_everything_trained(case: str) -> None:
    config = real_config(BY_NAME[case])
    p = parts(config)
    once = config.num_hidden_layers * block(p) + p["head"]
    flops = count_flops(config.to_dict())
    assert (flops.forward.rows(1, LENGTH), flops.train.rows(1, LENGTH)) == (LENGTH * once, LENGTH * 3 * once)


def test_of_a_mixture_the_experts_of_a_token_count() -> None:
    config = real_config(BY_NAME["mixtral"])
    p = parts(config)
    routed = config.num_experts_per_tok * p["ffn"] + 2 * config.hidden_size * config.num_local_experts
    once = config.num_hidden_layers * (p["projections"] + p["attention"] + routed) + p["head"]
    assert count_flops(config.to_dict()).train.rows(1, LENGTH) == LENGTH * 3 * once


@pytest.mark.parametrize("what", ["head", "last block", "norms of the last block", "first block"])
def test_the_backward_pass_goes_as_far_as_something_trains(what: str) -> None:
    config = real_config(BY_NAME["llama"], num_hidden_layers=3)
    p, model = parts(config), meta_model(config.to_dict())
    once = 3 * block(p) + p["head"]
    wanted = {
        "head": ("lm_head", once + p["head"]),  # its weights; nothing before it
        # activations through the head and twice for attention's two operands; weights of the block, and activations to its first gain
        "last block": ("layers.2.", once + p["head"] + 2 * block(p)),
        "norms of the last block": ("layers.2.input_layernorm", once + p["head"] + block(p) + p["attention"]),
        "first block": ("layers.0.", once + p["head"] + 2 * block(p) + 2 * (block(p) + p["attention"])),
    }[what]
    for name, weight in model.named_parameters():
        weight.requires_grad_(wanted[0] in name)
    assert count_flops(config.to_dict(), training_of(model)).train.rows(1, LENGTH) == LENGTH * wanted[1]


def test_a_run_counts_what_its_recipe_trains_and_its_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = grown(tmp_path)
    config, source = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("grown", "source"))
    whole, teacher = count_flops(config).train.rows(1, 16) // 16, count_flops(source).forward.rows(1, 16) // 16
    tokens = 6 * 2 * 16
    assert run(capsys, "train", recipe(tmp_path, model), "--dry-run")["flops"] == whole * tokens
    path = recipe(tmp_path, model, train="new", distill={})
    dry = run(capsys, "train", path, "--dry-run")["flops"]
    assert teacher * tokens < dry < (whole + teacher) * tokens
    assert run(capsys, "train", path, "-o", tmp_path / "ran")["flops"] == dry
    path = recipe(tmp_path, model, train="new", distill={"top_k": 4})
    assert run(capsys, "train", path, "--dry-run")["flops"] == dry, "the teacher reads every row once, here as often as the training"
    assert run(capsys, "train", path, "-o", tmp_path / "kept")["flops"] == dry


def test_a_run_counts_what_it_measures_and_computes_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Evaluated at the start and after steps 3 and 6, and the source once: four rows of each set, and two on which both models are compared."""
    model = grown(tmp_path)
    config, source = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("grown", "source"))
    path = recipe(tmp_path, model, monitor={"baseline": "source"}, kl_rows=2, activation_checkpointing=True)
    flops = count_flops(config, Training(checkpointed=range(4), attention="sdpa"))
    wanted = {
        "train": flops.train.rows(6 * 2, 16), "recompute": flops.recompute.rows(6 * 2, 16),
        "evaluation": 3 * flops.forward.rows(4 + 4 + 2, 16) + count_flops(source).forward.rows(4 + 4 + 2, 16),
    }  # fmt: skip
    dry = run(capsys, "train", path, "--dry-run")
    assert (dry["flops"], dry["flops_by_purpose"]) == (wanted["train"], wanted)
    ran = run(capsys, "train", path)
    assert (ran["flops"], ran["flops_by_purpose"]) == (wanted["train"], wanted)
    logs = [e for e in read_events(tmp_path / "out" / EVENTS_FILE) if e["event"] == "log"]
    assert [e["flops"] for e in logs] == [flops.train.rows(2 * (i + 1), 16) for i in range(6)]
    assert logs[-1]["flops_by_purpose"]["train"] == wanted["train"]


def test_lora_adds_its_products_and_spares_gradients_of_what_is_frozen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = grown(tmp_path)
    whole = count_flops(json.loads((model / "config.json").read_text())).train.rows(6 * 2, 16)
    path = recipe(tmp_path, model, lora={"r": 2})
    dry = run(capsys, "train", path, "--dry-run")["flops"]
    assert whole / 2 < dry < whole
    assert run(capsys, "train", path)["flops"] == dry


def test_the_logits_of_distillation_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """2.1 GB each at 4096 positions and 128k tokens."""
    two = DistillOptions(teachers=[Teacher(model="a"), Teacher(model="b")])
    assert memory.distillation_bytes(DistillOptions(), 128_256, 4096, 4, 4) == 2 * 4096 * 128_256 * 4
    assert memory.distillation_bytes(two, 128_256, 4096, 2, 4) == 4096 * 128_256 * (2 + 2 * 4)
    assert memory.distillation_bytes(DistillOptions(top_k=64), 128_256, 4096, 2, 4) == 4096 * (64 * (2 + 8) + 128_256 * 4)
    model = grown(tmp_path)
    plain = run(capsys, "train", recipe(tmp_path, model), "--dry-run")["memory"]
    taught = run(capsys, "train", recipe(tmp_path, model, distill={}), "--dry-run")["memory"]
    assert plain["distillation"] == 0
    assert taught["distillation"] == 2 * 16 * 64 * (4 + 4)
    assert plain["total"] < taught["total"] <= sum(v for k, v in taught.items() if k != "total")
