"""`hf-grow train` on tiny models: what is trained, frozen, saved and resumed."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from grown import dense_mask
from models import BY_NAME, make, tokens
from penalties import importances
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from trained import FAST, grown, logged, override_eval_loss, recipe, run, source, text
from trainers import Rows, gradients_of_first_step, loss_of, trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_grow import api
from hf_grow.cli import main
from hf_grow.convert.in_memory import disk_names, grow_model
from hf_grow.training.config.schedules import AfterGrowth, Phase, Warmup, phase_at
from hf_grow.training.dry_run.memory import Widths, step_moments
from hf_grow.training.param_updates import param_provenance
from hf_grow.training.param_updates.masks import select
from hf_grow.training.param_updates.residual_scale import ResidualScale, decoder_layers
from hf_grow.training.param_updates.updates import LrFactors, ParamUpdates
from hf_grow.training.regularizers.si import SynapticIntelligence
from hf_grow.training.trainer.checkpointing import last_checkpoint
from hf_grow.training.trainer.events import EVENTS, EventLog, read_events
from hf_grow.training.trainer.state import GrowthSettings
from hf_grow.training.trainer.trainer import BaseGrowTrainer


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


# ---- a run, from the recipe to the saved model ----------------------------------------------------------------------------------------------


def test_train_writes_a_plain_transformers_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = grown(tmp_path)
    path = recipe(tmp_path, model, monitor={"contribution_steps": 6, "baseline": "source"}, kl_rows=2, max_steps=12, eval_steps=6)
    found = run(capsys, "train", path)
    out = tmp_path / "out"
    assert found["steps"] == 12
    assert found["tokens"] == 12 * 2 * 16
    assert found["forgetting"] == pytest.approx(found["end"]["old"] - found["source"]["old"])
    trained, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(loading[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert AutoTokenizer.from_pretrained(out).get_vocab() == AutoTokenizer.from_pretrained(model).get_vocab()
    # The reported losses are those of the models before and after.
    assert found["start"] == expected_losses(model, tmp_path)
    assert found["end"] == expected_losses(out, tmp_path)
    before = AutoModelForCausalLM.from_pretrained(model).state_dict()
    assert all(not torch.equal(p, before[n]) for n, p in trained.named_parameters())
    assert not list(out.rglob("*.bin")), "no pickle of TrainingArguments"
    record = json.loads((out / "growth.json").read_text())
    assert record["training"]["losses"] == {k: found[k] for k in ("start", "end", "source")}
    assert record["training"]["recipe"]["max_steps"] == 12
    assert "files" not in record["target"]
    assert json.loads((model / "growth.json").read_text())["target"]["config"] == record["target"]["config"]
    assert json.loads((out / "config.json").read_text())["rope_theta"]
    assert param_provenance.load_plan(out / "checkpoint-3") is not None


def test_eval_loss_equals_cross_entropy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also of a mixture, whose router loss must not be in them."""
    model = grown(tmp_path, "mixtral")
    path = recipe(
        tmp_path, model, max_steps=1, data={"train": str(text(tmp_path, "one", 20, 5)), "eval": {"old": str(text(tmp_path, "old", 6))}}
    )
    found = run(capsys, "train", path)
    tokenizer, plain = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    documents = [json.loads(line)["text"] for line in (tmp_path / "old.jsonl").read_text().splitlines()]
    stream = [i for d in documents for i in [*tokenizer(d)["input_ids"], 2]]
    total, batches = 0.0, []
    for start in range(0, len(stream), 16):
        ids = torch.tensor([stream[start : start + 16]])
        if ids.shape[1] < 2:
            continue
        with torch.no_grad():
            logits = plain(ids).logits
        batches.append((float(cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")), ids.shape[1] - 1))
    # Trainer takes the mean of batches of two rows, each the mean of its tokens.
    pairs = [batches[i : i + 2] for i in range(0, len(batches), 2)]
    total = sum(sum(s for s, _ in p) / sum(n for _, n in p) * len(p) for p in pairs) / len(batches)
    assert found["start"]["old"] == pytest.approx(total, abs=1e-5)


def test_source_baseline_and_kl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Identity growth: the source's losses are those at the start, and KL is zero there; later it is what it is written out."""
    model = grown(tmp_path)
    path = recipe(tmp_path, model, monitor={"baseline": "source"}, kl_rows=2)
    run(capsys, "train", path)
    events = list(read_events(tmp_path / "out" / "events.jsonl"))
    baseline = next(e for e in events if e["event"] == "baseline")
    first, *_, last = [e for e in events if e["event"] == "evaluation"]
    assert baseline["losses"] == pytest.approx(first["losses"], abs=1e-5)
    assert first["kl"] == pytest.approx(0, abs=1e-6)
    stream = [i for line in (tmp_path / "old.jsonl").read_text().splitlines()
              for i in [*AutoTokenizer.from_pretrained(model)(json.loads(line)["text"])["input_ids"], 2]]  # fmt: skip
    count = -(-len(stream) // 16)
    chosen = [round(x) for x in torch.linspace(0, count - 1, 4, dtype=torch.float64).long().tolist()][:2]
    old, new = (AutoModelForCausalLM.from_pretrained(p) for p in (tmp_path / "source", tmp_path / "out"))
    ids = torch.tensor([stream[r * 16 : r * 16 + 16] for r in chosen])
    with torch.no_grad():
        p, q = old(ids).logits.log_softmax(-1), new(ids).logits.log_softmax(-1)
    assert last["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)


def test_every_event_has_its_documented_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, grown(tmp_path), warmup={"steps": 3, "alpha_steps": 2}, phases=[{"steps": 2, "train": ["new"]}],
                  after_growth={"settle_steps": 2, "consolidate_steps": 3}, monitor={"contribution_steps": 3, "baseline": "source"},
                  distill={}, max_steps=6)  # fmt: skip
    run(capsys, "train", path)
    events = list(read_events(tmp_path / "out" / "events.jsonl"))
    kinds = [e["event"] for e in events]
    assert {"start", "log", "evaluation", "baseline", "phase", "settled", "blended", "consolidated", "contribution", "teacher", "checkpoint",
            "end"} <= set(kinds)  # fmt: skip
    assert kinds.count("phase") == 2
    for e in events:
        known = EVENTS[e["event"]]
        assert {"step", "time"} <= e.keys()
        optional = {"forgetting", "kl"}
        assert set(known) - {"..."} - optional <= e.keys(), e
        assert "..." in known or e.keys() <= {"event", "step", "time", *known}, e


def test_dry_run_estimates_memory_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = grown(tmp_path)
    path = recipe(tmp_path, model, regularizer={"kind": "l2sp"}, train="new_layers")
    found = run(capsys, "train", path, "--dry-run", "--gradient_accumulation_steps", "4")
    assert not (tmp_path / "out").exists()
    total = sum(t.numel() for t in load_file(model / "model.safetensors").values())
    new = sum(t.numel() for n, t in load_file(model / "model.safetensors").items() if ".layers.1." in n or ".layers.3." in n)
    assert found["memory"]["weights"] == 4 * total
    assert found["memory"]["gradients"] == 4 * new
    assert found["memory"]["optimizer"] == 8 * new
    assert found["memory"]["penalty"] == 4 * total
    assert found["memory"]["total"] <= sum(v for k, v in found["memory"].items() if k != "total")
    assert found["tokens_a_step"] == 4 * 2 * 16
    assert found["tokens"] == 6 * 4 * 2 * 16
    assert sum(g[2] for g in found["parameter_groups"]) == total
    assert {g[0]: g[2] for g in found["parameter_groups"]}["new"] == new
    assert found["recipe"]["gradient_accumulation_steps"] == 4
    assert main(["train", str(path), "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert "activations (estimated)" in output and "kind: l2sp" in output
    assert "│ teachers" not in output, "items of 0 bytes are omitted"


@pytest.mark.parametrize("checkpointed", [(), (0, 1, 2), (1,)], ids=str)
@pytest.mark.parametrize("case", ["llama", "qwen3"])
def test_activation_bytes_matches_saved_tensors(case: str, checkpointed: tuple[int, ...]) -> None:
    model = make(BY_NAME[case], hidden_size=96, intermediate_size=256, vocab_size=500, num_hidden_layers=3).train()
    model.set_attn_implementation("sdpa")
    if checkpointed:
        model.activation_checkpointing_enable()
    for number, layer in enumerate(model.model.layers):
        layer.gradient_checkpointing = number in checkpointed
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    ids = torch.randint(3, 500, (4, 64))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(ids, labels=ids, use_cache=False).loss
    assert loss.requires_grad
    arch = api.plan(model, "identity", layers_to=6).source.architecture
    loss_backward = list(step_moments(arch, 4 * 64, Widths(4, 4), checkpointed=checkpointed))[1]
    found = loss_backward.activations - 2 * 4 * (4 * 64 * 500)  # without the gradients of logits and log-softmax
    inputs = len(checkpointed) * 4 * 64 * 4 * arch.size("hidden")
    offloaded = list(step_moments(arch, 4 * 64, Widths(4, 4), checkpointed=checkpointed, offloaded=True))[1]
    assert offloaded.activations == loss_backward.activations - inputs
    assert 0.75 < found / sum(kept.values()) < 1.33


# ---- resuming -----------------------------------------------------------------------------------------------------------------------------------

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything": {
        "warmup": {"steps": 4, "alpha_steps": 5}, "phases": [{"steps": 2, "train": ["new"]}], "after_growth": {"settle_steps": 3},
        "regularizer": {"kind": "si", "lambda": 0.5, "consolidate_every": 4}, "gradient_accumulation_steps": 2,
        "lr_scheduler_type": "cosine", "monitor": {"window": 8}},
    "lora": {"lora": {"r": 4, "dropout": 0.1}},
    "streamed": {"data": {"streaming": True}, "dataloader_num_workers": 0},
    "epochs": {"max_steps": None, "num_train_epochs": 2.0, "data": {"train": {"path": "new.jsonl", "limit": 4}, "seq_length": 16}},
}  # fmt: skip


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupts training at the end of this step, before its checkpoint."""
    watch = BaseGrowTrainer.monitor_step

    def stop(self: BaseGrowTrainer) -> None:
        watch(self)
        if self.state.global_step == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(BaseGrowTrainer, "monitor_step", stop)


@pytest.mark.parametrize("name", SETTINGS)
def test_resumed_run_equals_uninterrupted_run(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = grown(tmp_path)
    monkeypatch.chdir(tmp_path)
    path = recipe(tmp_path, model, **{"max_steps": 10, "save_steps": 3, **SETTINGS[name]})
    run(capsys, "train", path)
    shutil.move(tmp_path / "out", tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_at(random.Random(name).randrange(4, 9), patch)
        assert main(["train", str(path)]) == 1
    assert not (tmp_path / "out" / "config.json").exists(), "nothing looks like a finished model"
    assert "--resume" in capsys.readouterr().err
    run(capsys, "train", path, status=2)
    result = run(capsys, "train", path, "--resume")
    assert logged(tmp_path / "out") == logged(tmp_path / "whole")
    assert len(set(logged(tmp_path / "out").values())) > 5
    one, other = (load_file(tmp_path / where / "model.safetensors") for where in ("whole", "out"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[n], other[n]) for n in one)
    assert result["start"] == json.loads((tmp_path / "whole" / "training.json").read_text())["result"]["start"]
    assert any(e["event"] == "resume" for e in read_events(tmp_path / "out" / "events.jsonl"))


def test_last_checkpoint_skips_incomplete_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, grown(tmp_path), max_steps=9, save_steps=3)
    run(capsys, "train", path)
    out = tmp_path / "out"
    assert last_checkpoint(out) == out / "checkpoint-9"
    (out / "checkpoint-9" / "trainer_state.json").write_text('{"global_st')
    assert last_checkpoint(out) == out / "checkpoint-6"
    (out / "checkpoint-6" / "trainer_state.json").unlink()
    assert last_checkpoint(out) == out / "checkpoint-3"
    whole = load_file(out / "model.safetensors")
    run(capsys, "train", path, "--resume")
    assert all(torch.equal(t, whole[n]) for n, t in load_file(out / "model.safetensors").items())


@pytest.mark.slow
def test_run_killed_at_random_moments_resumes_exactly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """kill -9 of the real process, several times in one run; saving takes most of the time here, so some kills fall into it."""
    model = grown(tmp_path)
    path = recipe(tmp_path, model, max_steps=60, save_steps=2, save_total_limit=2, regularizer={"kind": "si", "lambda": 0.5})
    command = [sys.executable, "-m", "hf_grow", "train", str(path), "--resume"]
    alike = {**os.environ, "OMP_NUM_THREADS": "1"}  # other numbers of threads round otherwise
    subprocess.run(command[:-1], check=True, capture_output=True, env=alike)
    shutil.move(tmp_path / "out", tmp_path / "whole")
    draw, kills = random.Random(1), 0
    while kills < 6:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=alike)
        events, seen = tmp_path / "out" / "events.jsonl", 0
        target = max(logged(tmp_path / "out"), default=0) + draw.randrange(3, 9) if events.exists() else draw.randrange(3, 9)
        while process.poll() is None and seen < target:
            seen = max(logged(tmp_path / "out"), default=0) if events.exists() else 0
            time.sleep(0.002)
        time.sleep(draw.random() * 0.05)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills >= 4
    subprocess.run(command, check=True, capture_output=True, env=alike)
    assert logged(tmp_path / "out") == logged(tmp_path / "whole")
    one, other = (load_file(tmp_path / n / "model.safetensors") for n in ("whole", "out"))
    assert all(torch.equal(one[n], other[n]) for n in one)


def test_grown_run_resumes_at_the_step_of_its_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Train, grow the checkpoint with its optimizer state, train on: same step, and the growth's own steps count from there."""
    small = source(tmp_path / "small")
    run(capsys, "train", recipe(tmp_path, small, max_steps=4, save_steps=4, output=str(tmp_path / "first")))
    checkpoint = tmp_path / "first" / "checkpoint-4"
    large = tmp_path / "large"
    run(capsys, "depth", checkpoint, "--method", "identity", "--layers-to", 4, "-o", large, "--with-optimizer", checkpoint)
    path = recipe(tmp_path, large, max_steps=8, resume_from_checkpoint=str(large), warmup={"steps": 2},
                  after_growth={"settle_steps": 2})  # fmt: skip
    assert run(capsys, "train", path)["steps"] == 8
    events = list(read_events(tmp_path / "out" / "events.jsonl"))
    assert next(e for e in events if e["event"] == "start")["grown_at"] == 4
    assert [e["step"] for e in events if e["event"] == "log"] == [5, 6, 7, 8]
    assert [e["step"] for e in events if e["event"] == "settled"] == [6]
    state = json.loads((tmp_path / "out" / "checkpoint-8" / "growth_state.json").read_text())
    assert state["grown_at"] == 4
    before = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    assert state["monitor"]["before"] == [e["loss"] for e in before if "loss" in e][-1]


# ---- who moves, and how far ---------------------------------------------------------------------------------------------------------------------

GROWTHS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "depth": ("llama", "identity", {"layers_to": 4}),
    "width": ("llama", "tile", {"factor": 2}),
    "experts": ("mixtral", "experts", {"experts": 6}),
}


def grown_model(name: str) -> tuple[Any, Any]:
    case, method, options = GROWTHS[name]
    model = make(BY_NAME[case], num_hidden_layers=2)
    plan = api.plan(model, method, **options)
    return grow_model(model, plan), plan


FREEZES: list[tuple[str, list[str], list[str]]] = [
    ("depth", ["new_layers"], []),
    ("depth", ["everything"], ["embeddings", "norms"]),
    ("width", ["new"], []),
    ("width", ["everything"], ["old"]),
    ("experts", ["routers"], []),
    ("experts", ["new_experts"], []),
    ("experts", ["routers", "new_experts"], ["norms"]),
]


@pytest.mark.parametrize(("name", "train", "freeze"), FREEZES)
def test_frozen_weights_are_unchanged_bit_for_bit(name: str, train: list[str], freeze: list[str], tmp_path: Path) -> None:
    """Neither by weight decay nor by moments; and everything else does move."""
    model, plan = grown_model(name)
    parts = param_provenance.parts(model, plan)
    names = [n for n, _ in model.named_parameters()]
    trains = select(names, parts, train, excluded=freeze)
    before = weights(model)
    growth = GrowthSettings(
        updates=ParamUpdates(trains, param_provenance.new_masks(model, plan)), aux_loss=0.01 if name == "experts" else None
    )
    trainer(model, tmp_path, growth, max_steps=4).train()
    moved = 0
    for n, p in model.named_parameters():
        mask = dense_mask(trains[n], p.shape)
        assert torch.equal(p.detach()[~mask], before[n][~mask]), n
        changed = p.detach()[mask] != before[n][mask]
        if mask.any() and "embed" not in n and "experts" not in n:  # not every token and expert has its turn
            assert changed.float().mean() > 0.5, n
        moved += int(changed.sum())
    assert moved


def test_si_path_integral_is_zero_for_frozen_rows(tmp_path: Path) -> None:
    """Decay and moments move them for a moment before they are put back; that is no part of the path."""
    model, plan = grown_model("width")
    masks = param_provenance.new_masks(model, plan)
    before = weights(model)
    path = SynapticIntelligence(0.1, {n: p.clone() for n, p in before.items()}, None, xi=1e-3)
    trainer(model, tmp_path, GrowthSettings(updates=ParamUpdates(masks, masks), penalty=path), max_steps=4).train()
    path.consolidate()
    some = 0
    for n, found in importances(path).items():
        stayed = ~dense_mask(masks[n], found.shape)
        assert not found[stayed].any(), n
        assert not stayed.any() or torch.equal(dict(model.named_parameters())[n].detach()[stayed], before[n][stayed])
        some += int((found > 0).sum())
    assert some > 1000


def test_si_path_integral_uses_lr_of_new_parameters(tmp_path: Path) -> None:
    """New rows at half the rate: the sum of gradient times move is that of the moves that were made."""
    model, plan = grown_model("width")
    path = SynapticIntelligence(0.0, {n: p.clone() for n, p in weights(model).items()}, None, xi=1e-3)
    growth = GrowthSettings(
        updates=ParamUpdates(dict.fromkeys(weights(model), True), param_provenance.new_masks(model, plan)),
        warmup=Warmup(lr=0.5),
        penalty=path,
    )
    before = weights(model)
    trainer(model, tmp_path, growth, max_steps=1).train()
    for n, p in model.named_parameters():
        kept = path.path[n]
        torch.testing.assert_close(kept["omega"], -kept["gradient"] * (p.detach() - before[n]))


def test_phase_freezes_then_unfreezes(tmp_path: Path) -> None:
    """The thawed tensors take the step of a fresh AdamW: the phase left no moments and no step count behind."""
    model, plan = grown_model("depth")
    parts, names = param_provenance.parts(model, plan), [n for n, _ in model.named_parameters()]
    every, new = select(names, parts, ["everything"]), select(names, parts, ["new"])
    snapshots: list[dict[str, torch.Tensor]] = [weights(model)]
    growth = GrowthSettings(
        updates=ParamUpdates(every, param_provenance.new_masks(model, plan), [new]), phases=[Phase(steps=3, train=["new"])]
    )
    made = trainer(model, tmp_path, growth, max_steps=4, max_grad_norm=0.0, adam_epsilon=1e-12)
    watch = made.monitor_step

    def look() -> None:
        watch()
        snapshots.append(weights(model))

    made.monitor_step = look  # type: ignore[method-assign]
    made.train()
    old = [n for n in names if new[n] is False]
    assert old
    assert all(torch.equal(snapshots[3][n], snapshots[0][n]) for n in old)
    # One step of a new AdamW moves every weight that has a gradient by lr, decay aside.
    lr, name = FAST["learning_rate"], "model.layers.0.mlp.down_proj.weight"
    decayed = snapshots[3][name] * (1 - lr * 0.1)
    assert torch.allclose((snapshots[4][name] - decayed).abs(), torch.full_like(decayed, lr), rtol=1e-3)


def reference_adamw(model: Any, new: dict[str, Any], factor: Callable[[int], float], every: Callable[[int], float], steps: int) -> None:
    """AdamW written out, with a learning rate for every entry: the reference for rates inside a tensor."""
    rows, lr, betas, eps, decay = Rows(), FAST["learning_rate"], (0.9, 0.999), 1e-3, 0.1
    decayed = {n for n, p in model.named_parameters() if "norm" not in n and "bias" not in n}
    moments: dict[str, list[torch.Tensor]] = {}
    for t in range(steps):
        model.zero_grad()
        ids = rows.rows[2 * t : 2 * t + 2]
        model(ids, labels=ids).loss.backward()
        with torch.no_grad():
            for n, p in model.named_parameters():
                m, v = moments.setdefault(n, [torch.zeros_like(p), torch.zeros_like(p)])
                m.mul_(betas[0]).add_(p.grad, alpha=1 - betas[0])
                v.mul_(betas[1]).addcmul_(p.grad, p.grad, value=1 - betas[1])
                rate = lr * every(t) * torch.where(dense_mask(new[n], p.shape), factor(t), 1.0)
                update = (m / (1 - betas[0] ** (t + 1))) / ((v / (1 - betas[1] ** (t + 1))).sqrt() + eps)
                p.sub_(rate * (update + (decay * p if n in decayed else 0)))


@pytest.mark.parametrize("name", ["depth", "width"])
def test_new_parameter_lr_applies_to_single_rows(name: str, tmp_path: Path) -> None:
    model, plan = grown_model(name)
    twin = grow_model(make(BY_NAME["llama"], num_hidden_layers=2), plan)
    new = param_provenance.new_masks(model, plan)
    warmup, after = Warmup(lr=2.0, steps=4), AfterGrowth(settle_steps=2, settle_lr=0.5, restore_steps=2)
    growth = GrowthSettings(updates=ParamUpdates(dict.fromkeys(new, True), new), warmup=warmup, after_growth=after)
    trainer(model, tmp_path, growth, max_steps=6, max_grad_norm=0.0, adam_beta2=0.999, adam_epsilon=1e-3).train()
    reference_adamw(twin.train(), new, warmup.lr_factor, after.factor, 6)
    for (n, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-5, msg=n)
    assert warmup.lr_factor(0) == 0.5 and warmup.lr_factor(3) == warmup.lr_factor(99) == 2.0
    assert [after.factor(t) for t in (0, 1, 4, 9)] == [0.5, 0.5, 1.0, 1.0]
    assert after.factor(2) == pytest.approx(2 / 3)


def test_saved_optimizer_has_trainers_two_groups(tmp_path: Path) -> None:
    """So that growing with the optimizer state, and every other tool, can read the checkpoint."""
    model, plan = grown_model("depth")
    new = param_provenance.new_masks(model, plan)
    trainer(
        model, tmp_path, GrowthSettings(updates=ParamUpdates(dict.fromkeys(new, True), new), warmup=Warmup(lr=0.5)), max_steps=3
    ).train()
    saved = torch.load(tmp_path / "checkpoint-3" / "optimizer.pt", weights_only=True)
    assert [g["weight_decay"] for g in saved["param_groups"]] == [0.1, 0.0]
    assert all(g["lr"] == FAST["learning_rate"] for g in saved["param_groups"])
    assert sum(len(g["params"]) for g in saved["param_groups"]) == len(new) == len(saved["state"])


def test_schedules_count_steps_from_the_growth() -> None:
    phases = [Phase(steps=2, train=["new"]), Phase(steps=3, train=["routers"])]
    assert [phase_at(phases, s) for s in range(7)] == [0, 0, 1, 1, 1, None, None]
    ramp = Warmup(alpha_steps=4, alpha_start=0.2)
    assert [ramp.alpha(s) for s in (0, 2, 4, 9)] == pytest.approx([0.2, 0.6, 1.0, 1.0])
    assert Warmup(alpha_steps=4, shape="cosine").alpha(1) == pytest.approx(0.5 * (1 - 2**-0.5))
    assert Warmup().lr_factor(0) == 1.0
    assert LrFactors() == LrFactors(1.0, 1.0)


# ---- blocks -------------------------------------------------------------------------------------------------------------------------------------


def test_residual_scale_blends_blocks_and_is_removed_at_alpha_one() -> None:
    model = make(BY_NAME["llama"], num_hidden_layers=3)
    ids = tokens(model)
    layers = decoder_layers(model)
    plain = model(ids).logits
    blend = ResidualScale(model, [1])
    seen: dict[str, torch.Tensor] = {}
    hook = layers[1].register_forward_hook(lambda m, a, o: seen.update(block=o.detach().clone(), came=a[0].detach().clone()))
    after = layers[2].register_forward_pre_hook(lambda m, a: seen.update(went=a[0].detach().clone()))
    blend.set(0.25)
    model(ids)
    assert torch.allclose(seen["went"], seen["came"] + 0.25 * (seen["block"] - seen["came"]), atol=1e-6)
    hook.remove()
    after.remove()
    blend.set(0.75)
    assert not torch.equal(model(ids).logits, plain)
    blend.set(1.0)
    assert torch.equal(model(ids).logits, plain)
    assert not layers[1]._forward_hooks
    with blend.without(1):
        bypassed = model(ids).logits
    short = make(BY_NAME["llama"], num_hidden_layers=3)
    del short.model.layers[1]
    assert torch.allclose(bypassed, short(ids).logits, atol=1e-6)
    assert torch.equal(model(ids).logits, plain)


def test_contributions_equal_losses_without_each_block(tmp_path: Path) -> None:
    model, plan = grown_model("depth")
    with torch.no_grad():
        for block in (1, 3):
            decoder_layers(model)[block].mlp.down_proj.weight.normal_(0, 0.3)
    made = trainer(model, tmp_path, GrowthSettings(residual_scale=ResidualScale(model, [1, 3])))
    found = made.contributions()["old"]
    ids = Rows(4).rows
    model.requires_grad_(False)
    whole = float(model(ids, labels=ids).loss)
    for block in (1, 3):
        shorter = grow_model(make(BY_NAME["llama"], num_hidden_layers=2), plan)
        shorter.load_state_dict(model.state_dict())
        del shorter.requires_grad_(False).model.layers[block]
        assert found[block] == pytest.approx(float(shorter(ids, labels=ids, use_cache=False).loss) - whole, abs=1e-5)


def expected_losses(model: Path, folder: Path) -> Any:
    """The saved model's losses on the named sets, without hf-grow's trainer."""
    tokenizer, plain = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    out = {}
    for name in ("old", "new"):
        stream = [
            i
            for line in (folder / f"{name}.jsonl").read_text().splitlines()
            for i in [*tokenizer(json.loads(line)["text"])["input_ids"], 2]
        ]
        rows = torch.linspace(0, -(-len(stream) // 16) - 1, 4, dtype=torch.float64).long().tolist()
        total = 0.0
        for pair in (rows[:2], rows[2:]):
            losses = [(loss_of(plain, stream, [r]), min(16, len(stream) - 16 * r) - 1) for r in pair]
            total += sum(loss * n for loss, n in losses) / sum(n for _, n in losses) / 2
        out[name] = pytest.approx(total, abs=1e-5)
    return out


def test_zero_init_and_alpha_zero_make_new_blocks_identity(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two stacked copies of a stack: with the second zeroed the model computes what the source does."""
    model = grown(tmp_path, method="stack")
    path = recipe(tmp_path, model, warmup={"zero_init": True}, monitor={"baseline": "source"})
    run(capsys, "train", path)
    events = list(read_events(tmp_path / "out" / "events.jsonl"))
    baseline, first = (next(e["losses"] for e in events if e["event"] == kind) for kind in ("baseline", "evaluation"))
    assert first == pytest.approx(baseline, abs=1e-5)
    # Blended in from zero they add nothing at first either, and everything at the end.
    path = recipe(tmp_path, model, warmup={"alpha_steps": 4}, monitor={"baseline": "source"})
    found = run(capsys, "train", path, "--overwrite")
    events = list(read_events(tmp_path / "out" / "events.jsonl"))
    baseline, first = (next(e["losses"] for e in events if e["event"] == kind) for kind in ("baseline", "evaluation"))
    assert first == pytest.approx(baseline, abs=1e-5)
    assert [e.get("alpha", 1.0) for e in events if e["event"] == "log"] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert found["end"] == expected_losses(tmp_path / "out", tmp_path)
    run(capsys, "train", recipe(tmp_path, model, monitor={"baseline": "source"}), "--overwrite")
    events = list(read_events(tmp_path / "out" / "events.jsonl"))
    baseline, first = (next(e["losses"] for e in events if e["event"] == kind) for kind in ("baseline", "evaluation"))
    assert abs(first["old"] - baseline["old"]) > 0.01


# ---- the penalty, mixtures, accumulation ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"regularizer": {"kind": "l2sp", "lambda": 3.0}}, {"regularizer": {"kind": "si"}}, {"distill": {}}])
def test_gradient_accumulation_equals_one_large_batch(settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Eight rows at once, or two in four pieces: the same losses, the same penalty, the same weights.

    Batches of other sizes round otherwise; a large epsilon keeps AdamW from making steps of gradients that are nothing but that.
    """
    model = grown(tmp_path)
    found = {}
    for batch, pieces in ((8, 1), (2, 4)):
        path = recipe(tmp_path, model, output=str(tmp_path / f"out-{pieces}"), per_device_train_batch_size=batch,
                      gradient_accumulation_steps=pieces, learning_rate=1e-3,
                      adam_epsilon=1e-3, **settings)  # fmt: skip
        run(capsys, "train", path)
        out = tmp_path / f"out-{pieces}"
        logs = [e for e in read_events(out / "events.jsonl") if e["event"] == "log"]
        found[pieces] = ([e["loss"] for e in logs], [e.get("penalty", 0) for e in logs], load_file(out / "model.safetensors"))
    assert found[1][0] == pytest.approx(found[4][0], abs=2e-5)
    assert found[1][1] == pytest.approx(found[4][1], rel=1e-3)
    if settings.get("regularizer", {}).get("kind") == "l2sp":
        assert found[1][1][-1] > 0
    for n, t in found[1][2].items():
        assert torch.allclose(t, found[4][2][n], atol=2e-5), n


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe"])
def test_router_loss_is_averaged_over_micro_batches(case: str, tmp_path: Path) -> None:
    """Four pieces: the mean of their router losses, times the coefficient. Written out piece by piece."""
    model = make(BY_NAME[case], num_hidden_layers=2)
    coefficient = 0.5
    model.router_aux_loss_coef = coefficient
    found, loss = gradients_of_first_step(model, tmp_path, GrowthSettings(aux_loss=coefficient), gradient_accumulation_steps=4)
    twin = make(BY_NAME[case], num_hidden_layers=2).train()
    rows = Rows().rows[:8]
    total = torch.zeros(())
    for i in range(0, 8, 2):
        outputs = twin(rows[i : i + 2], output_router_logits=True)
        total = total + cross_entropy(outputs.logits[:, :-1].flatten(0, 1), rows[i : i + 2, 1:].flatten()) / 4
        total = total + coefficient * outputs.aux_loss / 4
    total.backward()
    for n, p in twin.named_parameters():
        assert torch.allclose(found[n], p.grad, atol=1e-6), n
    assert loss == pytest.approx(float(total.detach()), abs=1e-4)


def test_moe_training_logs_expert_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = source(tmp_path / "source")
    api.grow(old, tmp_path / "grown", "experts", experts=4)
    path = recipe(tmp_path, tmp_path / "grown", phases=[{"steps": 2, "train": "routers"}], train=["routers", "new_experts"],
                  moe={"aux_coefficient": 0.1})  # fmt: skip
    run(capsys, "train", path)
    logs = [e for e in read_events(tmp_path / "out" / "events.jsonl") if e["event"] == "log"]
    assert all(1 <= e["expert_load_max"] <= 2 and e["experts_idle"] in range(8) for e in logs)
    assert all(e["aux_loss"] > 0 for e in logs)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.output_router_logits is False
    start, end = (load_file(tmp_path / p / "model.safetensors") for p in ("grown", "out"))
    frozen = [n for n in start if "block_sparse_moe" not in n]
    assert frozen and all(torch.equal(start[n], end[n]) for n in frozen)


def test_early_stopping_saves_best_model(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    override_eval_loss(monkeypatch, "new", lambda step, _: {0: 9.0, 2: 3.0, 4: 2.0, 6: 2.5, 8: 2.0}[step])
    path = recipe(tmp_path, grown(tmp_path), max_steps=40, eval_steps=2, save_steps=2, early_stopping_patience=2)
    found = run(capsys, "train", path)
    assert found["steps"] == 8
    assert found["stopped"] == "early stopping"
    end, best, last = (load_file(tmp_path / "out" / f / "model.safetensors") for f in ("", "checkpoint-4", "checkpoint-8"))
    assert all(torch.equal(t, best[n]) for n, t in end.items())
    assert any(not torch.equal(t, last[n]) for n, t in end.items())
    assert found["end"]["old"] == expected_losses(tmp_path / "out", tmp_path)["old"], "the last evaluation is of the best model"


def test_best_model_with_lora_restores_new_blocks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its new blocks train beside the adapters, and must come back with them."""
    model = grown(tmp_path)
    override_eval_loss(monkeypatch, "old", lambda step, _: {0: 3.0, 2: 3.5, 4: 2.8, 6: 3.1, 8: 3.3, 10: 3.4}[step])
    path = recipe(tmp_path, model, max_steps=10, eval_steps=2, save_steps=2, learning_rate=0.1, lora={"r": 2},
                  load_best_model_at_end=True, metric_for_best_model="eval_forgetting", greater_is_better=False)  # fmt: skip
    run(capsys, "train", path)
    for step in (4, 10):
        run(capsys, "merge", tmp_path / "out" / f"checkpoint-{step}", "-o", tmp_path / str(step), "--base", model)
    end, best, last = (load_file(tmp_path / f / "model.safetensors") for f in ("out", "4", "10"))
    assert end.keys() == best.keys()
    for n, t in end.items():  # merged once by peft, once by hf-grow: the last bits may differ
        torch.testing.assert_close(t, best[n], rtol=1e-5, atol=1e-5, msg=n)
        if "_proj" in n:  # of old blocks by their adapters, of new ones in full
            assert (t - last[n]).abs().max() > 1e-3, n


def test_full_disk_error(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    path = recipe(tmp_path, grown(tmp_path))
    monkeypatch.setattr(BaseGrowTrainer, "_save_optimizer_and_scheduler", full)
    output = run(capsys, "train", path, status=1)["error"]
    assert "disk" in output and "--resume" in output and "Traceback" not in output


def test_overwrite_and_resume_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, grown(tmp_path), max_steps=2)
    run(capsys, "train", path)
    assert "--resume" in run(capsys, "train", path, status=2)["error"]
    run(capsys, "train", path, "--overwrite")
    assert [e["event"] for e in read_events(tmp_path / "out" / "events.jsonl")].count("start") == 1
    assert "cannot be combined" in run(capsys, "train", path, "--overwrite", "--resume", status=2)["error"]
    other = tmp_path / "papers"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    assert "was not written by hf-grow train" in run(capsys, "train", path, "-o", other, "--overwrite", status=2)["error"]
    assert (other / "thesis.txt").exists()
    assert "contains a training of" in run(capsys, "train", path, "--resume", "--model", source(tmp_path / "another"), status=2)["error"]


def test_bf16_with_activation_checkpointing_and_streaming(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Arguments of Trainer's pass; master weights are fp32 where it computes in 16 bits."""
    path = recipe(tmp_path, grown(tmp_path), bf16=True, activation_checkpointing=True, learning_rate=3e-3, max_steps=12, data={"streaming": True}, warmup={"alpha_steps": 3},
                  regularizer={"kind": "l2sp"})  # fmt: skip
    run(capsys, "train", path)
    start, end = (load_file(tmp_path / f / "model.safetensors") for f in ("grown", "out"))
    assert {t.dtype for t in end.values()} == {torch.float32}
    assert all(t.isfinite().all() and not torch.equal(t, start[n]) for n, t in end.items())


def test_saved_tensor_names_equal_source_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Mixtures are fused in memory; what is saved has the source's names."""
    model = grown(tmp_path, "mixtral", layers_to=4)
    run(capsys, "train", recipe(tmp_path, model, max_steps=1))
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == load_file(model / "model.safetensors").keys()
    held = AutoModelForCausalLM.from_pretrained(model)
    assert set(disk_names(held, dict(held.named_parameters()))) == load_file(model / "model.safetensors").keys()


def test_recipe_file_is_yaml(tmp_path: Path) -> None:
    path = recipe(tmp_path, grown(tmp_path))
    assert yaml.safe_load(path.read_text())["max_steps"] == 6


def test_api_train_equals_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, grown(tmp_path), output=None)
    result = api.train(yaml.safe_load(path.read_text()), output=tmp_path / "python", max_steps=2)
    assert result.steps == 2
    run(capsys, "train", path, "-o", tmp_path / "command", "--max_steps", 2)
    mine, theirs = (load_file(tmp_path / f / "model.safetensors") for f in ("python", "command"))
    assert all(torch.equal(mine[n], theirs[n]) for n in theirs)


def test_fp16_overflow_is_no_instability(tmp_path: Path) -> None:
    """A GradScaler leaves such steps out until its scale fits; nothing else may take them for steps either."""
    model, _ = grown_model("depth")
    path = SynapticIntelligence(0.1, {n: p.clone() for n, p in weights(model).items()}, None, xi=1e-3)
    growth = GrowthSettings(penalty=path, events=EventLog(tmp_path / "events.jsonl"))
    made = trainer(model, tmp_path, growth, max_steps=8, fp16=True, max_grad_norm=1.0)
    made.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22)  # accelerate has none on a CPU
    made.accelerator.native_amp = True
    made.train()
    assert path.steps < 8, "the first steps overflowed"
    assert path.steps > 0
    assert made.accelerator.scaler.get_scale() == 2.0 ** (22 - (8 - path.steps))
    assert not [e for e in read_events(tmp_path / "events.jsonl") if e["event"] in ("instability", "reaction")]


def test_diverged_training_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights that are not finite never come back; no model is left that looks like a finished one."""
    path = recipe(tmp_path, grown(tmp_path), learning_rate=1e20, max_steps=30, save_steps=1)
    output = run(capsys, "train", path, status=1)["error"]
    assert (
        "Training diverged: the weights are not finite after step" in output
        and "Lower learning_rate" in output
        and "Traceback" not in output
    )
    assert re.search(r"^Step \d+: (loss|grad_norm) (nan|inf) is unstable\.$", output, re.MULTILINE), output
    out = tmp_path / "out"
    assert not (out / "config.json").exists()
    found = list(read_events(out / "events.jsonl"))
    assert found[-1]["event"] == "reaction" and found[-2]["signal"] == "nonfinite" and found[-1]["step"] < 30
    kept = last_checkpoint(out)
    assert kept is not None and kept.name in output


def test_si_saves_importances_for_the_next_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = grown(tmp_path)
    run(capsys, "train", recipe(tmp_path, model, regularizer={"kind": "si", "lambda": 0.1}), "-o", tmp_path / "first")
    left = tmp_path / "first" / "penalty" / "importance.safetensors"
    assert load_file(left).keys() == load_file(tmp_path / "first" / "model.safetensors").keys()
    second = recipe(tmp_path, tmp_path / "first", regularizer={"kind": "si", "lambda": 0.1, "fisher": str(left)})
    run(capsys, "train", second, "-o", tmp_path / "second")
    run(capsys, "train", recipe(tmp_path, model, regularizer={"kind": "l2sp", "lambda": 0.1}), "-o", tmp_path / "third")
    assert not (tmp_path / "third" / "penalty").exists()
