"""Plans carried out on disk and in memory: the same tensors, whatever the shards, the memory, the interruptions."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from grown import write
from models import BY_NAME, Case, each_case, make, save, tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_grow import api
from hf_grow.checkpoint.journal import JOURNAL
from hf_grow.checkpoint.reader import open_folder
from hf_grow.checkpoint.writer import layout
from hf_grow.convert import execute
from hf_grow.convert.in_memory import describe_model, disk_tensors, grow_model
from hf_grow.errors import ExecutionError, GrowError, OutputError, SourceError
from hf_grow.growth.evaluate import Evaluator
from hf_grow.growth.noise import gaussian, to_dtype_bytes
from hf_grow.growth.plan import make_plan
from hf_grow.growth.source_info import TensorInfo
from hf_grow.growth.tensormap import Noise
from hf_grow.growth.tensors import InMemoryTensors, raw_bytes
from hf_grow.model.architecture import Architecture

WAYS: dict[str, dict[str, Any]] = {
    "dus": {},
    "dus-seam": {"method": "dus", "drop": 1, "seam_average": 1},
    "stack": {},
    "interleave": {"layers_to": 7},
    "identity": {"layers_to": 7},
    "layers": {"layers": "0-2,1-3,3", "noise": 0.05},
    "identity-noise": {"method": "identity", "at": "0,1,1", "noise": 0.05},
}
each_way = pytest.mark.parametrize("way", WAYS)


def options_of(way: str) -> dict[str, Any]:
    return {"method": way, **WAYS[way]}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def files_of(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make(BY_NAME["mistral"], dtype=torch.bfloat16), tmp_path_factory.mktemp("source") / "mistral", sharded=True)


@each_case
@each_way
def test_disk_and_memory_give_the_same_tensors_and_transformers_loads_them(case: Case, way: str, tmp_path: Path) -> None:
    if case.name.endswith("_moe-mixed") and "seam" in way:
        way = "dus"  # a dense block and a mixture of experts have no mean
    if case.name in ("qwen2-window", "qwen3-window") and "seam" in way:
        way = "dus"  # nor has a block with a sliding window and one without
    model = make(case)
    source = save(model, tmp_path / "source", sharded=True)
    api.grow(source, tmp_path / "out", max_shard_size=50_000, **options_of(way))
    written = tensors_of(tmp_path / "out")
    grown = grow_model(model, api.plan(model, **options_of(way)))
    held = disk_tensors(grown)
    assert written.keys() == held.keys()
    assert all(torch.equal(written[n], held[n]) for n in written)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager", experts_implementation="eager"
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = tokens(model)
    with torch.no_grad():
        after, before = loaded(ids).logits, model(ids).logits
        assert torch.equal(after, grown(ids).logits)
    if "identity" in way:  # lossless: not nearly, but equal, since the new blocks add zero
        assert torch.equal(after, before)
    else:
        assert (after - before).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_every_dtype_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    model = make(BY_NAME["llama-tied"], dtype=dtype)
    source = save(model, tmp_path / "source")
    api.grow(source, tmp_path / "out", method="dus", drop=1, seam_average=1, noise=0.01)
    assert {t.dtype for t in tensors_of(tmp_path / "out").values()} == {dtype}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_a_seam_in_fp64_is_the_weighted_mean_to_the_last_bits(tmp_path: Path) -> None:
    model = make(BY_NAME["llama"], dtype=torch.float64)
    grown = grow_model(model, api.plan(model, "dus", drop=1, seam_average=1))
    old, new = disk_tensors(model), disk_tensors(grown)
    name = "model.layers.{}.mlp.down_proj.weight"
    # n=4, m=1: 0 1 2 | 1 2 3, cross-faded where 2 meets 1: positions 2 and 3.
    for at, (i, j), w in ((2, (2, 0), 1 / 3), (3, (3, 1), 2 / 3)):
        expected = (1 - w) * old[name.format(i)] + w * old[name.format(j)]
        torch.testing.assert_close(new[name.format(at)], expected, rtol=0, atol=1e-15)


def test_noise_has_the_size_asked_for_only_on_repeated_matrices_and_no_block_size_changes_it(tmp_path: Path) -> None:
    source = save(make({**BY_NAME["llama"].config, "hidden_size": 192, "intermediate_size": 512}), tmp_path / "source")
    write(source, tmp_path / "a", "stack", {"noise": 0.1}, memory_budget=1000)
    api.grow(source, tmp_path / "b", "stack", noise=0.1, max_shard_size=10**5, workers=2)
    a, b, old = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b"), tensors_of(source)
    assert all(torch.equal(a[n], b[n]) for n in a)
    for name, tensor in a.items():
        layer = int(name.split(".")[2]) if "layers" in name else -1
        origin = old[name.replace(f"layers.{layer}.", f"layers.{layer % 4}.")]
        change = tensor - origin
        if layer >= 4 and tensor.dim() == 2:
            assert change.std() / origin.std() == pytest.approx(0.1, rel=0.05)
            assert change.mean().abs() < 0.02 * origin.std()
        else:
            assert torch.equal(tensor, origin)
    other = api.plan(source, "stack", noise=0.1, seed=1)
    assert other.fingerprint != api.plan(source, "stack", noise=0.1).fingerprint


def test_names_draw_different_noise(tmp_path: Path) -> None:
    source = save(make(BY_NAME["llama"]), tmp_path / "source")
    api.grow(source, tmp_path / "out", "layers", layers="0,0,0", noise=0.1)
    a, b = (tensors_of(tmp_path / "out")[f"model.layers.{i}.mlp.up_proj.weight"] for i in (1, 2))
    assert not torch.equal(a, b)


def test_a_small_and_a_large_dtype_in_one_checkpoint_stay_what_they_are(tmp_path: Path) -> None:
    source = save(make(BY_NAME["llama"], dtype=torch.bfloat16), tmp_path / "source")
    mixed = {k: v.float() if "norm" in k else v for k, v in tensors_of(source).items()}
    save_file(mixed, source / "model.safetensors", {"format": "pt"})
    api.grow(source, tmp_path / "out", "identity", layers_to=6)
    for name, tensor in tensors_of(tmp_path / "out").items():
        assert tensor.dtype == (torch.float32 if "norm" in name else torch.bfloat16)


def test_companions_come_along_and_weights_of_others_do_not(mistral: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for file in mistral.iterdir():
        os.link(file, source / file.name)
    (source / "tokenizer.json").write_text("{}")
    (source / "LICENSE").write_text("free")
    (source / "modeling_own.py").write_text("x = 1")
    (source / "zero_to_fp32.py").write_text("of DeepSpeed")
    (source / "README.md").write_text("the card of the source")
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    api.grow(source, tmp_path / "out")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "growth.json",
        "model.safetensors",
        "tokenizer.json",
        "LICENSE",
        "modeling_own.py",
    }


@pytest.mark.parametrize(
    ("given", "written"),
    [
        (
            {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers"},
            {"tokenizer_class": "PreTrainedTokenizerFast", "backend": "tokenizers"},
        ),
        ({"extra_special_tokens": ["<a>"]}, {"additional_special_tokens": ["<a>"]}),
        ({"tokenizer_class": "LlamaTokenizer", "extra_special_tokens": {"image_token": "<i>"}}, None),
    ],
)
def test_a_tokenizer_of_transformers_5_comes_along_as_transformers_4_reads_it(
    mistral: Path, tmp_path: Path, given: dict[str, Any], written: dict[str, Any] | None
) -> None:
    source = shutil.copytree(mistral, tmp_path / "source")
    text = json.dumps(given, indent=3)  # not how it is written anew
    (source / "tokenizer_config.json").write_text(text)
    api.grow(source, tmp_path / "out")
    found = (tmp_path / "out" / "tokenizer_config.json").read_text()
    assert found == text if written is None else json.loads(found) == written


def test_a_tokenizer_config_that_is_no_json_comes_along_as_it_is(mistral: Path, tmp_path: Path) -> None:
    source = shutil.copytree(mistral, tmp_path / "source")
    (source / "tokenizer_config.json").write_text("{")
    api.grow(source, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == "{"


def test_provenance_says_what_was_made_of_what(mistral: Path, tmp_path: Path) -> None:
    result = api.grow(mistral, tmp_path / "out", max_shard_size=40_000)
    record = json.loads((tmp_path / "out" / "growth.json").read_text())
    for file, facts in record["target"]["files"].items():
        data = (tmp_path / "out" / file).read_bytes()
        assert facts == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert result.shards == {f: facts["sha256"] for f, facts in record["target"]["files"].items()}
    assert record["source"]["ref"] == str(mistral)
    assert record["made_by"]["hf_grow"]
    again = api.grow(tmp_path / "out", tmp_path / "twice", "identity")
    history = json.loads((again.out / "growth.json").read_text())["source"]["history"]
    assert [(step["method"], step["layers"]) for step in history] == [("dus", [4, 6])]


def test_growing_does_not_change_the_source(mistral: Path, tmp_path: Path) -> None:
    before = files_of(mistral)
    api.grow(mistral, tmp_path / "out", "identity")
    assert files_of(mistral) == before


def test_progress_adds_up_to_the_tensors_bytes(mistral: Path, tmp_path: Path) -> None:
    seen: list[int] = []
    api.grow(mistral, tmp_path / "out", progress=seen.append)
    assert sum(seen) == sum(t.nbytes for t in api.plan(mistral).targets.values())


# What goes wrong


def leaves_nothing(tmp_path: Path, name: str = "out") -> bool:
    return not (tmp_path / name).exists()


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
@pytest.mark.parametrize("way", ["dus", "dus-seam"])
def test_weights_that_are_not_finite_are_refused_by_name(bad: float, way: str, tmp_path: Path) -> None:
    model = make(BY_NAME["llama"], dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 5] = bad
    source = save(model, tmp_path / "source")
    with pytest.raises(GrowError, match=r"up_proj\.weight.*finite|up_proj\.weight.*NaN"):
        api.grow(source, tmp_path / "out", **options_of(way))
    assert leaves_nothing(tmp_path)


def test_weights_that_are_not_finite_pass_when_allowed(tmp_path: Path) -> None:
    model = make(BY_NAME["llama"])
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 5] = float("nan")
    source = save(model, tmp_path / "source")
    api.grow(source, tmp_path / "out", allow_nonfinite=True)
    assert tensors_of(tmp_path / "out")["model.layers.2.mlp.up_proj.weight"][3, 5].isnan()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_computed_tensors_that_are_not_finite_pass_when_allowed_and_verify(bad: float, dtype: torch.dtype, tmp_path: Path) -> None:
    model = make(BY_NAME["llama"], dtype=dtype)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 5] = bad
    source = save(model, tmp_path / "source")
    write(source, tmp_path / "out", "dus", {"drop": 1, "seam_average": 1}, allow_nonfinite=True, memory_budget=1000)
    written, stored = tensors_of(tmp_path / "out"), tensors_of(source)
    mixed = "model.layers.{}.mlp.up_proj.weight"
    for layer in (2, 4):  # the seam, a mean of the bad layer and another, and a copy
        assert not written[mixed.format(layer)][3, 5].isfinite()
        assert int((~written[mixed.format(layer)].isfinite()).sum()) == 1
    assert sum(int((~t.isfinite()).sum()) for t in stored.values()) == 1
    report = api.verify(source, tmp_path / "out", structure_only=True)
    assert report.ok, report


def test_a_value_too_large_for_its_dtype_is_refused_even_when_nan_is_allowed(tmp_path: Path) -> None:
    source = save(make(BY_NAME["llama"], dtype=torch.float16), tmp_path / "source")
    stored = tensors_of(source)
    stored["model.layers.3.mlp.up_proj.weight"].fill_(65504.0)[::2] *= -1
    save_file(stored, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExecutionError, match="too large for F16"):
        api.grow(source, tmp_path / "out", "layers", layers="0-3,3", noise=1.0, allow_nonfinite=True)
    assert leaves_nothing(tmp_path)


def test_a_mean_too_large_for_fp16_is_an_error_not_an_infinity(tmp_path: Path) -> None:
    model = make(BY_NAME["llama"], dtype=torch.float16)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.fill_(65504.0)
    source = save(model, tmp_path / "source")
    api.grow(source, tmp_path / "fine", "dus", drop=1, seam_average=1)
    # Largest values of both signs have a spread as large; noise of that size must overflow.
    stored = tensors_of(source)
    stored["model.layers.3.mlp.up_proj.weight"][::2] *= -1
    save_file(stored, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExecutionError, match="F16"):
        api.grow(source, tmp_path / "out", "layers", layers="0-3,3", noise=1.0)
    assert leaves_nothing(tmp_path)


def test_a_source_that_changes_meanwhile_is_noticed(mistral: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for file in mistral.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    checkpoint = open_folder(source)
    plan = api.plan(source)
    first = sorted(source.glob("*.safetensors"))[0]
    os.utime(first, ns=(1, 1))
    with pytest.raises(ExecutionError, match="changed"):
        execute.execute(plan, checkpoint, tmp_path / "out", layout(plan.targets))
    first.write_bytes(first.read_bytes()[:-100])
    with pytest.raises(GrowError, match=r"ended early|truncated"):
        execute.execute(plan, checkpoint, tmp_path / "out", layout(plan.targets), overwrite=True)
    assert leaves_nothing(tmp_path)


@pytest.mark.parametrize(("code", "words"), [(errno.ENOSPC, "is full"), (errno.EIO, "failed")])
def test_a_disk_that_fails_or_is_full_gives_one_message_and_can_be_gone_on_with(
    code: int, words: str, mistral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.copy_file_range, []

    def broken(*args: Any) -> int:
        calls.append(args)
        if len(calls) > 20:
            raise OSError(code, os.strerror(code))
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "copy_file_range", broken)
        with pytest.raises(ExecutionError, match=words) as caught:
            api.grow(mistral, tmp_path / "out", workers=1)
    assert "--resume" in caught.value.hint
    assert leaves_nothing(tmp_path)
    api.grow(mistral, tmp_path / "out", resume=True)
    api.grow(mistral, tmp_path / "whole")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_bytes_that_differ_on_disk_are_noticed(mistral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.copy_file_range

    def flipping(source: int, target: int, length: int, start: int, at: int) -> int:
        moved = real(source, target, length, start, at)
        os.pwrite(target, b"\x01", at + moved // 2)
        return moved

    monkeypatch.setattr(os, "copy_file_range", flipping)
    with pytest.raises(ExecutionError, match="differs"):
        api.grow(mistral, tmp_path / "out")
    assert leaves_nothing(tmp_path)


def test_a_damaged_tensor_of_an_interrupted_run_is_written_again(mistral: Path, tmp_path: Path) -> None:
    api.grow(mistral, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        api.grow(mistral, tmp_path / "out", progress=_interrupt_after(100_000))
    partial = tmp_path / "out.partial" / "model.safetensors"
    with partial.open("r+b") as f:
        f.seek(20_000)
        f.write(b"garbage garbage")
    result = api.grow(mistral, tmp_path / "out", resume=True)
    assert result.resumed > 0
    assert tensors_of(tmp_path / "out").keys() == tensors_of(tmp_path / "whole").keys()
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def _interrupt_after(nbytes: int) -> Any:
    import _thread

    seen = [0]

    def progress(moved: int) -> None:
        seen[0] += moved
        if seen[0] > nbytes:
            _thread.interrupt_main()

    return progress


# A child process that kills itself with SIGKILL at its n-th call into the operating system, or just counts the calls.
CHILD = """
import os, pathlib, signal, sys, threading
from hf_grow import api
source, out, kill_at, mode = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
count, lock = [0], threading.Lock()
def watch(owner, name):
    real = getattr(owner, name)
    def call(*args, **kwargs):
        with lock:
            count[0] += 1
            own = count[0]
            if own == kill_at and kill_at % 2: os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **kwargs)
        if own == kill_at: os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, call)
for name in ("copy_file_range", "pwrite", "preadv", "ftruncate", "fsync", "open", "close"): watch(os, name)
for name in ("rename", "mkdir", "unlink", "open"): watch(pathlib.Path, name)
api.grow(source, out, "identity", max_shard_size=30_000, noise=0.01, workers=2, resume=mode == "resume")
print(count[0])
"""


def child(source: Path, out: Path, kill_at: int, mode: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", CHILD, str(source), str(out), str(kill_at), mode]
    return subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)


def killed_and_resumed(source: Path, tmp_path: Path, points: int, seed: int) -> None:
    import random

    whole = child(source, tmp_path / "whole", 0, "")
    calls = int(whole.stdout)
    assert calls > 300, whole.stderr
    expected = files_of(tmp_path / "whole")
    draw = random.Random(seed)
    killed = 0
    for run in range(points):
        out = tmp_path / f"out{run}"
        # Early, late and anywhere: the ends of a run are where the traps are.
        places = [draw.randrange(1, 30), draw.randrange(1, calls), draw.randrange(max(1, calls - 60), calls)]
        at = draw.choice(places) if run else places[0]
        first = child(source, out, at, "")
        killed += first.returncode == -9
        if out.exists() and not (out / JOURNAL).exists():  # killed after all was done
            assert files_of(out) == expected
            continue
        second = child(source, out, 0, "resume")
        assert second.returncode == 0, second.stderr
        assert files_of(out) == expected
    assert killed  # the first run for certain; the number of calls varies with the threads, so that a late one may never come


def test_killed_at_random_points_and_resumed_the_output_is_the_same(mistral: Path, tmp_path: Path) -> None:
    killed_and_resumed(mistral, tmp_path, points=4, seed=int.from_bytes(os.urandom(4), "little"))


@pytest.mark.slow
def test_killed_at_twenty_random_points(mistral: Path, tmp_path: Path) -> None:
    killed_and_resumed(mistral, tmp_path, points=20, seed=20)


def test_output_problems_come_before_work(mistral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("x")
    with pytest.raises(OutputError, match="not empty"):
        api.grow(mistral, tmp_path / "out")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000, "total": 10**9})())
    with pytest.raises(OutputError, match="free"):
        api.grow(mistral, tmp_path / "other")
    assert not (tmp_path / "other.partial").exists()


def test_a_model_in_memory_that_is_not_the_planned_one_is_refused() -> None:
    plan = api.plan(make(BY_NAME["llama"]), "identity")
    with pytest.raises(SourceError, match="another model"):
        grow_model(make(BY_NAME["llama"], hidden_size=60), plan)
    broken = make(BY_NAME["llama"])
    broken.model.norm.weight = torch.nn.Parameter(broken.model.norm.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(SourceError, match="int8"):
        describe_model(broken)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "F64"])
def test_plain_noise_without_torch_is_the_evaluator_s_bit_for_bit(dtype: str) -> None:
    growth = api.find_method("experts").build(Architecture(BY_NAME["llama"].config), api.find_method("experts").options(experts=4, seed=5))
    plan = make_plan(describe_model(make(BY_NAME["llama"])), growth)
    expr = Noise((1500, 48), 0.37, "key")  # more than one chunk
    wanted = Evaluator(plan, InMemoryTensors({})).whole(expr, TensorInfo(dtype, expr.size))
    found = to_dtype_bytes(gaussian(growth.seed, "key", 0, 1500 * 48, 0.37), dtype)
    assert found == bytes(raw_bytes(wanted))
