"""Optimizer state that two processes wrote in pieces, grown in one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sharded_optimizer
import torch
from adam_states import GROWTHS
from models import BY_NAME, make, save

from hf_grow import api
from hf_grow.checkpoint.distributed_checkpoint import DistributedCheckpoint
from hf_grow.convert.in_memory import disk_names
from hf_grow.model.meta_model import meta_model
from hf_grow.training.growth_state.grow_optimizer import grow_trainer_state
from hf_grow.training.growth_state.optimizer_sources import open_optimizer
from hf_grow.training.growth_state.optimizer_state import MomentRows
from hf_grow.training.param_updates.parameter_map import parameter_map


@pytest.fixture(scope="module", params=["llama", pytest.param("mixtral", marks=pytest.mark.slow)])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("sharded")
    model = make(BY_NAME[request.param], num_hidden_layers=2)
    sharded_optimizer.write(folder, request.param)
    (folder / "source").mkdir()
    save(model.double() if request.param == "llama" else model, folder / "source")
    return folder, model


def test_every_form_holds_the_same_tensors(written: tuple[Path, Any]) -> None:
    folder, model = written
    whole = torch.load(folder / "optimizer.bin", weights_only=True)
    small = meta_model(model.config.to_diff_dict() | {"model_type": model.config.model_type})
    state = open_optimizer(folder / "optimizer_0", small)
    assert [g["params"] for g in state.groups] == [g["params"] for g in whole["param_groups"]]
    assert [g["weight_decay"] for g in state.groups] == [0.1, 0.0]
    moments = DistributedCheckpoint(folder / "moments").tensors
    assert state.state.keys() == whole["state"].keys()
    for name, expected in whole["state"].items():
        assert state.number(name) == float(expected["step"]) == 2
        for key in ("exp_avg", "exp_avg_sq"):
            n = len(expected[key])
            for start, stop in ((0, n), (n // 3, n - 1), (n // 2, n // 2)):
                assert torch.equal(state.rows(name, key, start, stop), expected[key][start:stop])
                assert torch.equal(moments[f"{name}.{key}",].rows(start, stop), expected[key][start:stop])
    weights = torch.load(folder / "weights.pt", weights_only=True)
    stored = DistributedCheckpoint(folder / "pytorch_model_fsdp_0").tensors
    assert all(torch.equal(stored["model", n].whole(), w) for n, w in weights.items())


def test_rows_by_names_on_disk(written: tuple[Path, Any]) -> None:
    folder, model = written
    whole = torch.load(folder / "optimizer.bin", weights_only=True)
    state = open_optimizer(folder / "optimizer_0", model)
    expected = disk_names(model, {n: s["exp_avg"] for n, s in whole["state"].items()})
    rows = MomentRows(state, "exp_avg", parameter_map(model), {n: t.shape for n, t in expected.items()})
    assert set(rows.names()) == expected.keys()
    for name, tensor in expected.items():
        assert tuple(rows.shape(name)) == tuple(tensor.shape)
        assert torch.equal(rows.rows(name, 1, len(tensor) - 1), tensor[1:-1]), name


@pytest.mark.parametrize("growth", GROWTHS)
def test_state_in_pieces_grows_like_whole_state(growth: str, written: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = written
    plan = api.plan(folder / "source", **{**GROWTHS[growth], **({"at": "0"} if growth == "identity" else {})})
    for form, kept in {"pieces": "optimizer_0", "whole": "optimizer.bin"}.items():
        (tmp_path / form).mkdir()
        (tmp_path / kept).symlink_to(folder / kept)
        grow_trainer_state(tmp_path, tmp_path / form, plan)
        (tmp_path / kept).unlink()
    one, other = (torch.load(tmp_path / form / "optimizer.bin", weights_only=True) for form in ("pieces", "whole"))
    assert one["param_groups"] == other["param_groups"] and one["state"].keys() == other["state"].keys()
    for name, state in other["state"].items():
        assert all(torch.equal(one["state"][name][k], v) for k, v in state.items())
