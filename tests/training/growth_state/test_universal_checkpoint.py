"""DeepSpeed's ZeRO state after ds_to_universal: a folder a parameter, and the groups in a file with classes of DeepSpeed's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adam_states import trained
from models import BY_NAME
from torch import Tensor

from hf_grow import api
from hf_grow.checkpoint.torch_files import Unread, plain_values
from hf_grow.errors import SourceError
from hf_grow.model.meta_model import trainer_param_groups
from hf_grow.training.growth_state.grow_optimizer import grow_trainer_state


class LossScaler:
    """Pickled beside the groups, as DeepSpeed's is; a file with it is not read under weights_only."""

    def __init__(self) -> None:
        self.scale = 1.0

    def __reduce__(self) -> Any:
        return (print, ("a pickle ran",))


def write(folder: Path, stage: int) -> Any:
    """As DeepSpeed 0.19 does: ZeRO-3 flat and without step, ZeRO-1 and 2 in shape, in a dict."""
    model, _ = trained(BY_NAME["llama"], folder)
    zero = folder / "global_step3_universal" / "zero"
    saved = torch.load(folder / "optimizer.pt", weights_only=True)
    for i, name in enumerate(n for g in trainer_param_groups(model) for n in g):
        (zero / name).mkdir(parents=True)
        for key in ("exp_avg", "exp_avg_sq"):
            value: Tensor = saved["state"][i][key]
            torch.save(value.flatten() if stage == 3 else {"param": value}, zero / name / f"{key}.pt")
        if stage < 3:
            torch.save(torch.tensor(3.0), zero / name / "step.pt")
    groups = [
        {k: v for k, v in g.items() if k in ("lr", "betas", "eps", "weight_decay")} | {"params": [i]}
        for i, g in enumerate(saved["param_groups"])
    ]
    torch.save({"loss_scaler": LossScaler(), "param_groups": groups, "flat": [torch.ones(2)]}, zero / "optimizer_state.pt")
    return model


@pytest.mark.parametrize("stage", [2, 3])
def test_universal_state_grows_like_trainers(stage: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write(tmp_path, stage)
    plan = api.plan(model, "tile", factor=2, symmetry="none")
    for out in ("trainer", "deepspeed"):
        (tmp_path / out).mkdir()
        report = grow_trainer_state(tmp_path, tmp_path / out, plan)
        (tmp_path / "optimizer.pt").unlink(missing_ok=True)
        assert (report.step, report.fresh) == (3, 0)
    one = torch.load(tmp_path / "trainer" / "optimizer.pt", weights_only=True)
    other = torch.load(tmp_path / "deepspeed" / "optimizer.bin", weights_only=True)
    names = [n for g in other["param_groups"] for n in g["params"]]
    for i, name in enumerate(names):
        assert all(torch.equal(v, other["state"][name][k]) for k, v in one["state"][i].items())
    for a, b in zip(one["param_groups"], other["param_groups"], strict=True):
        assert all(a[k] == b[k] for k in ("lr", "betas", "eps", "weight_decay"))
    assert "a pickle ran" not in capsys.readouterr().out


def test_what_is_not_plain_is_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"a": [1, 2.5, "x", None], "evil": LossScaler(), "t": torch.ones(3), "o": {"b": (True,)}}, tmp_path / "a.pt")
    found = plain_values(tmp_path / "a.pt")
    assert found["a"] == [1, 2.5, "x", None] and found["o"] == {"b": (True,)}
    assert isinstance(found["evil"], Unread) and isinstance(found["t"], Unread)
    (tmp_path / "b.pt").write_bytes(b"garbage")
    with pytest.raises(SourceError, match="cannot be read"):
        plain_values(tmp_path / "b.pt")
    assert "a pickle ran" not in capsys.readouterr().out


BROKEN = {
    "another shape": (lambda z: torch.save(torch.zeros(3), z / "model.norm.weight" / "exp_avg.pt"), "is not exp_avg of model.norm.weight"),
    "no groups": (lambda z: torch.save({}, z / "optimizer_state.pt"), "holds no parameter groups"),
    "one group": (lambda z: torch.save({"param_groups": [{"lr": 1}]}, z / "optimizer_state.pt"), "has 1 parameter groups"),
    "no numbers": (lambda z: torch.save({"param_groups": [{"lr": "x"}] * 2}, z / "optimizer_state.pt"), "something else than numbers"),
    "no step": (lambda z: (z.parents[1] / "trainer_state.json").unlink(), "at which step"),
    "two of them": (lambda z: ((z.parents[1] / "other" / "zero").mkdir(parents=True), torch.save({}, z.parents[1] / "other/zero/optimizer_state.pt")), "several universal"),
    "a hostile tensor": (lambda z: torch.save(LossScaler(), z / "model.norm.weight" / "exp_avg.pt"), "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_universal_state_that_does_not_fit_is_refused(kind: str, tmp_path: Path) -> None:
    change, words = BROKEN[kind]
    model = write(tmp_path, 3)
    (tmp_path / "optimizer.pt").unlink()
    change(tmp_path / "global_step3_universal" / "zero")
    (tmp_path / "out").mkdir()
    with pytest.raises(SourceError, match=words):
        grow_trainer_state(tmp_path, tmp_path / "out", api.plan(model, "stack"))
