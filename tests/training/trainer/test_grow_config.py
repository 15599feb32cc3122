"""Every option of a recipe in GrowConfig: the same weights as `hf-grow train`; an optimizer that is passed; two processes; refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from facade_process import config, documents
from models import BY_NAME, make
from safetensors.torch import load_file
from trained import grown, recipe, run

import hf_grow
from hf_grow import GrowConfig, GrowTrainer, InputError
from hf_grow.training.config.train_options import TrainOptions
from hf_grow.training.trainer.events import read_events

OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"r": 4, "dropout": 0.1}},
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16", "save_dtype": "float32", "learning_rate": 0.1},
    "eager": {"attn_implementation": "eager"},
    "distilled": {"distill": {"alpha": 0.3}, "kl_rows": 2, "monitor": {"baseline": "source"}},
    "cached logits": {"distill": {"top_k": 8}},
    "cached draws": {"distill": {"samples": 8}},
}


def both(folder: Path, out: str, **settings: Any) -> GrowTrainer:
    """GrowTrainer on the texts of `trained.recipe`."""
    sets = {name: documents(folder, name) for name in ("old", "new")}
    args = config(folder / out, per_device_eval_batch_size=2, **settings)
    return GrowTrainer(folder / "grown", args, train_dataset=documents(folder, "new"), eval_dataset=sets)


def evaluations(folder: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in e.items() if k not in ("time", "flops")}
        for e in read_events(folder / "events.jsonl")
        if e["event"] == "evaluation"
    ]


def test_every_option_of_a_recipe_is_one_of_grow_config(tmp_path: Path) -> None:
    """The same defaults, too."""
    made = GrowConfig(str(tmp_path), use_cpu=True, report_to="none")
    assert {k for k in TrainOptions.model_fields if not hasattr(made, k)} == {"regularizer"}
    assert made.train_options() == TrainOptions()


@pytest.mark.parametrize("name", OPTIONS)
def test_the_same_weights_as_hf_grow_train(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"per_device_eval_batch_size": 2, "weight_decay": 0.0, **OPTIONS[name]}
    data = {"shuffle": False, "eval": {n: {"path": str(tmp_path / f"{n}.jsonl"), "sequences": None} for n in ("old", "new")}}
    run(capsys, "train", recipe(tmp_path, grown(tmp_path), data=data, **settings))
    trainer = both(tmp_path, "python", **OPTIONS[name])
    trainer.train()
    if "lora" in settings:
        assert not (tmp_path / "python" / "checkpoint-3" / "model.safetensors").exists()
        trainer.merge_and_unload()
        with pytest.raises(InputError, match="cannot be trained further"):
            trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    command, python = load_file(tmp_path / "out" / "model.safetensors"), load_file(tmp_path / "saved" / "model.safetensors")
    start = load_file(tmp_path / "grown" / "model.safetensors")
    assert command.keys() == python.keys() and all(torch.equal(command[n], python[n]) for n in command)
    assert any(not torch.equal(python[n], start[n]) for n in python)
    record = json.loads((tmp_path / "saved" / "growth.json").read_text())["training"]["recipe"]
    assert {k: v for k, v in record.items() if k in OPTIONS[name]} == OPTIONS[name]
    if "kl_rows" in settings:
        losses, own = evaluations(tmp_path / "out"), evaluations(tmp_path / "python")
        assert own == losses and all("kl" in e for e in own) and len(own) == 3
        assert own[0]["kl"] == pytest.approx(0, abs=1e-5) and own[-1]["kl"] > 1e-4


def test_dtype_of_torch(tmp_path: Path) -> None:
    recipe(tmp_path, grown(tmp_path))
    trainer = both(tmp_path, "out", dtype=torch.bfloat16, attn_implementation="eager")
    assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}
    assert trainer.model.config._attn_implementation == "eager"
    assert json.loads(trainer.args.to_json_string())["dtype"] == "bfloat16"


def test_early_stopping_loads_the_best_model(tmp_path: Path) -> None:
    recipe(tmp_path, grown(tmp_path))
    args: dict[str, Any] = {
        "max_steps": 12,
        "save_steps": 1,
        "eval_steps": 1,
        "early_stopping_patience": 2,
        "early_stopping_threshold": 100.0,
    }
    trainer = both(tmp_path, "out", **args)
    assert trainer.args.load_best_model_at_end and trainer.args.metric_for_best_model == "eval_new_loss"
    trainer.train()
    # No evaluation is better by 100 nats per token than the first one, which counts as the best.
    assert trainer.state.global_step < 12
    best = Path(trainer.state.best_model_checkpoint)
    weights = load_file(best / "model.safetensors")
    assert all(torch.equal(p, weights[n]) for n, p in trainer.model.named_parameters() if n in weights)


def test_early_stopping_of_a_single_set_and_without_the_best_model(tmp_path: Path) -> None:
    recipe(tmp_path, grown(tmp_path))
    args = config(tmp_path / "out", early_stopping_patience=1, load_best_model_at_end=False, max_steps=3, eval_steps=1)
    rows = documents(tmp_path, "new").select(range(4))
    trainer = GrowTrainer(tmp_path / "grown", args, train_dataset=rows, eval_dataset=rows)
    assert not trainer.args.load_best_model_at_end and trainer.args.metric_for_best_model == "eval_loss"
    trainer.train()
    assert args.metric_for_best_model is None, "the arguments of the caller stay as they are"


# ---- an optimizer that is passed ------------------------------------------------------------------------------------------------------------------


def in_memory(folder: Path, optimizer: Any, **settings: Any) -> GrowTrainer:
    """A grown model in memory; ``optimizer``: makes it from the model, on which all training depends."""
    recipe(folder, folder)
    small = make(BY_NAME["llama"], num_hidden_layers=2)
    plan = hf_grow.plan(small, "identity", layers_to=4)
    model = hf_grow.grow_model(small, plan)
    args = config(folder / "out", eval_strategy="no", weight_decay=0.0, adam_beta2=0.999, **settings)
    trained = documents(folder, "new").map(lambda d: {"input_ids": [3 + int(w[1:]) for w in d["text"].split()][:16]})
    options = {} if optimizer is None else optimizer(model)
    return GrowTrainer(model, args, train_dataset=trained, plan=plan, **options)


def adamw(model: Any) -> dict[str, Any]:
    """As Trainer makes it, in groups with names."""
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decay, "name": "matrices"}, {"params": rest, "name": "norms"}]
    return {"optimizers": (torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.0, fused=True), None)}


@pytest.mark.parametrize("settings", [{}, {"train": "new_layers"}, {"new_lr": 3.0, "freeze": "norms"}])
def test_an_optimizer_that_is_passed_trains_like_trainers_own(settings: dict[str, Any], tmp_path: Path) -> None:
    own = in_memory(tmp_path, None, **settings)
    own.train()
    passed = in_memory(tmp_path, adamw, **settings)
    passed.train()
    assert passed.optimizer is not own.optimizer
    for (name, p), q in zip(own.model.named_parameters(), passed.model.named_parameters(), strict=True):
        torch.testing.assert_close(q[1], p, rtol=0, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    saved = torch.load(tmp_path / "out" / "checkpoint-6" / "optimizer.pt", weights_only=True)
    assert [g["name"] for g in saved["param_groups"]] == ["matrices", "norms"]
    assert sum(len(g["params"]) for g in saved["param_groups"]) == len(list(passed.model.parameters()))


def test_a_class_of_optimizer_reaches_adapters(tmp_path: Path) -> None:
    trainer = in_memory(tmp_path, lambda model: {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})}, lora={})
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert isinstance(trainer.optimizer.optimizer, torch.optim.SGD)
    assert any("lora_B" in n for n in moved) and all("lora_" in n or ".layers.1." in n or ".layers.3." in n for n in moved)


BAD_OPTIMIZERS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "foreign": (lambda m: {"optimizers": (torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1), None)}, {}, "does not have"),
    "lacking": (lambda m: {"optimizers": (torch.optim.SGD(m.model.layers[0].parameters(), 0.1), None)}, {}, "lacks"),
    "adapters": (adamw, {"lora": {}}, "Adapters are added by GrowTrainer"),
    "scheduler": (
        lambda m: {"optimizers": (None, torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD(m.parameters(), 0.1), lambda s: 1.0))},
        {}, "to another optimizer",
    ),
    "model_init": (lambda m: {"model_init": lambda: m}, {}, "model_init"),
    "dtype": (None, {"dtype": "bfloat16"}, "dtype: would have no effect"),
    "revision": (None, {"revision": "main", "attn_implementation": "eager"}, "revision, attn_implementation: would have no effect"),
    "lora and freeze": (None, {"lora": {}, "freeze": "norms"}, "lora: determines what trains"),
    "patience": (None, {"early_stopping_patience": 2}, "needs evaluations"),
    "threshold": (None, {"early_stopping_threshold": 0.1}, "requires early_stopping_patience"),
    "half": (None, {"dtype": "half"}, "dtype"),
    "rank": (None, {"lora": {"rank": 2}}, "unknown key"),
    "adapterless": (lambda m: {}, {"lora": {"target_modules": ["nothing"]}}, "no inherited linear layer named nothing"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_OPTIMIZERS)
def test_what_has_no_effect_is_refused(case: str, tmp_path: Path) -> None:
    optimizer, settings, words = BAD_OPTIMIZERS[case]
    with pytest.raises(InputError) as error:
        in_memory(tmp_path, optimizer, **settings)
    assert words in f"{error.value.message} {error.value.hint}"
    assert not (tmp_path / "out").exists()


def test_nothing_to_merge_and_no_eval_set(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no adapters"):
        in_memory(tmp_path, None).merge_and_unload()
    args = config(tmp_path / "o", early_stopping_patience=2)
    with pytest.raises(InputError, match="early_stopping_patience: needs an evaluation set"):
        GrowTrainer(grown(tmp_path / "other"), args, train_dataset=documents(tmp_path, "new"))
