"""Training recipes: strict, every mistake at once, status 2; overriding on the command line; nothing written before all is well."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from models import BY_NAME, make, save
from penalties import fisher_of
from safetensors.torch import load_file
from trained import FAST, WORDS, grown, recipe, run, source, text, tokenizer
from transformers import AutoModelForCausalLM

from hf_grow.cli import main
from hf_grow.errors import InputError
from hf_grow.training.config.recipe_files import RECIPES, parse_overrides
from hf_grow.training.config.train_config import SET_BY_HF_GROW, TrainRecipe, read_recipe, training_arguments_model
from hf_grow.training.regularizers.importance_file import checkpoint_fingerprint, model_fingerprint
from hf_grow.training.setup.recipe_checks import arguments_for


def test_all_mistakes_of_all_kinds_are_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Unknown keys, strings for numbers, missing files, a tokenizer and a Fisher of other models, an output that is there: one message."""
    model = grown(tmp_path)
    large = tokenizer([*WORDS, "more", "words"])
    large.save_pretrained(tmp_path / "large")
    other = source(tmp_path / "other", hidden_size=24)
    fisher = fisher_of(other, tmp_path / "other.safetensors")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("dear")
    path = recipe(
        tmp_path, model, learning_rate="fast", save_steps="1e-3", lerning_rate=1.0, bf16="yes", optim="adamm",
        warmup={"alpha_step": 3, "steps": "many"}, train=["new", "wings"], tokenizer=str(tmp_path / "large"),
        regularizer={"kind": "ewc", "fisher": str(fisher), "lambda": "10"}, output_dir="there",
        monitor={"on_instability": "panic"},
        data={"seq_lenght": 5, "train": str(tmp_path / "nowhere.txt"), "eval": {"old": str(tmp_path / "gone"), "new": str(text(tmp_path, "new"))}},
    )  # fmt: skip
    said = run(capsys, "train", path, status=2)["error"]
    told = said.splitlines()
    for line in (
        "learning_rate: should be a valid number", "save_steps: '1e-3' is a string. YAML needs a plain number",
        "lerning_rate: unknown key. Did you mean learning_rate?", "bf16: should be", "optim: should be",
        "warmup.alpha_step: unknown key. Did you mean alpha_steps? Known: alpha_start, alpha_steps", "warmup.steps: should be a valid integer",
        "train: there is no part 'wings'", "tokenizer: has 65 tokens, but the model's vocabulary has 64", "regularizer.lambda: '10' is a string",
        "output_dir: is set by hf-grow; use output", "monitor.on_instability: should be", "data.train.0: ", "data.eval.old: ",
        "data.seq_lenght: unknown key. Did you mean seq_length?", f"regularizer.fisher: {fisher} belongs to another model", "output: ",
    ):  # fmt: skip
        assert any(t.strip().startswith(line) for t in told), (line, said)
    assert f"has {len(told) - 1} mistakes" in told[0]
    assert "Traceback" not in said


def test_a_fisher_of_the_same_shape_but_other_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = source(tmp_path / "model")
    twin = source(tmp_path / "twin", rms_norm_eps=1e-2)
    other = save(make(BY_NAME["llama"], num_hidden_layers=2, seed=5), tmp_path / "seed")
    assert stored_samples_of(model) == stored_samples_of(twin)
    assert stored_samples_of(model) != stored_samples_of(other)
    right, wrong = fisher_of(model, tmp_path / "right.safetensors"), fisher_of(other, tmp_path / "wrong.safetensors")
    said = run(capsys, "train", recipe(tmp_path, model, regularizer={"kind": "ewc", "fisher": str(wrong)}), "--dry-run", status=2)["error"]
    assert "regularizer.fisher" in said and "1 mistake:" in said
    run(capsys, "train", recipe(tmp_path, model, regularizer={"kind": "ewc", "fisher": str(right)}, max_steps=1))


def stored_samples_of(folder: Path) -> str:
    from hf_grow.checkpoint.reader import open_folder

    return checkpoint_fingerprint(open_folder(folder))


@pytest.mark.parametrize("case", ["llama-tied", "mixtral", "qwen3_moe-mixed", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_identity_of_a_folder_is_that_of_its_model(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = make(BY_NAME[case], dtype=dtype)
    assert stored_samples_of(save(model, tmp_path / "m", sharded=True)) == model_fingerprint(model)


CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"data": {"streaming": True}, "max_steps": None}, "max_steps: is missing; the length of streamed text"),
    ({"warmup": {"alpha_steps": 7}}, "warmup.alpha_steps: 7 is more than max_steps 6"),
    ({"phases": [{"steps": 4, "train": "new"}, {"steps": 2, "train": "new"}]}, "phases: take 6 steps"),
    ({"lora": {}, "regularizer": {"kind": "l2sp"}}, "regularizer: has no effect with `lora`"),
    ({"lora": {}, "freeze": "norms"}, "lora: determines what trains"),
    ({"early_stopping_patience": 2, "data": {"eval": {}}}, "early_stopping_patience: needs an evaluation set"),
    ({"kl_rows": 2, "old_set": "ancient"}, "kl_rows: there is no evaluation set 'ancient'"),
    ({"resume_from_checkpoint": "nowhere"}, "resume_from_checkpoint: nowhere is not a Trainer checkpoint"),
    ({"eval_steps": 4, "save_steps": 3, "load_best_model_at_end": True, "metric_for_best_model": "eval_new_loss"}, "arguments: "),
    (
        {"metric_for_best_model": "eval_loss"},
        "metric_for_best_model: 'eval_loss' is not measured. Measured: eval_forgetting, eval_new_loss",
    ),
    ({"report_to": "comet_ml"}, "arguments: "),
    ({"model": "./nowhere"}, "model: There is no folder"),
    ({"phases": [{"steps": 1, "train": "the engine"}]}, "phases.train: there is no part 'the engine'"),
    ({"data": None}, "data: is missing"),
    ({"data": {"streaming": True}, "dataloader_num_workers": 2}, "dataloader_num_workers: streamed text cannot be read by 2 workers"),
    (
        {"data": {"streaming": True}, "distill": {"teachers": [{"model": "m"}], "top_k": 4}},
        "distill.top_k: does not work with streaming",
    ),
    ({"fp16": True, "dtype": "float16"}, "dtype: float16 does not work with fp16"),
    ({"old_set": "ancient"}, "old_set: there is no evaluation set 'ancient'"),
    ({"save_strategy": "best", "data": {"eval": {}}}, "save_strategy: needs an evaluation set"),
    ({"load_best_model_at_end": True, "data": {"eval": {}}}, "load_best_model_at_end: needs an evaluation set"),
    ({"data": {"seq_length": 5000}}, "data.seq_length: 5000 is more than the"),
    ({"optim": "adalomo"}, "arguments: optim adalomo: You need to install"),
    ({"push_to_hub": True}, "push_to_hub: is set by hf-grow; use hf-grow push"),
    ({"regularizer": {"kind": "l2sp", "lambda": float("inf")}}, "regularizer.lambda: should be a finite number"),
]


@pytest.mark.parametrize(("changes", "line"), CONTRADICTIONS, ids=[c[1][:24] for c in CONTRADICTIONS])
def test_what_cannot_be(changes: dict[str, Any], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = grown(tmp_path)
    base = recipe(tmp_path, model)
    data = yaml.safe_load(base.read_text())
    for key, value in changes.items():
        data[key] = {**data[key], **value} if key == "data" and value is not None else value
    base.write_text(yaml.safe_dump({k: v for k, v in data.items() if v is not None}))
    said = run(capsys, "train", base, status=2)["error"]
    assert any(t.strip().startswith(line) for t in said.splitlines()), said
    assert not (tmp_path / "out").exists()


NUMBERS = [
    ("max_steps", 0), ("max_steps", -5), ("num_train_epochs", 0), ("learning_rate", -1.0), ("learning_rate", float("nan")),
    ("per_device_train_batch_size", 0), ("gradient_accumulation_steps", 0), ("adam_beta2", 1.0), ("weight_decay", -0.1), ("max_grad_norm", -1.0),
    ("save_steps", -1), ("save_total_limit", 0), ("warmup_steps", -1), ("adam_epsilon", 0.0), ("learning_rate", float("inf")),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), NUMBERS, ids=str)
def test_numbers_that_cannot_be(key: str, value: float) -> None:
    found = read_recipe({"model": "m", "data": {"train": "t"}, key: value}).mistakes
    assert len(found) == 1 and found[0].startswith(f"{key}: ")


def test_numbers_at_the_edge_and_words_that_yaml_takes_for_false() -> None:
    whole = {
        "model": "m",
        "data": {"train": "t"},
        "max_steps": -1,
        "weight_decay": 0,
        "adam_beta1": 0.0,
        "max_grad_norm": 0.0,
        "eval_steps": None,
    }
    found = read_recipe({**whole, **yaml.safe_load("save_strategy: no\nlogging_strategy: no")})
    assert not found.mistakes
    made = arguments_for(
        TrainRecipe.model_validate({"model": "m", "data": {"train": "t"}}), {**found.arguments, "use_cpu": True}, Path("out")
    )
    assert made.save_strategy == made.logging_strategy == "no"


def test_memory_is_pinned_where_that_is_possible_and_nobody_says_otherwise() -> None:
    """torch warns on a CPU, at every evaluation."""
    plain = TrainRecipe.model_validate({"model": "m", "data": {"train": "t"}})
    made = arguments_for(plain, {}, Path("out"))
    assert made.dataloader_pin_memory is (made.device.type not in ("cpu", "mps"))
    for said in (True, False):
        assert arguments_for(plain, {"dataloader_pin_memory": said}, Path("out")).dataloader_pin_memory is said


@pytest.mark.parametrize("wrong", ["lambda", "list", "inside", "whole", "model"])
def test_wrong_keys_hide_nothing_beside_them(wrong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is wrong with files is told also where keys of the same section are wrong."""
    changes: dict[str, Any] = {
        "lambda": {"regularizer": {"kind": "ewc", "lambda": -1, "fisher": str(tmp_path / "gone")}},
        "list": {"phases": [{"steps": 1, "train": "wings"}, {"steps": 0, "train": "new"}]},
        "inside": {"data": {"eval": {"old": {"path": str(tmp_path / "gone"), "paht": 1}}}},
        "whole": {"data": {"train": []}, "regularizer": {"kind": "ewc", "fisher": str(tmp_path / "gone")}},
        "model": {"output": 5, "data": {"train": str(tmp_path / "gone")}},
    }
    path = recipe(tmp_path, source(tmp_path / "model"), **changes[wrong])
    if wrong == "model":
        path.write_text(
            path.read_text().replace(f"model: {tmp_path / 'model'}", "model: 5").replace("output: 5", f"output: {tmp_path / 'out'}")
        )
    said = run(capsys, "train", path, status=2)["error"]
    assert "has 2 mistakes" in said, said
    assert ("wings" if wrong == "list" else "gone") in said


def test_a_growth_json_of_another_model_or_of_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = grown(tmp_path)
    record = (model / "growth.json").read_text()
    for damaged, words in (("{}", "does not say its format"), ("[]", "must hold a JSON object"), ("{", "is not valid JSON")):
        (model / "growth.json").write_text(damaged)
        assert words in run(capsys, "train", recipe(tmp_path, model), status=2)["error"]
    (tmp_path / "source" / "growth.json").write_text(record)
    said = run(capsys, "train", recipe(tmp_path, tmp_path / "source", train="new_layers"), status=2)["error"]
    assert "growth.json belongs to another model" in said and "layers.2" in said
    assert not (tmp_path / "out").exists()


def test_weights_in_fp16_are_trained_in_fp32(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Adam's epsilon is zero in fp16, and the square of a small gradient too."""
    model = source(tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.float16).save_pretrained(model)
    assert load_file(model / "model.safetensors")["model.norm.weight"].dtype == torch.float16
    path = recipe(tmp_path, model, max_steps=2, save_steps=2)
    parameters = sum(t.numel() for t in load_file(model / "model.safetensors").values())
    assert run(capsys, "train", path, "--dry-run")["memory"]["weights"] == 4 * parameters
    run(capsys, "train", path)
    assert load_file(tmp_path / "out" / "checkpoint-2" / "model.safetensors")["model.norm.weight"].dtype == torch.float32
    assert load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"].dtype == torch.float16


def test_parts_that_this_model_has_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = source(tmp_path / "plain")
    said = run(capsys, "train", recipe(tmp_path, plain, train="new_layers"), status=2)["error"]
    assert "Nothing would train: this model has no new_layers" in said
    said = run(capsys, "train", recipe(tmp_path, plain, warmup={"alpha_steps": 2}), status=2)["error"]
    assert "need new blocks, and this model has none" in said
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_a_tokenizer_or_with_another_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = save(make(BY_NAME["llama"], num_hidden_layers=2), tmp_path / "bare")
    assert "has no tokenizer" in run(capsys, "train", recipe(tmp_path, bare), status=2)["error"]
    tokenizer(WORDS[::-1]).save_pretrained(tmp_path / "swapped")
    run(capsys, "train", recipe(tmp_path, bare, tokenizer=str(tmp_path / "swapped"), max_steps=1))
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    said = run(capsys, "train", recipe(tmp_path, source(tmp_path / "own"), tokenizer=str(tmp_path / "swapped")), status=2)["error"]
    assert "has other token ids" in said


def test_files_that_are_no_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content, expected in (
        ("list.yaml", "- a\n- b\n", "must hold"),
        ("broken.yaml", "a: [", "not valid YAML"),
        ("gone.yaml", None, "Cannot read"),
    ):
        if content is not None:
            (tmp_path / name).write_text(content)
        assert expected in run(capsys, "train", tmp_path / name, status=2)["error"]
    assert main(["train", "no_such_recipe"]) == 2
    assert "solar_10b7_continued" in capsys.readouterr().err


def test_overriding_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, grown(tmp_path))
    words = ["--learning_rate", "1e-3", "--data.seq_length=8", "--data.replay", f"{{path: {tmp_path / 'old.jsonl'}, share: 0.5}}", "--train",
             "[new, norms]", "--warmup.steps", "2", "--gradient-accumulation-steps", "2", "--activation_checkpointing"]  # fmt: skip
    found = run(capsys, "train", path, "--dry-run", *words, "--max_steps", 3)
    r = found["recipe"]
    assert (r["learning_rate"], r["data"]["seq_length"], r["data"]["replay"]["share"], r["train"]) == (1e-3, 8, 0.5, ["new", "norms"])
    assert (r["warmup"]["steps"], r["gradient_accumulation_steps"], r["activation_checkpointing"], r["max_steps"]) == (2, 2, True, 3)
    assert r["data"]["eval"].keys() == {"old", "new"}
    assert "--data.seq_length.x: " in run(capsys, "train", path, "--data.seq_length.x", 1, status=2)["error"]
    assert "Unexpected argument 'stray'" in run(capsys, "train", path, "stray", status=2)["error"]
    assert "unknown key" in run(capsys, "train", path, "--no_such_key", 1, status=2)["error"]


def test_words_to_values() -> None:
    found = parse_overrides(["--a.b", "1e-4", "--c=x=y", "--flag", "--none", "null", "--n", "-1", "--s", '"5"', "--list", "[1, a]"])
    assert found == {"a.b": 1e-4, "c": "x=y", "flag": True, "none": None, "n": -1, "s": "5", "list": [1, "a"]}
    with pytest.raises(InputError, match="is not valid YAML"):
        parse_overrides(["--a", "[1"])


def test_every_argument_of_trainer_may_stand_in_a_recipe() -> None:
    from dataclasses import fields

    from transformers import TrainingArguments

    known = set(training_arguments_model().model_fields)
    left = {f.name for f in fields(TrainingArguments)} - known - set(SET_BY_HF_GROW)
    assert left == {"parallelism_config", "debug"}
    assert not known & set(TrainRecipe.model_fields)
    assert set(SET_BY_HF_GROW) <= {f.name for f in fields(TrainingArguments)}


def test_defaults_and_what_follows_from_a_recipe(tmp_path: Path) -> None:
    data = {"model": "m", "data": {"train": "t", "eval": {"old": "o", "new": "n"}}, **FAST, "early_stopping_patience": 3}
    found = read_recipe(data)
    assert found.mistakes == ()
    assert found.recipe is not None
    arguments = arguments_for(found.recipe, found.arguments, tmp_path)
    assert (arguments.metric_for_best_model, arguments.load_best_model_at_end, arguments.greater_is_better) == (
        "eval_new_loss",
        True,
        False,
    )
    assert arguments.eval_on_start and arguments.train_sampling_strategy == "sequential" and not arguments.remove_unused_columns
    assert arguments.report_to == []
    mine = arguments_for(found.recipe, {**found.arguments, "metric_for_best_model": "eval_old_loss", "eval_on_start": False}, tmp_path)
    assert (mine.metric_for_best_model, mine.eval_on_start) == ("eval_old_loss", False)


def test_help_tells_every_key_and_loads_no_torch() -> None:
    code = "import sys\nfrom hf_grow.cli import main\ntry:\n    main(['train', '--help'])\nexcept SystemExit:\n    print([m for m in ('torch', 'transformers', 'datasets', 'peft') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.rstrip().endswith("[]"), done.stdout[-300:] + done.stderr
    assert all(f"  {name} " in done.stdout for name in TrainRecipe.model_fields)
    assert all(name in done.stdout for name in RECIPES)


def test_docs_tell_every_key() -> None:
    page = (Path(__file__).parents[3] / "docs" / "training.md").read_text()
    for name, field in TrainRecipe.model_fields.items():
        assert f"`{name}`" in page or f"`{name}." in page, name
        assert field.description
    for section in ("warmup", "after_growth", "monitor", "distill", "lora", "moe"):
        inner = TrainRecipe.model_fields[section].annotation
        models = [m for m in (inner, *getattr(inner, "__args__", ())) if hasattr(m, "model_fields")]
        for key in models[0].model_fields:
            assert f"`{section}.{key}`" in page, f"{section}.{key}"


def test_a_broken_installation_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import hf_grow.common.extras as extras

    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "datasets" else name)
    said = run(capsys, "train", recipe(tmp_path, grown(tmp_path)), status=2)["error"]
    assert "pip install 'hf-grow[train]'" in said


def test_json_results_are_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(capsys, "train", recipe(tmp_path, grown(tmp_path), max_steps=1))
    assert found.keys() == {
        "output",
        "steps",
        "tokens",
        "flops",
        "flops_by_purpose",
        "seconds",
        "loss",
        "start",
        "end",
        "source",
        "forgetting",
        "stopped",
    }
    kept = json.loads((tmp_path / "out" / "training.json").read_text())["result"]
    assert kept == found
