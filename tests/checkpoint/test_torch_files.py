"""Files of torch.save: read by rows without executing pickled code, and written tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_grow.checkpoint.torch_files import FileTensor, open_torch_file, save_torch_file
from hf_grow.errors import SourceError


def sample() -> dict[str, Any]:
    numbers = torch.randn(7, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return {
        "plain": numbers,
        "bf16": numbers.bfloat16(),
        "columns": numbers[:, 1:4],
        "turned": numbers.permute(2, 0, 1),
        "again": numbers[2:],  # shares its storage
        "scalar": torch.tensor(3.0),
        "bytes": torch.arange(9, dtype=torch.uint8),
        "empty": torch.zeros(0, 4),
        "rest": [{"lr": 0.1, "betas": (0.9, 0.95)}, None, "text"],
    }


def test_rows_are_those_of_the_tensor(tmp_path: Path) -> None:
    data = sample()
    torch.save(data, tmp_path / "a.pt")
    found = open_torch_file(tmp_path / "a.pt")
    assert found.keys() == data.keys() and found["rest"] == data["rest"]
    for name, tensor in data.items():
        if isinstance(tensor, torch.Tensor):
            held = found[name]
            assert isinstance(held, FileTensor) and (held.dtype, held.shape) == (tensor.dtype, tuple(tensor.shape))
            assert torch.equal(held.whole(), tensor), name
            for start, stop in ((1, 3), (0, 0)) if tensor.dim() and len(tensor) > 3 else ():
                assert torch.equal(held.rows(start, stop), tensor[start:stop]), name


def test_a_part_of_a_file_is_read_as_a_file(tmp_path: Path) -> None:
    for name, value in {"a.pt": torch.arange(5.0), "b.pt": {"x": torch.arange(3.0)}}.items():
        torch.save(value, tmp_path / name)
    first, second = (tmp_path / "a.pt").read_bytes(), (tmp_path / "b.pt").read_bytes()
    (tmp_path / "both").write_bytes(first + second)
    found = open_torch_file(tmp_path / "both", len(first), len(second))
    assert torch.equal(found["x"].rows(1, 3), torch.tensor([1.0, 2.0]))
    assert torch.equal(open_torch_file(tmp_path / "both", 0, len(first)).whole(), torch.arange(5.0))
    with pytest.raises(SourceError, match="truncated"):
        open_torch_file(tmp_path / "both", len(first), len(second) + 1)


def test_what_is_written_in_blocks_loads_as_if_torch_had_saved_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_grow.checkpoint.torch_files.BLOCK", 100)
    data = sample()
    torch.save(data, tmp_path / "a.pt")
    save_torch_file({**open_torch_file(tmp_path / "a.pt"), "in memory": data["turned"]}, tmp_path / "b.pt")
    found = torch.load(tmp_path / "b.pt", weights_only=True)
    assert found.pop("rest") == data["rest"] and torch.equal(found.pop("in memory"), data["turned"])
    assert all(torch.equal(v, data[n]) and v.dtype == data[n].dtype for n, v in found.items())


def test_tensors_saved_on_another_device_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("torch.serialization.location_tag", lambda storage: "cuda:0")
        torch.save({"x": torch.arange(6.0).view(3, 2)}, tmp_path / "a.pt")
    assert torch.equal(open_torch_file(tmp_path / "a.pt")["x"].rows(1, 3), torch.tensor([[2.0, 3.0], [4.0, 5.0]]))


class _Evil:
    def __reduce__(self) -> Any:
        return (print, ("a pickle ran",))


def test_damaged_and_hostile_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.pt"
    torch.save({"x": torch.randn(1000), "evil": _Evil()}, file)
    with pytest.raises(SourceError, match="cannot be read"):
        open_torch_file(file)
    torch.save({"x": torch.randn(1000)}, file, _use_new_zipfile_serialization=False)
    with pytest.raises(SourceError, match="cannot be read"):
        open_torch_file(file)
    torch.save({"x": torch.randn(1000)}, file)
    held = open_torch_file(file)["x"]
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(SourceError, match="truncated"):
        held.whole()
    with pytest.raises(SourceError, match="cannot be read"):
        open_torch_file(file)
    assert "a pickle ran" not in capsys.readouterr().out
