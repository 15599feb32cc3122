"""Checkpoints of torch.distributed.checkpoint, read by rows in one process; their pickles run no code."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from hf_grow.checkpoint.distributed_checkpoint import DistributedCheckpoint
from hf_grow.errors import SourceError


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """By one process: a chunk a tensor."""
    data = {"a": {"w": torch.randn(6, 4, dtype=torch.float64), "b": torch.randn(3).bfloat16()}, "n": torch.tensor(7.0), "rest": {"lr": 0.1}}
    with pytest.warns(UserWarning, match="single process"):
        dcp.save(data, storage_writer=dcp.FileSystemWriter(tmp_path / "saved"), no_dist=True)
    return tmp_path / "saved", data


def test_tensors_and_values_are_found_by_their_path(saved: tuple[Path, dict[str, Any]]) -> None:
    folder, data = saved
    found = DistributedCheckpoint(folder)
    assert found.tensors.keys() == {("a", "w"), ("a", "b"), ("n",)} and dict(found.objects) == {("rest", "lr"): 0.1}
    assert torch.equal(found.tensors["a", "w"].rows(2, 5), data["a"]["w"][2:5])
    assert all(torch.equal(found.tensors["a", n].whole(), data["a"][n]) for n in "wb")
    assert torch.equal(found.tensors["n",].whole(), data["n"])


def test_a_missing_part_is_reported(saved: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = saved
    tensor = DistributedCheckpoint(folder).tensors["a", "w"]
    half = type(tensor)(tensor.name, tensor.dtype, (8, 4), tensor.chunks)
    with pytest.raises(SourceError, match="has 24 of 32 values"):
        half.whole()
    file = next(folder.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(SourceError, match="truncated"):
        tensor.whole()


class _Evil:
    def __init__(self, call: Any, *words: Any) -> None:
        self.call, self.words = call, words

    def __reduce__(self) -> Any:
        return (self.call, self.words)


HOSTILE = {
    "a function": lambda: _Evil(print, "a pickle ran"),
    "a function of torch": lambda: _Evil(torch.hub.load, "a", "b"),
    "a class of torch": lambda: torch.nn.Linear(2, 2),
    "another kind": lambda: {"state_dict_metadata": {}},
    "an attribute by a dotted name": lambda: _Evil(getattr, "text", "upper"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_metadata_executes_no_code(kind: str, saved: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = saved
    (folder / ".metadata").write_bytes(pickle.dumps(HOSTILE[kind]()))
    with pytest.raises(SourceError, match=r"not loaded|not the metadata"):
        DistributedCheckpoint(folder)
    assert "a pickle ran" not in capsys.readouterr().out


def _change(folder: Path, change: Any) -> None:
    """The metadata with a change."""
    known = pickle.loads((folder / ".metadata").read_bytes())
    change(known)
    (folder / ".metadata").write_bytes(pickle.dumps(known))


BROKEN = {
    "a file elsewhere": (lambda m: [setattr(s, "relative_path", "../x") for s in m.storage_data.values()], "not the name of a file"),
    "a part outside": (lambda m: setattr(m.state_dict_metadata["a.w"], "size", torch.Size([2, 4])), "lies outside"),
    "no place": (lambda m: m.storage_data.clear(), "damaged"),
    "compressed": (lambda m: [setattr(s, "transform_descriptors", ["zstd"]) for s in m.storage_data.values()], "compressed"),
    "numbers": (lambda m: setattr(m, "state_dict_metadata", {"a": 5}), "damaged"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_damaged_metadata_is_one_message(kind: str, saved: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = saved
    change, words = BROKEN[kind]
    _change(folder, change)
    with pytest.raises(SourceError, match=words):
        DistributedCheckpoint(folder)


def test_swapped_tensors_are_noticed(saved: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = saved
    _change(folder, lambda m: m.state_dict_metadata["a.w"].chunks[0].__dict__.update(sizes=torch.Size([5, 4])))
    with pytest.raises(SourceError, match="something else"):
        DistributedCheckpoint(folder).tensors["a", "w"].whole()


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x04.", pickle.dumps(list(range(5)))[:-3]])
def test_garbage_is_refused(content: bytes, saved: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = saved
    (folder / ".metadata").write_bytes(content)
    with pytest.raises(SourceError, match="damaged"):
        DistributedCheckpoint(folder)


def test_a_folder_of_other_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="holds no"):
        DistributedCheckpoint(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"garbage")
    with pytest.raises(SourceError, match="cannot be read"):
        DistributedCheckpoint(tmp_path)
