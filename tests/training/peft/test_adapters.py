"""LoRA on a grown model, merged and saved as a plain one; adapters with replicated layers as real checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from models import BY_NAME, make, save, tokens
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from trained import grown, recipe, run, source
from transformers import AutoModelForCausalLM

from hf_grow import api
from hf_grow.cli import main
from hf_grow.convert.in_memory import grow_model
from hf_grow.training.config.lora_options import LoraOptions
from hf_grow.training.param_updates import param_provenance
from hf_grow.training.peft.adapter_files import replicated_layers
from hf_grow.training.peft.lora import FULLY_TRAINED_FILE, add_lora


def adapter(base: Path, folder: Path, *, pairs: list[list[int]] | None, seed: int = 0, **options: object) -> PeftModel:
    """A LoRA adapter as peft saves it, with updates that are not zero."""
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], layer_replication=pairs, task_type="CAUSAL_LM", **options
    )
    wrapped = get_peft_model(model, config)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for n, p in wrapped.named_parameters():
            if "lora_" in n:
                p.copy_(torch.randn(p.shape, generator=draw) * 0.3)
    wrapped.save_pretrained(folder)
    return wrapped.eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("pairs", [[[0, 3], [1, 4]], [[0, 2], [0, 2], [3, 4]], None])
def test_merged_checkpoint_equals_peft(pairs: list[list[int]] | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save(make(BY_NAME["llama"]), tmp_path / "base")
    from trained import tokenizer

    tokenizer().save_pretrained(base)
    there = logits(adapter(base, tmp_path / "adapter", pairs=pairs))
    found = run(capsys, "merge", tmp_path / "adapter", "-o", tmp_path / "out", "--base", base)
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager", output_loading_info=True)
    assert not any(loading[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logits(model), there, rtol=1e-4, atol=1e-4)
    assert (logits(model) - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 0.1
    layers = [i for a, b in pairs or [[0, 4]] for i in range(a, b)]
    assert model.config.num_hidden_layers == len(layers) == found["layers"]
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    if pairs:
        plan = param_provenance.load_plan(tmp_path / "out")
        assert plan is not None
        assert [o.sources[0] for o in plan.growth.layers] == layers
        assert json.loads((tmp_path / "out" / "growth.json").read_text())["training"]["adapter"]["layer_replication"] == pairs
        report = api.verify(base, tmp_path / "out")
        assert report.ok
        assert {c.name for c in report.checks if c.status == "skip"} == {"tensors", "lossless"}
        # Every layer has weights of its own: none is shared any more.
        stored = load_file(tmp_path / "out" / "model.safetensors")
        assert {int(n.split(".")[2]) for n in stored if ".layers." in n} == set(range(len(layers)))
    else:
        assert not (tmp_path / "out" / "growth.json").exists()


def test_merge_in_bf16_with_base_from_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save(make(BY_NAME["mistral"], dtype=torch.bfloat16, num_hidden_layers=3), tmp_path / "base")
    there = logits(adapter(base, tmp_path / "adapter", pairs=[[0, 2], [1, 3]]))
    run(capsys, "merge", tmp_path / "adapter", "-o", tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert merged.dtype == torch.bfloat16
    assert (logits(merged) - there).abs().max() < 0.05 * there.abs().max()


def test_merge_into_a_dtype_that_overflows_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make(BY_NAME["llama"])
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = 1e5
    base = save(model, tmp_path / "base")
    adapter(base, tmp_path / "adapter", pairs=None)
    said = run(capsys, "merge", tmp_path / "adapter", "-o", tmp_path / "out", "--dtype", "float16", status=2)["error"]
    assert "layers.1.mlp.up_proj.weight has values that float16 cannot hold" in said and not (tmp_path / "out").exists()
    run(capsys, "merge", tmp_path / "adapter", "-o", tmp_path / "out", "--dtype", "bfloat16")


def test_merge_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save(make(BY_NAME["llama"]), tmp_path / "base")
    adapter(base, tmp_path / "adapter", pairs=[[0, 3], [1, 4]])

    def said(folder: Path, *more: object) -> str:
        return run(capsys, "merge", folder, "-o", tmp_path / "out", *more, status=2)["error"]

    def changed(name: str, **keys: object) -> Path:
        shutil.copytree(tmp_path / "adapter", tmp_path / name)
        path = tmp_path / name / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
        return tmp_path / name

    assert "is not an adapter" in said(base)
    assert "not a LoRA adapter" in said(changed("prefix", peft_type="PREFIX_TUNING"))
    assert "layer 7" in said(changed("far", layer_replication=[[0, 8]]))
    assert "not a list of" in said(changed("odd", layer_replication=[[3, 1]]))
    assert "--base" in said(changed("nameless", base_model_name_or_path=None))
    small = save(make(BY_NAME["llama"], hidden_size=24, num_attention_heads=6), tmp_path / "small")
    assert "does not match" in said(tmp_path / "adapter", "--base", small)
    pickled = changed("pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    assert "Pickled" in said(pickled)
    torn = changed("torn") / "adapter_model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-9])
    assert "truncated" in said(tmp_path / "torn")
    (changed("beside") / FULLY_TRAINED_FILE).write_bytes(b"nothing")
    assert f"{FULLY_TRAINED_FILE} cannot be read" in said(tmp_path / "beside")
    run(capsys, "merge", tmp_path / "adapter", "-o", tmp_path / "out")
    assert "exists" in said(tmp_path / "adapter")
    assert main(["merge", str(tmp_path / "adapter"), "-o", str(tmp_path / "out"), "--overwrite"]) == 0
    assert "merged" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.partial"))
    assert replicated_layers(None) is None


MODULE = """
import pathlib, sys
pathlib.Path({mark!r}).write_text("ran")
"""
ASKS = {
    "a module to import": ({"megatron_config": {"tensor_model_parallel_size": 1}, "megatron_core": "hostile_module"}, "megatron_config"),
    "a library to import": (
        {"auto_mapping": {"base_model_class": "X", "parent_library": "hostile_module"}, "corda_config": {"x": 1}},
        "corda_config",
    ),
    "unsupported keys": ({"use_qalora": True, "target_parameters": ["mlp.experts"]}, "target_parameters, use_qalora"),
    "an initialization that changes the base": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4'"),
    "a rank unlike the weights": ({"r": 2**40}, "has rank 4 for"),
    "a rank of another type": ({"r": "4", "lora_alpha": [1], "rank_pattern": {"q_proj": -1}}, "3 mistakes"),
    "an expression": ({"alpha_pattern": {"(a+)+$": 4}}, "only plain names"),
    "too many layers": ({"layer_replication": [[0, 99_999]] * 50}, "more than 100,000"),
    "booleans as layers": ({"layer_replication": [[False, True]]}, "not a list of"),
    "a base name of another type": ({"base_model_name_or_path": {"a": 1}}, "base_model_name_or_path"),
}


@pytest.mark.parametrize("case", ASKS)
def test_adapter_config_is_validated(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save(make(BY_NAME["llama"]), tmp_path / "base")
    adapter(base, tmp_path / "adapter", pairs=None)
    (tmp_path / "hostile_module.py").write_text(MODULE.format(mark=str(tmp_path / "ran")))
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "adapter" / "adapter_config.json"
    keys, expected = ASKS[case]
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
    assert expected in run(capsys, "merge", tmp_path / "adapter", "-o", tmp_path / "out", status=2)["error"]
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


def test_adapter_config_imports_no_module(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that do nothing by themselves may stand there, as peft writes them; and no expression of the file is run on names of modules."""
    base = save(make(BY_NAME["llama"]), tmp_path / "base")
    there = logits(
        adapter(base, tmp_path / "adapter", pairs=None, rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.self_attn.v_proj": 3})
    )
    (tmp_path / "hostile_module.py").write_text(MODULE.format(mark=str(tmp_path / "ran")))
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "adapter" / "adapter_config.json"
    keys = {
        "megatron_core": "hostile_module",
        "auto_mapping": {"parent_library": "hostile_module"},
        "target_modules": "(.*.*.*.*)*x",
        "later": None,
    }
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
    run(capsys, "merge", tmp_path / "adapter", "-o", tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")), there, atol=1e-5)


def test_lora_trains_new_blocks_fully(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = grown(tmp_path)
    run(capsys, "train", recipe(tmp_path, model, lora={"r": 2, "target_modules": ["q_proj", "up_proj"]}))
    start, end = (load_file(p / "model.safetensors") for p in (model, tmp_path / "out"))
    assert start.keys() == end.keys()
    for n in start:
        change = (end[n] - start[n]).double()
        layer = int(n.split(".")[2]) if ".layers." in n else -1
        if layer in (1, 3):  # new; what is behind a zero projection moves once that one has
            assert change.abs().max() > 0, n
            assert change.dim() == 1 or "o_proj" in n or "down" in n or torch.linalg.matrix_rank(change, rtol=1e-4) > 2, n
        elif "q_proj" in n or "up_proj" in n:
            assert 0 < torch.linalg.matrix_rank(change, rtol=1e-4) <= 2, n
        else:
            assert torch.equal(start[n], end[n]), n
    assert json.loads((tmp_path / "out" / "growth.json").read_text())["training"]["recipe"]["lora"]["r"] == 2
    held = {p.name for p in (tmp_path / "out" / "checkpoint-6").iterdir()}
    assert {"adapter_model.safetensors", "trained_in_full.safetensors", "optimizer.pt"} <= held


def test_merged_lora_checkpoint_equals_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = grown(tmp_path)
    run(capsys, "train", recipe(tmp_path, model, lora={}))
    run(capsys, "merge", tmp_path / "out" / "checkpoint-6", "-o", tmp_path / "merged", "--base", model)
    one, other = (load_file(tmp_path / n / "model.safetensors") for n in ("out", "merged"))
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[n], other[n], atol=1e-5) for n in one)


def test_lora_without_new_or_old_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = source(tmp_path / "plain")
    found = run(capsys, "train", recipe(tmp_path, plain, lora={}), "--dry-run")
    kinds = {k: n for k, _, n in found["parameter_groups"]}
    total = sum(t.numel() for t in load_file(plain / "model.safetensors").values())
    assert kinds["old, frozen"] == total
    assert "no linear layer named gate" not in json.dumps(found)
    said = run(capsys, "train", recipe(tmp_path, plain, lora={"target_modules": ["gate"]}), status=2)["error"]
    assert "named gate" in said
    model = make(BY_NAME["llama"], num_hidden_layers=2)
    plan = api.plan(model, "identity", layers_to=4)
    grown_one = grow_model(model, plan)
    wrapped = add_lora(grown_one, LoraOptions(new_in_full=False), param_provenance.new_masks(grown_one, plan))
    assert all("lora_" in n for n, p in wrapped.named_parameters() if p.requires_grad)
    assert torch.isfinite(wrapped(tokens(model)).logits).all()
