"""Resuming from a checkpoint, grown or not: weights, moments, settings and schedule, and errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adam_states import CASES, GROWTHS, adamw, trained
from models import BY_NAME, make, tokens
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from trained import edited, grown, logged, recipe, run, source
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_grow import api
from hf_grow.cli import main
from hf_grow.convert.in_memory import grow_model
from hf_grow.errors import InputError, SourceError
from hf_grow.model.meta_model import trainer_param_groups
from hf_grow.training.growth_state.grow_optimizer import grow_trainer_state
from hf_grow.training.growth_state.optimizer_files import NAMES, POSITIONS
from hf_grow.training.growth_state.resume import by_name, by_position
from hf_grow.training.trainer.events import read_events
from hf_grow.training.trainer.weights import load_weights

SMALL = {"max_steps": 4, "save_steps": 4, "learning_rate": 1e-3, "lr_scheduler_type": "linear", "warmup_steps": 2, "weight_decay": 0.01}


def train_source_checkpoint(folder: Path, capsys: Any, case: str = "llama", **changes: Any) -> Path:
    """A checkpoint of a training of the source model, at step 4 of 8."""
    model = source(folder / "model", case)
    path = recipe(folder, model, output=str(folder / "small"), **{**SMALL, "max_steps": 8, **changes})
    run(capsys, "train", path)
    return folder / "small" / "checkpoint-4"


def grow(capsys: Any, checkpoint: Path, out: Path, *words: str) -> Path:
    depth = ["depth", checkpoint, "--method", "identity", "--layers-to", "4", "-o", out, "--with-optimizer", checkpoint]
    run(capsys, *depth, *words)
    return out


def read_optimizer(path: Path) -> tuple[Any, Any]:
    saved = torch.load(path, weights_only=True)
    return saved["param_groups"], saved["state"]


def logged_learning_rates(out: Path) -> dict[int, float]:
    return {e["step"]: e["learning_rate"] for e in read_events(out / "events.jsonl") if e["event"] == "log"}


# ---- weights -----------------------------------------------------------------------------------------------------------------------------


def test_best_checkpoint_of_source_run_is_not_loaded_into_grown_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The source run's best loss cannot be beaten; its checkpoint exists, and half of its tensor names are the grown model's."""
    checkpoint = train_source_checkpoint(tmp_path, capsys)
    best = {"best_model_checkpoint": str(checkpoint), "best_metric": -1.0, "best_global_step": 4}
    edited(checkpoint / "trainer_state.json", **best, stateful_callbacks={"EarlyStoppingCallback": {"args": {}}, "TrainerControl": {}})
    start = grow(capsys, checkpoint, tmp_path / "grown")
    state = json.loads((start / "trainer_state.json").read_text())
    assert [state[k] for k in best] == [None] * 3
    assert state["stateful_callbacks"] == {"TrainerControl": {}}
    assert state["global_step"] == 4 and state["log_history"], "the rest is kept"
    path = recipe(
        tmp_path, start, resume_from_checkpoint=str(start), load_best_model_at_end=True, **{**SMALL, "max_steps": 8, "eval_steps": 4}
    )
    run(capsys, "train", path)
    result, last = (load_file(tmp_path / "out" / p / "model.safetensors") for p in ("", "checkpoint-8"))
    assert result.keys() == load_file(start / "model.safetensors").keys()
    assert all(torch.equal(result[n], t) for n, t in last.items()), "the only checkpoint of the grown run is its best"


def test_best_checkpoint_of_another_model_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = train_source_checkpoint(tmp_path, capsys)
    start = grow(capsys, checkpoint, tmp_path / "grown")
    edited(start / "trainer_state.json", best_model_checkpoint=str(checkpoint), best_metric=-1.0, best_global_step=4)
    path = recipe(
        tmp_path, start, resume_from_checkpoint=str(start), load_best_model_at_end=True, **{**SMALL, "max_steps": 8, "eval_steps": 4}
    )
    output = run(capsys, "train", path, status=2)["error"]
    assert f"{checkpoint} is a checkpoint of another model: model.layers.2." in output and "Traceback" not in output
    assert not (tmp_path / "out" / "config.json").exists()


def test_resume_from_checkpoint_of_another_model_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = train_source_checkpoint(tmp_path, capsys)
    path = recipe(tmp_path, grown(tmp_path), resume_from_checkpoint=str(checkpoint), **SMALL)
    assert "is a checkpoint of another model" in run(capsys, "train", path, status=2)["error"]


def test_damaged_state_files_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, grown(tmp_path), regularizer={"kind": "si", "lambda": 0.5}, **{**SMALL, "save_steps": 2})
    out = tmp_path / "out"
    run(capsys, "train", path, "-o", out, "--max_steps", 2)
    for name in ("scheduler.pt", "penalty.pt", "growth_state.json"):
        file = out / "checkpoint-2" / name
        whole = file.read_bytes()
        contents = [whole[: len(whole) // 2], b"{}"] if name == "growth_state.json" else [whole[: len(whole) // 2]]
        for content in contents:
            file.write_bytes(content)
            error = run(capsys, "train", path, "-o", out, "--resume", status=2)["error"]
            assert name in error and "resume from an earlier one" in error
        file.write_bytes(whole)
    run(capsys, "train", path, "-o", out, "--resume")


@pytest.mark.parametrize("case", [BY_NAME[n] for n in CASES], ids=str)
def test_load_weights_restores_every_tensor(case: Any, tmp_path: Path) -> None:
    """Also those that transformers fuses in memory."""
    one, other = make(case), make(case)
    with torch.no_grad():
        for p in one.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    one.save_pretrained(tmp_path)
    load_weights(other, tmp_path)
    held = dict(other.named_parameters())
    assert all(torch.equal(held[n], p) for n, p in one.named_parameters())
    ids = tokens(one)
    assert torch.equal(one(ids).logits, other(ids).logits)
    with pytest.raises(InputError, match="checkpoint of another model"):
        load_weights(make(case, intermediate_size=24, moe_intermediate_size=24), tmp_path)


def test_resumed_moe_restores_expert_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, grown(tmp_path, "mixtral", layers_to=4), max_steps=6, save_steps=3)
    run(capsys, "train", path)
    out = tmp_path / "out"
    whole = load_file(out / "model.safetensors")
    shutil.rmtree(out / "checkpoint-6")
    run(capsys, "train", path, "--resume")
    again = load_file(out / "model.safetensors")
    assert all(torch.equal(again[n], t) for n, t in whole.items())


def test_best_moe_model_has_its_expert_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"max_steps": 4, "save_steps": 2, "eval_steps": 2, "load_best_model_at_end": True}
    path = recipe(tmp_path, grown(tmp_path, "mixtral", layers_to=4), **settings)
    run(capsys, "train", path)
    out = tmp_path / "out"
    best = json.loads((out / "checkpoint-4" / "trainer_state.json").read_text())["best_model_checkpoint"]
    result, held = (load_file(Path(p) / "model.safetensors") for p in (out, best))
    assert all(torch.equal(result[n], t) for n, t in held.items())


# ---- settings and schedule ----------------------------------------------------------------------------------------------------------------


def group_of(checkpoint: Path) -> dict[str, Any]:
    group: dict[str, Any] = read_optimizer(checkpoint / POSITIONS)[0][0]
    return group


def test_recipe_settings_override_checkpoint_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = grow(capsys, train_source_checkpoint(tmp_path, capsys, adam_beta2=0.9, adam_epsilon=1e-7), tmp_path / "grown")
    capsys.readouterr()
    own = {
        "learning_rate": 4e-3,
        "adam_beta1": 0.8,
        "weight_decay": None,
        "warmup_steps": 0,
        "max_steps": 10,
        "save_steps": 5,
        "logging_steps": 1,
    }
    path = recipe(tmp_path, start, resume_from_checkpoint=str(start), **{**SMALL, **own})
    assert main(["train", str(path)]) == 0
    output = capsys.readouterr().err
    expected_message = "learning_rate 0.004 is the recipe's, weight_decay 0.01 is the checkpoint's, adam_beta1 0.8 is the recipe's, adam_beta2 0.9 is the checkpoint's"
    assert expected_message in output, output
    out = tmp_path / "out"
    assert logged_learning_rates(out) == pytest.approx({s: 4e-3 * (1 - (s - 1) / 10) for s in range(5, 11)})
    group = group_of(out / "checkpoint-5")  # the recipe's save_steps, not the 4 of the checkpoint
    assert (group["betas"], group["weight_decay"], group["eps"]) == ((0.8, 0.9), 0.01, 1e-7)
    assert [p.name for p in sorted(out.glob("checkpoint-*"))] == ["checkpoint-10", "checkpoint-5"]
    event = next(e for e in read_events(out / "events.jsonl") if e["event"] == "settings")
    assert event["learning_rate"] == [4e-3, "recipe"] and event["adam_epsilon"] == [1e-7, "checkpoint"]
    # Equal settings are not reported.
    output = run(capsys, "train", path, "--overwrite", "--learning_rate", 1e-3, "--adam_beta1", 0.9, "--weight_decay", 0.01, "--adam_beta2", 0.9,
               "--adam_epsilon", 1e-7)  # fmt: skip
    assert "settings" not in {e["event"] for e in read_events(out / "events.jsonl")}


def test_learning_rate_can_be_changed_on_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, grown(tmp_path), max_steps=6, save_steps=3)
    run(capsys, "train", path)
    shutil.rmtree(tmp_path / "out" / "checkpoint-6")
    run(capsys, "train", path, "--resume", "--learning_rate", 1e-3)
    assert logged_learning_rates(tmp_path / "out") == {**dict.fromkeys((1, 2, 3), 1e-2), **dict.fromkeys((4, 5, 6), 1e-3)}


def test_reset_policy_drops_moments_and_keeps_schedule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Step 5 of 8 after a warm-up of 2: no second warm-up, neither here nor in a plain Trainer."""
    start = grow(capsys, train_source_checkpoint(tmp_path, capsys), tmp_path / "grown", "--optimizer-policy", "reset")
    assert read_optimizer(start / POSITIONS)[1] == {}
    run(capsys, "train", recipe(tmp_path, start, resume_from_checkpoint=str(start), **{**SMALL, "max_steps": 8}))
    expected = {s: 1e-3 * (8 - (s - 1)) / 6 for s in range(5, 9)}
    assert logged_learning_rates(tmp_path / "out") == pytest.approx(expected)
    after = read_optimizer(tmp_path / "out" / "checkpoint-8" / POSITIONS)[1]
    assert {int(s["step"]) for s in after.values()} == {4}, "the moments started from zero"
    ids = torch.randint(3, 64, (16, 12), generator=torch.Generator().manual_seed(0))
    arguments = TrainingArguments(
        str(tmp_path / "plain"), max_steps=8, per_device_train_batch_size=2, learning_rate=1e-3, lr_scheduler_type="linear", warmup_steps=2,
        logging_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    rows = [{"input_ids": i, "labels": i} for i in ids]
    plain = Trainer(AutoModelForCausalLM.from_pretrained(start), arguments, train_dataset=rows)
    plain.train(resume_from_checkpoint=str(start))
    found = {e["step"]: e["learning_rate"] for e in plain.state.log_history if "learning_rate" in e and e["step"] > 4}
    assert found == pytest.approx(expected)


# ---- state by name (FSDP), and DeepSpeed, whose state is not read ----------------------------------------------------------------------


def save_state_by_name(model: Any, optimizer: Any, folder: Path) -> None:
    """optimizer.bin, as accelerate makes it under FSDP2 with FULL_STATE_DICT."""
    torch.save(get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True)), folder / NAMES)
    (folder / POSITIONS).unlink()


def assert_same_state(one: Any, other: Any) -> None:
    assert one.keys() == other.keys()
    for n, s in one.items():
        assert s.keys() == other[n].keys()
        assert all(torch.equal(v, other[n][k]) for k, v in s.items()), n


@pytest.mark.parametrize("policy", ["map", "keep-and-zero", "reset"])
@pytest.mark.parametrize("growth", ["width", "identity", "stack"])
@pytest.mark.parametrize("case", [BY_NAME[n] for n in ("llama", "llama-tied", "mixtral")], ids=str)
def test_optimizer_state_by_name_grows_like_state_by_position(case: Any, growth: str, policy: Any, tmp_path: Path) -> None:
    model, optimizer = trained(case, tmp_path)
    plan = api.plan(model, **GROWTHS[growth])
    for out in ("by-position", "by-name"):
        (tmp_path / out).mkdir()
        if out == "by-name":
            save_state_by_name(model, optimizer, tmp_path)
        grow_trainer_state(tmp_path, tmp_path / out, plan, policy)
    larger = grow_model(model, plan)
    names = trainer_param_groups(larger)
    groups, state = read_optimizer(tmp_path / "by-position" / POSITIONS)
    expected = by_name(groups, state, names)[1]
    found_groups, found = read_optimizer(tmp_path / "by-name" / NAMES)
    fresh = found.keys() - expected.keys()
    assert all(not v.any() for n in fresh for v in found[n].values()), "new state is AdamW's initial state"
    assert bool(fresh) == (growth == "identity" and policy != "reset")
    assert_same_state(expected, {n: s for n, s in found.items() if n not in fresh})
    assert [g["params"] for g in found_groups] == names
    after = adamw(larger)
    after.load_state_dict(by_position(found_groups, found, names))
    loss = larger(tokens(model), labels=tokens(model)).loss
    loss.backward()
    after.step()


def test_one_process_resumes_from_state_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same run from the same state in either form."""
    checkpoint = train_source_checkpoint(tmp_path, capsys)
    start = grow(capsys, checkpoint, tmp_path / "grown")
    path = recipe(tmp_path, start, resume_from_checkpoint=str(start), **{**SMALL, "max_steps": 8})
    run(capsys, "train", path, "-o", tmp_path / "one")
    groups, state = read_optimizer(start / POSITIONS)
    named, by_names = by_name(groups, state, trainer_param_groups(AutoModelForCausalLM.from_pretrained(start)))
    torch.save({"state": by_names, "param_groups": named}, start / NAMES)
    (start / POSITIONS).unlink()
    run(capsys, "train", path, "-o", tmp_path / "two")
    one, two = (load_file(tmp_path / f / "model.safetensors") for f in ("one", "two"))
    assert all(torch.equal(two[n], t) for n, t in one.items())


def test_optimizer_state_of_other_parameters_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = grow(capsys, train_source_checkpoint(tmp_path, capsys), tmp_path / "grown")
    groups, state = read_optimizer(start / POSITIONS)
    torch.save({"state": state, "param_groups": groups[:1]}, start / POSITIONS)
    path = recipe(tmp_path, start, resume_from_checkpoint=str(start), **{**SMALL, "max_steps": 8})
    output = run(capsys, "train", path, status=2)["error"]
    assert "is not the state of this optimizer" in output and "--optimizer-policy reset" in output


def test_deepspeed_checkpoint_grows_with_reset_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint as Trainer writes it under ZeRO: sharded pickles, the schedule, the trainer state."""
    checkpoint = train_source_checkpoint(tmp_path, capsys)
    (checkpoint / POSITIONS).unlink()
    (checkpoint / "global_step4").mkdir()
    (checkpoint / "global_step4" / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"a pickle")
    words = [
        "depth",
        str(checkpoint),
        "--method",
        "identity",
        "--layers-to",
        "4",
        "-o",
        str(tmp_path / "grown"),
        "--with-optimizer",
        str(checkpoint),
    ]
    assert main(words) == 2
    output = capsys.readouterr().err
    assert "DeepSpeed" in output and "--optimizer-policy reset" in output and "zero_to_fp32.py" in output
    assert not (tmp_path / "grown").exists()
    run(capsys, *words, "--optimizer-policy", "reset")
    run(capsys, "train", recipe(tmp_path, tmp_path / "grown", resume_from_checkpoint=str(tmp_path / "grown"), **{**SMALL, "max_steps": 8}))
    assert logged_learning_rates(tmp_path / "out") == pytest.approx({s: 1e-3 * (8 - (s - 1)) / 6 for s in range(5, 9)})
    assert len(logged(tmp_path / "out")) == 4
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    with pytest.raises(SourceError, match=r"has no optimizer\.pt"):
        grow_trainer_state(nothing, tmp_path / "out", None, "reset")  # type: ignore[arg-type]
