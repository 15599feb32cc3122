"""GrowTrainer in Python: the training of `hf-grow train`, resumed runs, growth.json in what it writes, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from facade_process import config, documents
from models import BY_NAME, make
from safetensors.torch import load_file
from trained import grown, recipe, run, tokenizer
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments

import hf_grow
from hf_grow import EWC, L2SP, GrowConfig, GrowTrainer, InputError


def test_grow_trainer_equals_hf_grow_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = grown(tmp_path)
    path = recipe(tmp_path, model, train="new_layers", warmup={"lr": 2.0}, regularizer={"kind": "l2sp", "lambda": 0.5},
                  data={"shuffle": False})  # fmt: skip
    run(capsys, "train", path)
    trainer = GrowTrainer(
        str(model), args=config(tmp_path / "python", train="new_layers", new_lr=2, per_device_eval_batch_size=2),
        regularizer=L2SP(strength=0.5), train_dataset=documents(tmp_path, "new"),
        eval_dataset={"old": documents(tmp_path, "old").select(range(4)), "new": documents(tmp_path, "new").select(range(4))},
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    command, python = load_file(tmp_path / "out" / "model.safetensors"), load_file(tmp_path / "saved" / "model.safetensors")
    assert command.keys() == python.keys() and all(torch.equal(command[n], python[n]) for n in command)
    start = load_file(model / "model.safetensors")
    assert {int(n.split(".")[2]) for n in python if not torch.equal(python[n], start[n])} == {1, 3}
    record = json.loads((tmp_path / "saved" / "growth.json").read_text())["training"]
    assert (record["steps"], record["tokens"]) == (6, 6 * 2 * 16)
    assert record["recipe"]["train"] == "new_layers" and record["recipe"]["warmup"] == {"lr": 2} and record["recipe"]["max_steps"] == 6
    assert set(record["losses"]["start"]) == {"old", "new"} and record["files"]
    assert json.loads((tmp_path / "python" / "checkpoint-3" / "growth.json").read_text())["training"]["steps"] == 3
    assert any("eval_forgetting" in entry for entry in trainer.state.log_history)
    AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


class StopAt(TrainerCallback):  # type: ignore[misc]
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_training_stop = state.global_step >= 3
        return control


def test_resumed_grow_trainer_equals_uninterrupted_run(tmp_path: Path) -> None:
    model = grown(tmp_path)
    recipe(tmp_path, model)
    data = documents(tmp_path, "new")

    def trainer(name: str, **options: Any) -> GrowTrainer:
        args = config(tmp_path / name, new_lr=0.5, eval_strategy="no", train_sampling_strategy="random")
        return GrowTrainer(model, args, train_dataset=data, regularizer=L2SP(strength=1), **options)

    whole = trainer("whole")
    whole.train()
    trainer("cut", callbacks=[StopAt()]).train()
    rest = trainer("cut")
    rest.train(resume_from_checkpoint=True)
    for (name, p), q in zip(whole.model.named_parameters(), rest.model.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_in_memory_model_with_plan(tmp_path: Path) -> None:
    small = make(BY_NAME["llama"], num_hidden_layers=2)
    plan = hf_grow.plan(small, "identity", layers_to=4)
    model = hf_grow.grow_model(small, plan)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    rows = Dataset.from_list([{"input_ids": list(range(3, 3 + n))} for n in (9, 12, 7, 12) * 4])
    args = config(tmp_path / "out", train="new_layers", eval_strategy="no")
    trainer = GrowTrainer(model, args, train_dataset=rows, processing_class=tokenizer(), plan=plan)
    trainer.train()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all(".layers.1." in n or ".layers.3." in n for n in moved)
    trainer.save_model()
    assert json.loads((tmp_path / "out" / "growth.json").read_text())["training"]["steps"] == 6


def silent(out: Path, **settings: Any) -> GrowConfig:
    return config(out, **{"eval_strategy": "no", **settings})


REFUSED: dict[str, tuple[Any, str]] = {
    "part": (lambda f, d: GrowTrainer(f, silent(f.parent / "o", train="heads"), train_dataset=d), "there is no part 'heads'"),
    "arguments": (lambda f, d: GrowTrainer(f, TrainingArguments("o"), train_dataset=d), "needs a GrowConfig"),
    "no data": (lambda f, d: GrowTrainer(f, silent(f.parent / "o")), "train_dataset"),
    "column": (lambda f, d: GrowTrainer(f, silent(f.parent / "o", text_field="body"), train_dataset=d), "column 'body'"),
    "fisher": (lambda f, d: GrowTrainer(f, silent(f.parent / "o"), train_dataset=d, regularizer=EWC("none.safetensors")), "none.safetensors"),
    "regularizer": (lambda f, d: GrowTrainer(f, silent(f.parent / "o"), train_dataset=d, regularizer="ewc"), "EWC"),
    "twice": (lambda f, d: config(f.parent / "o", new_lr=2, warmup={"lr": 3}), "same setting"),
    "key": (lambda f, d: config(f.parent / "o", monitor={"treshold": 3}), "treshold: unknown key"),
    "transformers": (lambda f, d: config(f.parent / "o", eval_strategy="sometimes"), "sometimes"),
    "rollback": (lambda f, d: GrowTrainer(f, silent(f.parent / "o", monitor={"on_instability": "rollback"}, train_sampling_strategy="random"),
                                          train_dataset=d), "sequential"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_fails(case: str, tmp_path: Path) -> None:
    model = grown(tmp_path)
    make_it, words = REFUSED[case]
    with pytest.raises(InputError) as error:
        make_it(model, Dataset.from_list([{"text": "w1 w2 w3"}]))
    assert words in f"{error.value.message} {error.value.hint}"
