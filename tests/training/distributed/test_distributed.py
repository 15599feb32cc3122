"""Several processes train one model: DDP, FSDP2 (sharded DTensor parameters) and ZeRO-3, against one process; who writes; resuming; refusals."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from launched import FILES, environment, start
from models import BY_NAME, make
from safetensors.torch import load_file
from sharded import free_port
from trained import logged, recipe, run, tokenizer
from transformers import AutoModelForCausalLM
from transformers.training_args import OptimizerNames
from two_processes import assert_same_weights, model, together

from hf_grow.cli import main
from hf_grow.errors import InputError
from hf_grow.training.config.train_config import read_recipe
from hf_grow.training.distributed.launch import Launch, close_process_group, current_launch, launch_from_file
from hf_grow.training.dry_run import memory
from hf_grow.training.setup.launch_checks import keeps_unsharded_state
from hf_grow.training.setup.recipe_checks import arguments_for
from hf_grow.training.trainer.events import read_events

EWC = {"kind": "ewc", "lambda": 3.0}
WARM = {
    "warmup": {"lr": 2.0, "steps": 3}, "phases": [{"steps": 2, "train": ["new"]}], "freeze": ["norms"],
    "after_growth": {"settle_steps": 1},
}  # fmt: skip
# Norms compute in fp32 inside an fp64 model, and half of the rows round differently; a large epsilon keeps AdamW from amplifying that.
LARGE_EPSILON = {"adam_epsilon": 1e-2}


def check_ewc(how: str, kind: str, folder: Path, capsys: pytest.CaptureFixture[str], **changes: Any) -> None:
    grown = model(folder, kind)
    settings = {
        "gradient_accumulation_steps": 2,
        **LARGE_EPSILON,
        "regularizer": {**EWC, "fisher": str(folder / "fisher.safetensors")},
        **WARM,
        **changes,
    }
    path = recipe(folder, grown, **settings)
    # A relative output: what each process writes lies where it works. Under FSDP2 all write to one folder.
    out = Path("together") if how == "ddp" else folder / "first" / "together"
    facts = together(how, path, out, folders=[folder / "first", folder / "second"])
    result = run(capsys, "train", path)
    assert_same_weights(folder / "out", folder / "first" / "together", 1e-6)
    assert logged(folder / "out") == pytest.approx(logged(folder / "first" / "together"), abs=1e-6)
    ends = [list(read_events(f / "events.jsonl"))[-1] for f in (folder / "out", folder / "first" / "together")]
    assert ends[0]["loss"] == pytest.approx(ends[1]["loss"], abs=1e-6)
    assert result["tokens"] == 6 * 2 * 2 * 16
    wrote = {p.relative_to(folder / "second").as_posix() for p in (folder / "second").rglob("*") if p.is_file()}
    assert wrote <= {f"together/checkpoint-{n}/rng_state_1.pth" for n in (3, 6)}
    assert [f["packed"] for f in facts] == [3, 0], "texts are packed by one process"
    assert facts[1]["out"] == "" and "Tokenising" not in facts[1]["err"]
    whole = sum(t.numel() for t in load_file(folder / "out" / "model.safetensors").values())
    if how == "fsdp2":
        assert all(f["kinds"] == ["DTensor"] for f in facts)
        assert sum(f["numbers"] for f in facts) == whole
    else:
        assert all(f["wrapper"] == "DistributedDataParallel" and f["numbers"] == whole for f in facts)


def test_two_processes_equal_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_ewc("ddp", "deeper", tmp_path, capsys)


MORE: dict[str, dict[str, Any]] = {
    "ewc": {},
    "proximal": {"regularizer": {**EWC, "form": "proximal"}},
    "si": {"regularizer": {"kind": "si", "lambda": 0.5, "consolidate_every": 2}},
    "documents masked": {"data": {"intra_document_masking": True}},
    "blended, checkpointed": {
        "warmup": {"steps": 3, "alpha_steps": 4},
        "activation_checkpointing": True,
        "checkpointed_layers": "new_layers",
    },
    "distilled": {"distill": {"alpha": 0.5}, "monitor": {"baseline": "source", "contribution_steps": 3}, "kl_rows": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
@pytest.mark.parametrize(("kind", "more"), [*(("deeper", m) for m in MORE), ("wider", "ewc"), ("wider", "proximal"), ("experts", "ewc")])
def test_ewc_and_masks_on_two_processes(how: str, kind: str, more: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows of a wider model are masks within sharded tensors; three experts and 61 rows are not divisible by two."""
    changes = dict(MORE[more])
    if changes.get("regularizer", {}).get("kind") == "ewc":
        changes["regularizer"] = {**changes["regularizer"], "fisher": str(tmp_path / "fisher.safetensors")}
    if kind == "wider":
        changes |= {"freeze": ["old"], "phases": []} if more == "proximal" else {}
    if kind == "experts":
        # The router loss is one of each process's tokens: no sum over processes gives that of all of them. Adam would magnify rounding.
        changes |= {"moe": {"aux_loss": False}, "optim": "sgd", "learning_rate": 0.1}
    check_ewc(how, kind, tmp_path, capsys, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_interrupted_two_process_run_resumes_exactly(how: str, tmp_path: Path) -> None:
    path = recipe(tmp_path, model(tmp_path), max_steps=10, regularizer={"kind": "si", "lambda": 0.5, "consolidate_every": 4}, **WARM)
    together(how, path, tmp_path / "whole")
    together(how, path, tmp_path / "cut", stop=8, status=9)
    assert not (tmp_path / "cut" / "config.json").exists()
    together(how, path, tmp_path / "cut", "--resume")
    assert logged(tmp_path / "cut") == logged(tmp_path / "whole")
    assert_same_weights(tmp_path / "whole", tmp_path / "cut", 0.0)


def trained_by(how: str, processes: int, path: Path, out: Path, *words: object, **options: Any) -> None:
    """A step has four sequences, shared by the processes."""
    sharded = ("--use_cpu", "false") if how == "fsdp2" else ()
    command = ["train", path, "-o", out, "--per_device_train_batch_size", 4 // processes, *sharded, *words]
    start(how, command, [path.parent] * processes, **options)


SI = {"kind": "si", "lambda": 0.5, "consolidate_every": 3}


def assert_resumed(path: Path, cut: Path, how: str, processes: int, whole: Path, tolerance: float) -> None:
    out = cut.with_name(f"{cut.name}-{how}-{processes}")
    shutil.copytree(cut, out)
    trained_by(how, processes, path, out, "--resume")
    assert logged(out) == pytest.approx(logged(whole), abs=1e-6)  # computed in fp32
    assert_same_weights(whole, out, tolerance)


def test_sharded_run_is_resumed_by_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, model(tmp_path), max_steps=4, save_steps=2, regularizer=SI, **LARGE_EPSILON)
    run(capsys, "train", path, "--per_device_train_batch_size", 4, "-o", tmp_path / "whole")
    trained_by("fsdp2", 2, path, tmp_path / "cut", stop=3, status=9)
    checkpoint = tmp_path / "cut" / "checkpoint-2"
    assert {p.name for p in checkpoint.glob("*.pt")} == {"scheduler.pt"} and not (checkpoint / "model.safetensors").exists()
    assert {p.name for p in checkpoint.iterdir() if p.is_dir()} == {"weights", "optimizer", "penalty"}
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(checkpoint)
    run(capsys, "train", path, "--per_device_train_batch_size", 4, "-o", tmp_path / "cut", "--resume")
    assert logged(tmp_path / "cut") == pytest.approx(logged(tmp_path / "whole"), abs=1e-6)
    assert_same_weights(tmp_path / "whole", tmp_path / "cut", 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["deeper", "experts"])
def test_run_is_resumed_by_any_number_of_processes(kind: str, tmp_path: Path) -> None:
    # Experts in fp32 (torch's grouped multiplication knows no fp64), where Adam would magnify rounding.
    changes = {"regularizer": SI} if kind == "deeper" else {"moe": {"aux_loss": False}, "optim": "sgd", "learning_rate": 0.1}
    tolerance = 1e-9 if kind == "deeper" else 1e-6
    path = recipe(tmp_path, model(tmp_path, kind), max_steps=8, save_steps=4, **LARGE_EPSILON, **changes)
    trained_by("one_gpu", 1, path, tmp_path / "whole")
    trained_by("fsdp2", 2, path, tmp_path / "two", stop=5, status=9)
    for how, processes in (("fsdp2", 4), ("one_gpu", 1), ("ddp", 2)):
        assert_resumed(path, tmp_path / "two", how, processes, tmp_path / "whole", tolerance)
    trained_by("one_gpu", 1, path, tmp_path / "one", stop=5, status=9)
    assert_resumed(path, tmp_path / "one", "fsdp2", 4, tmp_path / "whole", tolerance)
    trained_by("fsdp2", 4, path, tmp_path / "four", stop=5, status=9)
    assert_resumed(path, tmp_path / "four", "fsdp2", 2, tmp_path / "whole", tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("dispatched", [True, False])
def test_two_process_stream_resumes_at_its_position(dispatched: bool, tmp_path: Path) -> None:
    """One process reads for both, or each reads all and takes its rows."""
    more = {} if dispatched else {"accelerator_config": {"dispatch_batches": False}}
    path = recipe(tmp_path, model(tmp_path), max_steps=8, data={"streaming": True}, gradient_accumulation_steps=2, **more)
    together("ddp", path, tmp_path / "whole")
    together("ddp", path, tmp_path / "cut", stop=5, status=9)
    facts = together("ddp", path, tmp_path / "cut", "--resume")
    assert "skipping the first" not in facts[0]["err"]
    assert logged(tmp_path / "cut") == logged(tmp_path / "whole") and len(set(logged(tmp_path / "cut").values())) == 8
    assert_same_weights(tmp_path / "whole", tmp_path / "cut", 0.0)


RESUMED: dict[str, dict[str, Any]] = {
    "streamed": {"data": {"streaming": True, "shuffle_buffer": 6, "intra_document_masking": True}},
    "streamed by each": {"data": {"streaming": True}, "accelerator_config": {"dispatch_batches": False}},
    "packed": {"data": {"intra_document_masking": True}},
}


def check_other_number_of_processes(folder: Path, capsys: pytest.CaptureFixture[str], **changes: Any) -> None:
    """From one process to two and from two to one, with 4 sequences per step: the losses of an uninterrupted run."""
    path = recipe(folder, model(folder), max_steps=6, gradient_accumulation_steps=2, **LARGE_EPSILON, **changes)
    run(capsys, "train", path, "-o", folder / "one")
    together("ddp", path, folder / "two")
    assert len(set(logged(folder / "one").values())) == 6
    assert logged(folder / "one") == pytest.approx(logged(folder / "two"), abs=1e-6)
    for name in ("one", "two"):
        shutil.copytree(folder / name, folder / f"{name}-resumed", ignore=shutil.ignore_patterns("checkpoint-6"))
    facts = together("ddp", path, folder / "one-resumed", "--resume")
    run(capsys, "train", path, "-o", folder / "two-resumed", "--resume")
    assert "skipping the first" not in facts[0]["err"]
    for name in ("one", "two"):
        steps = [e["step"] for e in read_events(folder / f"{name}-resumed" / "events.jsonl") if e["event"] == "log"]
        assert steps == [1, 2, 3, 4, 5, 6, 4, 5, 6]
        assert logged(folder / f"{name}-resumed") == pytest.approx(logged(folder / "one"), abs=1e-6)
        assert_same_weights(folder / "one", folder / f"{name}-resumed", 1e-9)


@pytest.mark.slow
def test_stream_resumes_with_another_number_of_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_other_number_of_processes(tmp_path, capsys, **RESUMED["streamed"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["streamed by each", "packed"])
def test_text_resumes_with_another_number_of_processes(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_other_number_of_processes(tmp_path, capsys, **RESUMED[kind])


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_processes_roll_back_together(how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A threshold that every fluctuation exceeds: one rollback to the last checkpoint, with half the learning rate from there on."""
    monitor = {"on_instability": "rollback", "threshold": 1e-3, "window": 16, "max_reactions": 1}
    path = recipe(tmp_path, model(tmp_path), max_steps=10, monitor=monitor, **LARGE_EPSILON)
    together(how, path, tmp_path / "together")
    run(capsys, "train", path)
    reactions = [[(e["step"], e["action"], e["lr_factor"]) for e in read_events(tmp_path / f / "events.jsonl") if e["event"] == "reaction"]
                 for f in ("out", "together")]  # fmt: skip
    assert reactions[0] == reactions[1] and reactions[0][0][1:] == ("rollback", 0.5)
    assert_same_weights(tmp_path / "out", tmp_path / "together")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_best_model_on_two_processes(how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"early_stopping_patience": 1, "learning_rate": 0.3, "max_steps": 12, "save_steps": 2, "eval_steps": 2}
    path = recipe(tmp_path, model(tmp_path), **settings)
    together(how, path, tmp_path / "together")
    assert run(capsys, "train", path)["stopped"] == "early stopping"
    assert_same_weights(tmp_path / "out", tmp_path / "together", 1e-4)  # a step at this rate is 0.3


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_streamed_text_in_bf16(how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(
        tmp_path, model(tmp_path), bf16=True, data={"streaming": True}, regularizer={**EWC, "fisher": str(tmp_path / "fisher.safetensors")}
    )
    together(how, path, tmp_path / "together")
    run(capsys, "train", path)
    one, two = logged(tmp_path / "out"), logged(tmp_path / "together")
    assert one.keys() == two.keys()
    assert one[1] == pytest.approx(two[1], abs=0.05)
    assert load_file(tmp_path / "together" / "model.safetensors").keys() == load_file(tmp_path / "out" / "model.safetensors").keys()


@pytest.mark.slow
def test_accelerate_launch_and_torchrun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """accelerate launch --config_file, and torchrun, which needs no file."""
    path = recipe(tmp_path, model(tmp_path), **LARGE_EPSILON)
    run(capsys, "train", path)
    words = ["-m", "hf_grow", "train", str(path), "--per_device_train_batch_size", "1", "-o"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FILES / "ddp.yaml"), "--num_processes", "2"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    for name, command in (("accelerate", [*launcher, "--main_process_port", str(free_port())]), ("torchrun", torchrun)):
        done = subprocess.run(
            [*command, *words, str(tmp_path / name)], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert (tmp_path / name / "checkpoint-6" / "rng_state_1.pth").is_file()
        assert_same_weights(tmp_path / "out", tmp_path / name)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("half", [False, True])
def test_zero3_equals_one_process(half: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    settings = {"dtype": "float32", "freeze": ["norms"], "gradient_accumulation_steps": 2, "learning_rate": 1e-4, "bf16": half}
    path = recipe(tmp_path, model(tmp_path), **settings)
    facts = start("deepspeed_zero3", ["train", path, "-o", tmp_path / "together", "--per_device_train_batch_size", "1"], [tmp_path] * 2)
    assert {f["wrapper"] for f in facts} == {"DeepSpeedEngine"}
    run(capsys, "train", path)
    if half:  # DeepSpeed saves what it computes with
        one, two = (load_file(tmp_path / f / "model.safetensors") for f in ("out", "together"))
        assert all(two[n].dtype == torch.bfloat16 and torch.allclose(two[n].float(), t, atol=1e-3, rtol=2**-8) for n, t in one.items())
    else:
        assert_same_weights(tmp_path / "out", tmp_path / "together", 1e-5)
    together("deepspeed_zero3", path, tmp_path / "together", "--resume", status=2)


# ---- refusals ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_error_is_printed_by_one_process(tmp_path: Path) -> None:
    path = recipe(tmp_path, model(tmp_path), regularizer=EWC)
    one, two = together("ddp", path, tmp_path / "together", status=2)
    assert "kind ewc needs one file" in one["err"] and "Traceback" not in one["err"] + two["err"]
    assert "hf-grow" not in two["err"]
    path = recipe(tmp_path, tmp_path / "grown")
    one, two = together("ddp", path, tmp_path / "together", "--use_cpu", "false", status=2)
    assert "2 processes were started, but this machine has no GPU" in one["err"] and not (tmp_path / "together").exists()


def test_unsupported_settings_under_fsdp_and_deepspeed_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grown = model(tmp_path)
    collapsed = {**EWC, "fisher": str(tmp_path / "fisher.safetensors"), "collapsed": True}
    dry = ["--dry-run", "--accelerate"]
    output = run(capsys, "train", recipe(tmp_path, grown, regularizer=collapsed), *dry, FILES / "fsdp2.yaml", status=2)["error"]
    assert "regularizer.collapsed: needs whole matrices, and FSDP2, 8 processes shards them" in output
    output = run(capsys, "train", recipe(tmp_path, grown, lora={}), *dry, FILES / "fsdp2.yaml", status=2)["error"]
    assert "lora: adapters are not saved completely under FSDP2" in output
    output = run(capsys, "train", recipe(tmp_path, grown, optim="adafactor"), *dry, FILES / "fsdp2.yaml", status=2)["error"]
    assert "optim: the state of adafactor is not sharded as the parameters are" in output
    refused = {n.value for n in OptimizerNames if keeps_unsharded_state(n.value)}
    assert refused >= {
        "adafactor",
        "adamw_torch_4bit",
        "adamw_torch_8bit",
        "adamw_bnb_8bit",
        "paged_adamw_8bit",
        "lion_8bit",
        "rmsprop_bnb_8bit",
    }
    assert not refused & {"adamw_torch", "adamw_torch_fused", "sgd", "paged_adamw_32bit", "lion_32bit"}
    everything = {**WARM, "regularizer": {"kind": "l2sp"}, "monitor": {"on_instability": "lower_lr"}}
    output = run(capsys, "train", recipe(tmp_path, grown, **everything), *dry, FILES / "deepspeed_zero3.yaml", status=2)["error"]
    for key in ("regularizer", "warmup.lr", "warmup.steps", "phases", "after_growth.settle_steps", "monitor.on_instability"):
        assert f"{key}: does not work under DeepSpeed ZeRO-3" in output
    for change, word in (("fsdp_version: 1", "Set fsdp_version: 2"), 
                         ("fsdp_cpu_ram_efficient_loading: true", "Set it to false")):  # fmt: skip
        key = change.split(":")[0]
        changed = [
            f"  {change}" if line.strip().startswith(f"{key}:") else line for line in (FILES / "fsdp2.yaml").read_text().splitlines()
        ]
        (tmp_path / "own.yaml").write_text("\n".join(changed))
        assert word in run(capsys, "train", recipe(tmp_path, grown), *dry, tmp_path / "own.yaml", status=2)["error"]


def test_dry_run_only_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, tmp_path / "grown")
    assert "processes: requires dry_run" in run(capsys, "train", path, "--processes", 2, status=2)["error"]
    assert "processes: should be greater than or equal to 1" in run(capsys, "train", path, "--dry-run", "--processes", 0, status=2)["error"]
    assert "distributed_type is None" in run(capsys, "train", path, "--dry-run", "--accelerate", path, status=2)["error"]
    assert "Cannot read" in run(capsys, "train", path, "--dry-run", "--accelerate", tmp_path / "no.yaml", status=2)["error"]


def test_other_commands_reject_several_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    output = run(capsys, "inspect", tmp_path, status=2)["error"]
    assert "hf-grow inspect runs in one process, and 4 were started" in output


# ---- the end of a process ------------------------------------------------------------------------------------------------------------------


def gloo_threads() -> list[str]:
    names = [t.read_text().strip() for t in Path("/proc/self/task").glob("*/comm")]
    return [n for n in names if n == "pt_gloo_runloop"]


def train_sharded() -> None:
    """An FSDP2 step, which leaves the mesh in DTensor's caches."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    layer = torch.nn.Linear(4, 4)
    fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
    layer(torch.ones(2, 4)).sum().backward()
    torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are listed in /proc")
def test_no_thread_outlives_the_process_group() -> None:
    """One that does may abort the process at exit. destroy_process_group alone leaves them."""
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    train_sharded()
    assert gloo_threads() and main(["help"]) == 0 and dist.is_initialized(), "a group of the caller is not touched"
    close_process_group(failed=True)
    assert not dist.is_initialized() and not gloo_threads()


def test_a_failed_process_waits_for_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    dist = torch.distributed
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    close_process_group(failed=True)
    assert dist.is_initialized()
    close_process_group()
    assert not dist.is_initialized()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_every_process_exits_with_status_0(how: str, tmp_path: Path) -> None:
    """`start` checks the statuses, and each process that no thread of gloo is left."""
    path = recipe(tmp_path, model(tmp_path), max_steps=1)
    for n in range(3):
        together(how, path, tmp_path / f"run-{n}")


# ---- files of accelerate, and memory -----------------------------------------------------------------------------------------------------------

LAUNCHES = {"one_gpu": Launch(), "ddp": Launch(8, "ddp"), "fsdp2": Launch(8, "fsdp2"), "deepspeed_zero3": Launch(8, "zero3"),
        "multi_node": Launch(16, "fsdp2"),
        "context_parallel": Launch(8, "fsdp2", parallelism={"dp_replicate": 1, "dp_shard": 4, "cp": 2, "tp": 1, "sp": 1})}  # fmt: skip


def test_recipe_accelerate_files_are_valid() -> None:
    assert {p.stem for p in FILES.glob("*.yaml")} == LAUNCHES.keys()
    for name, launch in LAUNCHES.items():
        assert launch_from_file(FILES / f"{name}.yaml") == launch
        if name not in ("one_gpu", "multi_node") and not (launch.deepspeed and find_spec("deepspeed") is None):
            assert current_launch({**environment(name, 8), "WORLD_SIZE": "8"}) == launch
    assert launch_from_file(FILES / "ddp.yaml", 3) == Launch(3, "ddp")
    with pytest.raises(InputError, match="num_processes"):
        launch_from_file(FILES / "ddp.yaml", -1)


@pytest.mark.parametrize(
    ("kind", "rest", "says"),
    [
        ("FSDP", {"fsdp_config": [1]}, "fsdp_config is \\[1\\]"),
        ("FSDP", {"fsdp_config": "x"}, "fsdp_config is 'x'"),
        ("FSDP", {"fsdp_config": {"fsdp_version": [2]}}, "fsdp\\[2\\] does not exist"),
        ("DEEPSPEED", {"deepspeed_config": 3}, "deepspeed_config is 3"),
        ("DEEPSPEED", {"deepspeed_config": {"deepspeed_config_file": 3}}, "deepspeed_config_file is 3"),
        ("DEEPSPEED", {"deepspeed_config": {"deepspeed_config_file": "."}}, "cannot be read"),
        ("DEEPSPEED", {"deepspeed_config": {"zero_stage": {}}}, "zero{} does not exist"),
        (["FSDP"], {}, "distributed_type is"),
        ("MULTI_GPU", {"num_processes": [8]}, "num_processes is"),
    ],
)
def test_malformed_accelerate_file_fails(kind: object, rest: dict[str, object], says: str, tmp_path: Path) -> None:
    path = tmp_path / "accelerate.yaml"
    path.write_text(json.dumps({"distributed_type": kind, "num_processes": 2, **rest}))
    with pytest.raises(InputError, match=says):
        launch_from_file(path)


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_accelerate_file_sections_are_optional(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "accelerate.yaml"
    path.write_text(json.dumps({"distributed_type": kind, "num_processes": 2}))
    assert launch_from_file(path).processes == 2


def test_memory_estimate_of_solar_on_eight_gpus(tmp_path: Path) -> None:
    """The sums of docs/scale.md, written out: 16 bytes per parameter in fp32 under AdamW, 4 more for Fisher and anchor in bf16."""
    from hf_grow.model.architecture import Architecture

    config = {"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 48, "num_attention_heads": 32,
              "num_key_value_heads": 8, "vocab_size": 32000}  # fmt: skip
    arch = Architecture(config)
    block = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
    p = 48 * block + 2 * 32000 * 4096 + 4096
    assert p == 10_731_524_096
    given = {
        "model": "x",
        "data": {"train": "y"},
        "bf16": True,
        "activation_checkpointing": True,
        "per_device_train_batch_size": 1,
        "use_cpu": True,
    }
    found = read_recipe(given)
    assert found.recipe is not None
    arguments = arguments_for(found.recipe, found.arguments, tmp_path)

    def estimate_for(launch: Launch) -> memory.MemoryEstimate:
        return memory.estimate_memory(
            arch, arguments, parameters=p, trainable=p, width=4, length=4096, penalty=4 * p, checkpointed=range(arch.layers), launch=launch
        )

    one, ddp, fsdp, zero = (estimate_for(x) for x in (Launch(), Launch(8, "ddp"), Launch(8, "fsdp2"), Launch(8, "zero3")))
    assert one.weights + one.gradients + one.optimizer == 16 * p and one.penalty == 4 * p and one.gathered == 0
    assert ddp.gathered == 4 * p and ddp.total == one.total + 4 * p
    assert fsdp.weights + fsdp.gradients + fsdp.optimizer + fsdp.penalty == pytest.approx(20 * p / 8)
    assert fsdp.gathered == 2 * 4 * block
    assert zero.weights + zero.gradients + zero.optimizer == pytest.approx(16 * p / 8)
    assert zero.gathered == 2 * (10**9 + 4 * 4096**2)
    assert one.activations == ddp.activations > fsdp.activations == zero.activations, "autocast copies weights to 16 bits"
    assert fsdp.total < 40e9 < 80e9 < ddp.total


@pytest.mark.slow
@pytest.mark.parametrize(("case", "policy"), [("llama", "map"), ("llama-tied", "map"), ("llama", "reset")])
def test_fsdp2_run_is_grown_and_resumed(case: str, policy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The state of a sharded run grows as optimizer.pt does; either is resumed under FSDP2 and in one process, to the same weights."""
    old = tmp_path / "source"
    made = make(BY_NAME[case], num_hidden_layers=2).double()
    made.config.dtype = torch.float64
    made.save_pretrained(old)
    tokenizer().save_pretrained(old)
    settings = {"max_steps": 6, "save_steps": 3, "lr_scheduler_type": "linear", "warmup_steps": 2, "learning_rate": 1e-3}
    run(capsys, "train", recipe(tmp_path, old, **settings), "-o", tmp_path / "one")
    together("fsdp2", recipe(tmp_path, old, **settings), tmp_path / "two")
    error = run(capsys, "depth", tmp_path / "two" / "checkpoint-3", "--to", 4, "-o", tmp_path / "no", status=2)["error"]
    assert "is a checkpoint of a sharded training" in error and "hf-grow merge" in error
    run(capsys, "merge", tmp_path / "two" / "checkpoint-3", "-o", tmp_path / "two-merged")
    done = []
    for name in ("one", "two"):
        checkpoint, grown = tmp_path / name / "checkpoint-3", tmp_path / f"{name}-grown"
        plain = checkpoint if name == "one" else tmp_path / "two-merged"
        run(capsys, "depth", plain, "--method", "identity", "--layers-to", 4, "--with-optimizer", checkpoint,
            "--optimizer-policy", policy, "-o", grown)  # fmt: skip
        path = recipe(tmp_path, grown, resume_from_checkpoint=str(grown), **settings)
        done += [tmp_path / f"{name}-alone", tmp_path / f"{name}-together"]
        run(capsys, "train", path, "-o", done[-2])
        together("fsdp2", path, done[-1])
    for out in done:
        assert logged(out) == pytest.approx(logged(done[0]), rel=1e-6) and logged(out).keys() == {4, 5, 6}
        found = [load_file(o / "model.safetensors") for o in (done[0], out)]
        for name, tensor in found[0].items():
            torch.testing.assert_close(found[1][name], tensor, rtol=0, atol=1e-9)
