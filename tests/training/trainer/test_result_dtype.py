"""Training in fp32 and saving in the source's dtype: saved weights, evaluation, resuming."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from models import BY_NAME, make, save
from safetensors.torch import load_file
from trained import recipe, run, tokenizer
from transformers import AutoModelForCausalLM

from hf_grow import api
from hf_grow.training.setup.result_dtype import rounding_warning
from hf_grow.training.trainer.events import read_events
from hf_grow.training.trainer.weights import cast_state_dict

GENTLE = {"learning_rate": 1e-4, "save_steps": 3, "max_steps": 6}


def grown(folder: Path, case: str = "llama-tied") -> Path:
    save(make(BY_NAME[case], dtype=torch.bfloat16, num_hidden_layers=2), folder / "source")
    tokenizer().save_pretrained(folder / "source")
    api.grow(folder / "source", folder / "grown", "stack", layers_to=4)
    return folder / "grown"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("case", ["llama-tied", "mixtral"])
def test_bf16_model_trains_in_fp32_and_is_saved_in_bf16(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a learning rate of 1e-4, which bf16 would lose; the result is the trained weights, rounded once, and its reported losses are those of the result."""
    model, out = grown(tmp_path, case), tmp_path / "out"
    found = run(capsys, "train", recipe(tmp_path, model, **GENTLE))
    before, trained, after = weights(model), weights(out / "checkpoint-6"), weights(out)
    assert before.keys() == after.keys() == trained.keys()
    for name, tensor in after.items():
        assert (before[name].dtype, trained[name].dtype, tensor.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
        assert torch.equal(tensor, trained[name].bfloat16())
        assert "norm" not in name or not torch.equal(trained[name], before[name].float())
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert api.verify(tmp_path / "source", out, structure_only=True).ok
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    run(capsys, "train", recipe(tmp_path, out, max_steps=1, output=str(tmp_path / "more")))
    start = next(e for e in read_events(tmp_path / "more" / "events.jsonl") if e["event"] == "evaluation")
    assert start["losses"] == pytest.approx(found["end"], rel=1e-6)
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(model).parameters())


def test_resume_starts_from_fp32_checkpoint_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = recipe(tmp_path, grown(tmp_path), **GENTLE), tmp_path / "out"
    run(capsys, "train", path)
    whole = weights(out)
    shutil.rmtree(out / "checkpoint-6")
    for name in ("model.safetensors", "config.json"):
        (out / name).unlink()
    run(capsys, "train", path, "--resume")
    assert all(torch.equal(t, whole[n]) for n, t in weights(out).items())


def test_save_dtype(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = grown(tmp_path), tmp_path / "out"
    run(capsys, "train", recipe(tmp_path, model, max_steps=1, save_dtype="float32"))
    assert {t.dtype for t in weights(out).values()} == {torch.float32}
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    with torch.no_grad():
        large = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32)
        large.model.embed_tokens.weight[5, 5] = 1e5
    save(large, tmp_path / "large")
    tokenizer().save_pretrained(tmp_path / "large")
    run(capsys, "train", recipe(tmp_path, tmp_path / "large", max_steps=1, save_dtype="float16"), "-o", tmp_path / "fp32")
    assert {t.dtype for t in weights(tmp_path / "fp32").values()} == {torch.float32}
    assert any(e["event"] == "overflow" for e in read_events(tmp_path / "fp32" / "events.jsonl"))


def test_pure_bf16_training_reports_lost_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(grown(tmp_path), dtype=torch.bfloat16)
    lost = total = 0
    names = []
    for name, p in model.named_parameters():
        flat = p.detach().float().flatten().tolist()
        still = [all(torch.tensor(w + s * 1e-4).bfloat16() == torch.tensor(w).bfloat16() for s in (1, -1)) for w in flat]
        lost, total, names = lost + sum(still), total + len(still), names + [name] * all(still)
    message = rounding_warning(model, 1e-4) or ""
    assert f"in {lost / total:.0%} of them, and nothing of {len(names)} tensors, such as {names[0]}" in message
    assert rounding_warning(model.float(), 1e-4) is None
    run(capsys, "train", recipe(tmp_path, tmp_path / "grown", dtype="bfloat16", **GENTLE), "--json")
    trained = weights(tmp_path / "out")
    assert torch.equal(trained["model.norm.weight"], weights(tmp_path / "grown")["model.norm.weight"])


def test_cast_state_dict_keeps_tied_tensors_shared() -> None:
    shared = torch.randn(4, 4)
    out = cast_state_dict({"a": shared, "b": shared, "c": shared[:2], "steps": torch.tensor(3)}, dict.fromkeys("ac", torch.bfloat16))
    assert out["a"] is out["b"] and out["a"].dtype == torch.bfloat16 and out["c"].shape == (2, 4)
    assert out["steps"].dtype == torch.int64
