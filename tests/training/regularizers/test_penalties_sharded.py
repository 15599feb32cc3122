"""Penalties on two processes, sharded (FSDP2) and replicated (DDP), against one process: gradients, weights, value, state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from models import BY_NAME, make
from penalties import random_importance
from safetensors.torch import load_file
from sharded import exact_run, exact_worker, free_port, train, worker
from transformers import AutoModelForCausalLM

from hf_grow import api
from hf_grow.errors import InputError
from hf_grow.training.config.regularizer_options import PenaltyOptions
from hf_grow.training.regularizers.build import make_penalty
from hf_grow.training.regularizers.si import IMPORTANCE_FILE

KINDS: dict[str, dict[str, Any]] = {
    "ewc": {"kind": "ewc"},
    "proximal": {"kind": "ewc", "form": "proximal", "storage": "bf16"},
    "si": {"kind": "si", "consolidate_every": 3, "xi": 0.01},
    "l2sp": {"kind": "l2sp"},
}


EXACT: dict[str, dict[str, Any]] = {
    "ewc": {"kind": "ewc", "over": "inherited"},
    "online": {"kind": "online-ewc", "decay": 0.9, "form": "proximal"},
    "l2sp": {"kind": "l2sp", "over": "inherited"},
    "si": {"kind": "si", "consolidate_every": 3, "xi": 0.01},
}


@pytest.mark.slow
def test_sharded_penalties_equal_those_of_one_process_exactly(tmp_path: Path) -> None:
    """A wider model in fp64 over two processes: no values are gathered, and a log takes one all-reduce."""
    made = make(BY_NAME["llama"], num_hidden_layers=2).double()
    made.config.dtype = torch.float64
    with torch.no_grad():
        made.model.norm.weight[0] = -0.0  # a sampled value
    made.save_pretrained(tmp_path / "source")
    folder = tmp_path / "model"
    api.grow(tmp_path / "source", folder, "fpi", intermediate=61)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for seed, file in enumerate(files):
        random_importance(model, file, seed=seed)
    kinds = {k: {"lambda": 3.0, **o} for k, o in EXACT.items()}
    kinds["ewc"]["fisher"], kinds["online"]["fisher"] = files[:1], files
    mp.spawn(exact_worker, args=(2, free_port(), kinds, str(tmp_path)), nprocs=2)
    written = load_file(folder / IMPORTANCE_FILE)
    for kind, options in kinds.items():
        two = torch.load(tmp_path / f"{kind}.pt", weights_only=True)
        one = exact_run(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64), options, folder)
        calls, fingerprints = two["calls"], int(kind != "si")
        assert sum(calls["value"].values()) == 1 and not calls["attach"] and not calls["step"]
        assert sum(calls["state"].values()) == fingerprints and sum(calls["make"].values()) == int("fisher" in options)
        assert all("reduce" in name for phase in calls.values() for name in phase) and not any(one["calls"].values())
        assert one["value"] == pytest.approx(two["value"], rel=1e-12) and one["value"] > 0
        assert one["state"] == two["state"] and one["fingerprint"] == two["fingerprint"]
        assert one["tensors"].keys() == two["tensors"].keys() and bool(one["tensors"]) is (kind == "si")
        for part in ("grads", "weights", "tensors"):
            for n, value in one[part].items():
                torch.testing.assert_close(two[part][n], value, rtol=1e-12, atol=1e-12, msg=f"{kind}: {part} of {n}")
    alone = load_file(folder / IMPORTANCE_FILE)
    assert written.keys() == alone.keys() and all(torch.equal(written[n], f) for n, f in alone.items())
    assert any(f.any() for f in alone.values())


def test_state_of_another_model_is_refused() -> None:
    made = [make_penalty(PenaltyOptions(kind="si"), make(BY_NAME["llama"], num_hidden_layers=n)) for n in (1, 2)]
    for penalty, layers in zip(made, (1, 2), strict=True):
        assert penalty is not None
        penalty.attach(make(BY_NAME["llama"], num_hidden_layers=layers))
    with pytest.raises(InputError, match="another model's"):
        made[0].load_tensors(made[1].tensors())  # type: ignore[union-attr]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp", "fsdp, made before"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_one(kind: str, how: str, tmp_path: Path) -> None:
    model = make(BY_NAME["llama"], num_hidden_layers=2)
    options: dict[str, Any] = {"lambda": 3.0, **KINDS[kind]}
    if kind in ("ewc", "proximal"):
        random_importance(model, tmp_path / "f.safetensors")
        options["fisher"] = [tmp_path / "f.safetensors"]
    train(model, model, PenaltyOptions.model_validate(options), 0, 1, tmp_path / "one.pt", False)
    mp.spawn(worker, args=(2, free_port(), how, options, str(tmp_path / "two.pt")), nprocs=2)
    one, two = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in ("one", "two"))
    assert one["value"] == pytest.approx(two["value"], rel=1e-4) and one["value"] > 0
    for part in ("grads", "weights"):
        for n, value in one[part].items():
            torch.testing.assert_close(two[part][n], value, rtol=1e-4, atol=1e-6, msg=f"{part} of {n}")
    if kind == "si":
        for n, value in one["state"]["importance"].items():
            torch.testing.assert_close(two["state"]["importance"][n], value, rtol=1e-3, atol=1e-5)
            assert torch.equal(two["state"]["anchor"][n], two["state"]["path"][n]["start"])
    else:
        assert one["state"] == two["state"]
