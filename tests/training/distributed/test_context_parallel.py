"""Context parallelism through accelerate's ParallelismConfig: two processes share each sequence. Its attention is replaced here (see launched.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launched import FILES, start
from safetensors.torch import load_file
from torch.testing import assert_close
from trained import logged, recipe, run, source
from two_processes import model

from hf_grow.common import yaml_io
from hf_grow.errors import InputError
from hf_grow.training.distributed.launch import Launch, current_launch, launch_from_file

SIZES = {"dp_replicate": 1, "dp_shard": 4, "cp": 2, "tp": 1, "sp": 1}
ENVIRONMENT = {"WORLD_SIZE": "8", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
               "ACCELERATE_USE_PARALLELISM_CONFIG": "true"}  # fmt: skip


def launch_file(folder: Path, processes: int = 2, **sizes: Any) -> Path:
    """The file of recipes/accelerate, for fewer processes and other sizes."""
    data = yaml_io.loads((FILES / "context_parallel.yaml").read_text())
    data["num_processes"] = processes
    data["parallelism_config"] |= {f"parallelism_config_{name}_size": size for name, size in sizes.items()}
    path = folder / "launch.yaml"
    path.write_text(yaml_io.dumps(data))
    return path


def test_sizes_from_file_and_environment(tmp_path: Path) -> None:
    found = launch_from_file(FILES / "context_parallel.yaml")
    assert (found.processes, found.context_parallel, found.data_processes, found.sharing) == (8, 2, 4, "fsdp2")
    assert found.parallelism == SIZES and found.shards("weights") == 8
    assert str(found) == "FSDP2 with context parallelism of 2, 8 processes"
    env = {**ENVIRONMENT, **{f"PARALLELISM_CONFIG_{name.upper()}_SIZE": str(size) for name, size in SIZES.items()}}
    assert current_launch(env) == found
    assert current_launch({k: v for k, v in env.items() if "PARALLELISM" not in k}).parallelism == {}
    assert launch_from_file(FILES / "fsdp2.yaml").data_processes == 8 == Launch(8, "ddp").data_processes
    for wrong in ("two", 0, True):
        with pytest.raises(InputError, match="the cp size is"):
            launch_from_file(launch_file(tmp_path, cp=wrong))


def test_tokens_and_memory_of_a_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, source(tmp_path / "model"))
    plain, shared = (
        run(capsys, "train", path, "--dry-run", "--accelerate", FILES / f"{name}.yaml") for name in ("fsdp2", "context_parallel")
    )
    assert shared["processes"] == plain["processes"] == 8
    assert 2 * shared["tokens_a_step"] == plain["tokens_a_step"] == 8 * 2 * 16
    assert 2 * shared["memory"]["activations"] == plain["memory"]["activations"]
    assert shared["memory"]["weights"] == plain["memory"]["weights"]


@pytest.mark.parametrize(
    ("sizes", "settings", "message"),
    [
        ({"tp": 2}, {}, "tensor parallelism (tp_size 2) shards weights within rows and columns"),
        ({"sp": 2}, {}, "sequence parallelism (sp_size 2) needs DeepSpeed"),
        ({"dp_replicate": 2}, {}, "would count regularizers and their state once per replica"),
        ({"dp_shard": 2}, {}, "dp_shard_size 2 x cp_size 2 is not the number of processes, 2."),
        ({}, {"data": {"intra_document_masking": True}}, "data.intra_document_masking: does not work with context parallelism"),
        ({}, {"distill": {"teachers": [{"model": "source"}]}}, "distill: does not work with context parallelism"),
        ({}, {"attn_implementation": "eager"}, "it must be sdpa"),
        ({}, {"data": {"seq_length": 18}}, "data.seq_length: 18 is not a multiple of 4"),
        ({}, {"data": {"streaming": True}}, "Set accelerator_config: {dispatch_batches: false}"),
    ],
)
def test_what_context_parallelism_does_not_support(
    sizes: dict[str, int], settings: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(tmp_path, source(tmp_path / "model"), **settings)
    found = run(capsys, "train", path, "--dry-run", "--accelerate", launch_file(tmp_path, **{"dp_shard": 1, **sizes}), status=2)
    assert message in " ".join(found["error"].split())


def test_sliding_windows_and_router_losses_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for case, message in (("mistral-tied", "does not support sliding-window attention"), ("mixtral", "moe.aux_loss: does not work")):
        path = recipe(tmp_path, source(tmp_path / case, case))
        assert message in run(capsys, "train", path, "--dry-run", "--accelerate", launch_file(tmp_path, dp_shard=1), status=2)["error"]


def test_a_window_that_is_the_default_of_the_family_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = source(tmp_path / "mistral", "mistral")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "sliding_window"}))
    found = run(capsys, "train", recipe(tmp_path, folder), "--dry-run", "--accelerate", launch_file(tmp_path, dp_shard=1), status=2)
    assert "does not support sliding-window attention" in found["error"]


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "streaming"), [(2, False), (2, True), (4, True)])
def test_two_processes_share_each_sequence(processes: int, streaming: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With EWC, warm-up, phases and accumulation: the losses and weights of one process. Four processes are two such pairs."""
    settings: dict[str, Any] = {
        "gradient_accumulation_steps": 2, "adam_epsilon": 1e-2, "attn_implementation": "sdpa",
        "regularizer": {"kind": "ewc", "lambda": 3.0, "fisher": str(tmp_path / "fisher.safetensors")},
        "warmup": {"lr": 2.0, "steps": 3}, "phases": [{"steps": 2, "train": ["new"]}], "freeze": ["norms"],
        "accelerator_config": {"dispatch_batches": False}, "data": {"streaming": streaming},
    }  # fmt: skip
    path = recipe(tmp_path, model(tmp_path), **settings)
    run(capsys, "train", path)
    groups = processes // 2
    file = launch_file(tmp_path, processes, dp_shard=groups)
    words = ["train", path, "-o", tmp_path / "together", "--use_cpu", "false", "--per_device_train_batch_size", 2 // groups]
    facts = start(str(file.with_suffix("")), words, [tmp_path] * processes)
    assert all(f["kinds"] == ["DTensor"] for f in facts)
    assert logged(tmp_path / "together") == pytest.approx(logged(tmp_path / "out"), abs=1e-6)
    one, two = (load_file(tmp_path / f / "model.safetensors") for f in ("out", "together"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert_close(two[name], tensor, rtol=0, atol=1e-9)
