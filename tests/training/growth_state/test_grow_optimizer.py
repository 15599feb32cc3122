"""Optimizer state grown with the weights: names, maps, policies, and Trainer that resumes from the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adam_states import CASES, GROWTHS, adamw, train, trained
from models import BY_NAME, Case, make, save
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from hf_grow import api
from hf_grow.cli import main
from hf_grow.convert.in_memory import disk_names, grow_model
from hf_grow.errors import ExecutionError, InputError, SourceError
from hf_grow.growth.evaluate import Evaluator
from hf_grow.growth.tensors import InMemoryTensors
from hf_grow.model.meta_model import trainer_param_groups
from hf_grow.training.growth_state import trajectory
from hf_grow.training.growth_state.grow_optimizer import Policy, grow_optimizer, grow_trainer_state


def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def moments(model: PreTrainedModel, optimizer: torch.optim.Optimizer, moment: str) -> dict[str, torch.Tensor]:
    """By names on disk."""
    found = {n: optimizer.state[p][moment] for n, p in model.named_parameters() if p in optimizer.state}
    return disk_names(model, found)


def load_grown_optimizer(grown: PreTrainedModel, out: Path, **options: Any) -> torch.optim.AdamW:
    optimizer = adamw(grown, **options)
    optimizer.load_state_dict(torch.load(out / "optimizer.pt", weights_only=True))
    return optimizer


@pytest.mark.parametrize("growth", GROWTHS)
@pytest.mark.parametrize("case", [BY_NAME[n] for n in CASES], ids=str)
def test_map_policy_moments_match_grown_parameters(case: Case, growth: str, tmp_path: Path) -> None:
    model, optimizer = trained(case, tmp_path)
    plan = api.plan(model, **GROWTHS[growth])
    grown = grow_model(model, plan)
    (tmp_path / "out").mkdir()
    report = grow_trainer_state(tmp_path, tmp_path / "out", plan)
    assert report.step == 3
    after = load_grown_optimizer(grown, tmp_path / "out")
    for moment, quantity in (("exp_avg", "grad"), ("exp_avg_sq", "grad2")):
        found = moments(grown, after, moment)
        held = moments(model, optimizer, moment)
        evaluator = Evaluator(plan, InMemoryTensors(held), quantity)
        identity = {i for i, o in enumerate(plan.growth.layers) if o.identity}
        for name, info in plan.targets.items():
            if plan.architecture.tensors[name].layer in identity:
                assert name not in found
            else:
                expected = evaluator.rows(plan.growth.tensors[name], 0, info.shape[0])
                torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-12)
    assert {int(s["step"]) for s in after.state.values()} == {3}
    train(grown, after, 2)  # and goes on
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text()) == {"global_step": 3}


@pytest.mark.parametrize("policy", ["map", "keep-and-zero", "reset"])
@pytest.mark.parametrize(("name", "growth"), [("llama", "width"), ("llama-tied", "identity"), ("mixtral", "stack"), ("qwen3", "aki")])
def test_grow_optimizer_equals_grow_trainer_state(name: str, growth: str, policy: Policy, tmp_path: Path) -> None:
    model, optimizer = trained(BY_NAME[name], tmp_path)
    plan = api.plan(model, **GROWTHS[growth])
    grown = grow_model(model, plan)
    grow_trainer_state(tmp_path, out(tmp_path), plan, policy)
    on_disk = load_grown_optimizer(grown, tmp_path / "out")
    for source in (None, model):
        after = grow_optimizer(optimizer, plan, grown, source=source, policy=policy)
        assert type(after) is torch.optim.AdamW and [g["weight_decay"] for g in after.param_groups] == [0.1, 0.0]
        assert after.state.keys() == on_disk.state.keys() and bool(after.state) is (policy != "reset")
        for p, held in on_disk.state.items():
            assert all(torch.equal(held[k], after.state[p][k]) for k in ("step", "exp_avg", "exp_avg_sq"))
    train(grown, after, 1)


def test_grow_optimizer_rejects_other_optimizers_and_models() -> None:
    model = make(BY_NAME["llama"])
    plan = api.plan(model, "stack")
    other = torch.optim.Adagrad(model.parameters(), lr=1e-3)
    with pytest.raises(SourceError, match=r"keeps step, sum of model.embed_tokens.weight: there is no exact map"):
        grow_optimizer(other, plan, grow_model(model, plan))
    assert not grow_optimizer(torch.optim.SGD(model.parameters(), lr=1), plan, grow_model(model, plan), policy="reset").state
    with pytest.raises(InputError, match="not those of `source`"):
        grow_optimizer(adamw(model), plan, grow_model(model, plan), source=make(BY_NAME["llama"]))


def test_keep_and_zero_keeps_old_entries_and_zeroes_new_ones(tmp_path: Path) -> None:
    model, optimizer = trained(BY_NAME["llama"], tmp_path)
    plan = api.plan(model, "tile", factor=2, symmetry="none")
    grown = grow_model(model, plan)
    grow_trainer_state(tmp_path, out(tmp_path), plan, "keep-and-zero")
    after = load_grown_optimizer(grown, tmp_path / "out")
    for moment in ("exp_avg", "exp_avg_sq"):
        old, new = moments(model, optimizer, moment), moments(grown, after, moment)
        for name, value in old.items():
            corner = tuple(slice(0, n) for n in value.shape)
            if "q_proj" in name or "o_proj" in name or "k_proj" in name or "v_proj" in name:
                continue  # heads are dealt inside groups; the counts below hold for them too
            assert torch.equal(new[name][corner], value), name
        assert all((new[n] != 0).sum() == (old[n] != 0).sum() for n in old)


def test_keep_and_zero_maps_second_moment_for_large_beta2(tmp_path: Path) -> None:
    model, _ = trained(BY_NAME["llama"], tmp_path, betas=(0.9, 0.999))
    plan = api.plan(model, "tile", factor=2, symmetry="none")
    grow_trainer_state(tmp_path, out(tmp_path), plan, "keep-and-zero")
    after = load_grown_optimizer(grow_model(model, plan), tmp_path / "out", betas=(0.9, 0.999))
    up = next(
        p
        for n, p in zip(
            [n for g in trainer_param_groups(grow_model(model, plan)) for n in g],
            [p for g in after.param_groups for p in g["params"]],
            strict=True,
        )
        if "up_proj" in n
    )
    assert (after.state[up]["exp_avg"] == 0).float().mean() > 0.7
    assert (after.state[up]["exp_avg_sq"] == 0).float().mean() < 0.1


def test_keep_and_zero_zeroes_moments_of_repeated_layers(tmp_path: Path) -> None:
    model, optimizer = trained(BY_NAME["llama"], tmp_path)
    plan = api.plan(model, "stack")
    grown = grow_model(model, plan)
    grow_trainer_state(tmp_path, out(tmp_path), plan, "keep-and-zero")
    new, old = moments(grown, load_grown_optimizer(grown, tmp_path / "out"), "exp_avg"), moments(model, optimizer, "exp_avg")
    assert torch.equal(new["model.layers.1.mlp.up_proj.weight"], old["model.layers.1.mlp.up_proj.weight"])
    assert not new.get("model.layers.5.mlp.up_proj.weight", torch.zeros(1)).any()


def test_reset_writes_no_moments(tmp_path: Path) -> None:
    model, _ = trained(BY_NAME["llama"], tmp_path)
    (tmp_path / "out").mkdir()
    grow_trainer_state(tmp_path, tmp_path / "out", api.plan(model, "stack"), "reset")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"trainer_state.json", "optimizer.pt"}
    saved = torch.load(tmp_path / "out" / "optimizer.pt", weights_only=True)
    assert saved["state"] == {} and [g["weight_decay"] for g in saved["param_groups"]] == [0.1, 0.0]


@pytest.mark.parametrize("policy", ["map", "keep-and-zero"])
def test_fused_optimizer_with_custom_named_groups(policy: Policy, tmp_path: Path) -> None:
    def grouped(model: PreTrainedModel) -> list[dict[str, Any]]:
        named = list(model.named_parameters())
        return [
            {"params": [(n, p) for n, p in named if "embed" in n], "lr": 1e-4},
            {"params": [(n, p) for n, p in named if "embed" not in n]},
        ]

    model = make(BY_NAME["mistral"])
    optimizer = adamw(model, groups=grouped(model), fused=True)
    train(model, optimizer, 2)
    save(model, tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    plan = api.plan(model, "identity")
    grow_trainer_state(tmp_path, out(tmp_path), plan, policy)
    grown = grow_model(model, plan)
    after = load_grown_optimizer(grown, tmp_path / "out", groups=grouped(grown), fused=True)
    assert after.param_groups[0]["lr"] == 1e-4
    old, new = moments(model, optimizer, "exp_avg"), moments(grown, after, "exp_avg")
    assert torch.equal(new["model.layers.0.mlp.up_proj.weight"], old["model.layers.0.mlp.up_proj.weight"])
    train(grown, after, 1)


BROKEN = {
    "nothing": (lambda f: None, "has no optimizer.pt"),
    "deepspeed": (lambda f: (f / "global_step5").mkdir(), "DeepSpeed"),
    "fsdp": (lambda f: (f / "optimizer_0").mkdir(), "FSDP"),
    "not a pickle": (lambda f: (f / "optimizer.pt").write_bytes(b"garbage"), "cannot be read"),
    "sgd": (lambda f: torch.save(torch.optim.SGD(make(BY_NAME["llama"]).parameters(), lr=1).state_dict(), f / "optimizer.pt"), "empty"),
    "another model": (
        lambda f: torch.save(torch.optim.AdamW(make(BY_NAME["llama"], num_hidden_layers=3).parameters()).state_dict(), f / "optimizer.pt"),
        "not those of the model",
    ),
}


def test_output_equal_to_source_folder_fails(tmp_path: Path) -> None:
    model, _ = trained(BY_NAME["llama"], tmp_path)
    with pytest.raises(InputError, match="read from there"):
        grow_trainer_state(tmp_path, tmp_path, api.plan(model, "stack"))


def test_full_disk_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    model, _ = trained(BY_NAME["llama"], tmp_path)
    plan, folder = api.plan(model, "stack"), out(tmp_path)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ExecutionError, match="could not be written"):
        grow_trainer_state(tmp_path, folder, plan)


class _PickledCode:
    def __reduce__(self) -> Any:
        return (print, ("a pickle ran",))


@pytest.mark.parametrize("case", BROKEN)
def test_unusable_optimizer_state_fails(case: str, tmp_path: Path) -> None:
    prepare, words = BROKEN[case]
    prepare(tmp_path)
    with pytest.raises(SourceError, match=words):
        grow_trainer_state(tmp_path, out(tmp_path), api.plan(make(BY_NAME["llama"]), "stack"))


def test_pickled_code_in_state_is_not_executed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state": {0: _PickledCode()}, "param_groups": []}, tmp_path / "optimizer.pt")
    with pytest.raises(SourceError, match="cannot be read"):
        grow_trainer_state(tmp_path, out(tmp_path), api.plan(make(BY_NAME["llama"]), "stack"))
    assert "a pickle ran" not in capsys.readouterr().out


class _Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 64

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, 64, (12,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


def arguments(folder: Path, steps: int) -> TrainingArguments:
    return TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=4, save_steps=4, learning_rate=1e-3, logging_steps=1, report_to="none",
        use_cpu=True, disable_tqdm=True, lr_scheduler_type="linear", weight_decay=0.01, save_total_limit=3,
    )  # fmt: skip


@pytest.mark.parametrize("growth", ["width", "identity"])
def test_trainer_resumes_grown_model_at_same_step_and_lr(growth: str, tmp_path: Path) -> None:
    model = make(BY_NAME["llama"])
    Trainer(model, arguments(tmp_path / "run", 8), train_dataset=_Rows(), callbacks=[_StopAt(4)]).train()
    stopped = tmp_path / "run" / "checkpoint-4"
    flags = {"width": ["width", "--factor", "2"], "identity": ["depth", "--method", "identity"]}[growth]
    words = [flags[0], str(stopped), *flags[1:], "-o", str(tmp_path / "grown"), "--with-optimizer", str(stopped)]
    assert main(words) == 0
    grown = AutoModelForCausalLM.from_pretrained(tmp_path / "grown")
    trainer = Trainer(grown, arguments(tmp_path / "more", 8), train_dataset=_Rows())
    trainer.train(resume_from_checkpoint=str(tmp_path / "grown"))
    logged = [e for e in trainer.state.log_history if "learning_rate" in e]
    assert trainer.state.global_step == 8
    assert [e["step"] for e in logged] == [1, 2, 3, 4, 5, 6, 7, 8]
    rates = [e["learning_rate"] for e in logged]
    assert rates == pytest.approx([1e-3 * (1 - i / 8) for i in range(8)])
    steps = {int(s["step"]) for s in trainer.optimizer.state.values()}
    assert steps == ({8} if growth == "width" else {8, 4})  # new blocks began afresh


class _StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_training_stop = state.global_step >= self.step
        return control


@pytest.mark.parametrize("name", ["llama", "llama-tied", "mixtral"])
def test_exact_steps_repeat_losses_of_source_model(name: str, tmp_path: Path) -> None:
    """The small model goes on from its checkpoint, the grown one from the grown checkpoint: the same losses."""
    model = make(BY_NAME[name])
    Trainer(model, arguments(tmp_path / "run", 8), train_dataset=_Rows(), callbacks=[_StopAt(4)]).train()
    stopped = tmp_path / "run" / "checkpoint-4"
    small = Trainer(AutoModelForCausalLM.from_pretrained(stopped), arguments(tmp_path / "small", 8), train_dataset=_Rows())
    small.train(resume_from_checkpoint=str(stopped))
    words = ["width", str(stopped), "--factor", "2", "--symmetry", "none", "-o", str(tmp_path / "grown"), "--with-optimizer", str(stopped)]
    assert main([*words, "--exact-steps"]) == 0
    plan = api.plan(stopped, "tile", factor=2, symmetry="none")
    grown = AutoModelForCausalLM.from_pretrained(tmp_path / "grown")
    optimizer = torch.optim.AdamW(trajectory.param_groups(grown, plan, lr=1e-3, weight_decay=0.01))
    large = Trainer(grown, arguments(tmp_path / "large", 8), train_dataset=_Rows(), optimizers=(optimizer, None))
    large.train(resume_from_checkpoint=str(tmp_path / "grown"))
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e and e["step"] > 4] for t in (small, large)]
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], abs=2e-4)
    assert max(losses[0]) - min(losses[0]) > 1e-3  # the losses are not all alike
