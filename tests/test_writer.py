"""Layout of shards, and the partial folder with its journal and lock."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from hf_grow.checkpoint.reader import read_header
from hf_grow.checkpoint.writer import JOURNAL, PartialFolder, check_room, index_of, layout
from hf_grow.errors import InputError, OutputError
from hf_grow.planning import TensorInfo

tensor_lists = st.lists(
    st.tuples(st.sampled_from(["BF16", "F32", "F64"]), st.lists(st.integers(1, 9), min_size=1, max_size=3)), min_size=1, max_size=20
).map(lambda items: {f"t{i}": TensorInfo(d, tuple(s)) for i, (d, s) in enumerate(items)})


@given(tensor_lists, st.integers(1, 2000))
def test_a_layout_holds_every_tensor_once_aligned_and_within_the_limit(targets: dict[str, TensorInfo], limit: int) -> None:
    shards = layout(targets, limit)
    slots = [s for shard in shards for s in shard.slots]
    assert sorted(s.name for s in slots) == sorted(targets)
    for shard in shards:
        data = shard.size - len(shard.header)
        assert data <= limit or len(shard.slots) == 1
        assert len(shard.header) % 8 == 0
        # Parsed by the strict reader, every slot is where the header says.
        stored = read_header(shard.header[:8], lambda n, h=shard.header: h[8 : 8 + n], shard.size, shard.file)
        assert {n: (t.start, t.stop, t.info) for n, t in stored.items()} == {s.name: (s.start, s.stop, s.info) for s in shard.slots}
        assert all(s.start % {"BF16": 2, "F32": 4, "F64": 8}[s.info.dtype] == 0 for s in shard.slots)
    index = index_of(shards)
    assert (index is None) == (len(shards) == 1)
    if index:
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in targets.values())
        assert index["weight_map"] == {s.name: shard.file for shard in shards for s in shard.slots}


def test_the_safetensors_library_reads_a_written_shard(tmp_path: Path) -> None:
    targets = {"a": TensorInfo("BF16", (3, 5)), "b": TensorInfo("F32", (2,)), "c": TensorInfo("F16", (1, 1, 4))}
    (shard,) = layout(targets, 10**9)
    (tmp_path / shard.file).write_bytes(shard.header + bytes(shard.size - len(shard.header)))
    with safe_open(tmp_path / shard.file, "pt") as f:
        assert f.metadata() == {"format": "pt"}
        assert {k: (tuple(f.get_tensor(k).shape), f.get_tensor(k).dtype) for k in f.keys()} == {  # noqa: SIM118
            "a": ((3, 5), torch.bfloat16),
            "b": ((2,), torch.float32),
            "c": ((1, 1, 4), torch.float16),
        }


def folder(tmp_path: Path, *, key: str = "plan", resume: bool = False, overwrite: bool = False) -> PartialFolder:
    return PartialFolder(tmp_path / "out", key, resume=resume, overwrite=overwrite)


def test_only_finish_gives_the_folder_its_name(tmp_path: Path) -> None:
    with folder(tmp_path) as f:
        f.write_json("config.json", {"a": 1})
        (f.path / "stray").write_text("left by an earlier run")
        assert not (tmp_path / "out").exists()
        f.finish({"config.json"})
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json"]
    assert not (tmp_path / "out.partial").exists()


def test_what_the_journal_notes_is_known_after_a_restart_even_with_a_torn_last_line(tmp_path: Path) -> None:
    with folder(tmp_path) as f:
        f.note("a", "1")
        f.note("b", "2")
    journal = tmp_path / "out.partial" / JOURNAL
    journal.write_bytes(journal.read_bytes() + b'{"tensor": "c", "dig')
    with folder(tmp_path, resume=True) as f:
        assert f.done == {"a": "1", "b": "2"}
        f.note("d", "4")
    with folder(tmp_path, resume=True) as f:
        assert f.done == {"a": "1", "b": "2", "d": "4"}


def test_a_left_over_partial_needs_a_decision(tmp_path: Path) -> None:
    with folder(tmp_path) as f:
        f.note("a", "1")
    with pytest.raises(OutputError, match="--resume"):
        folder(tmp_path)
    with folder(tmp_path, overwrite=True) as f:
        assert f.done == {}


def test_a_partial_of_another_plan_is_not_gone_on_with(tmp_path: Path) -> None:
    folder(tmp_path).__exit__(None, None, None)
    with pytest.raises(OutputError, match="another plan"):
        folder(tmp_path, key="other", resume=True)


def test_resume_and_overwrite_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="exclude"):
        folder(tmp_path, resume=True, overwrite=True)


@pytest.mark.parametrize("mode", [{"resume": True}, {"overwrite": True}])
def test_a_second_writer_is_refused_while_the_first_lives(tmp_path: Path, mode: dict[str, bool]) -> None:
    with folder(tmp_path) as first:
        first.note("a", "1")
        with pytest.raises(OutputError, match="Another hf-grow"):
            folder(tmp_path, **mode)
        assert first.path.exists()


def test_an_output_that_exists_is_kept_until_the_new_one_is_whole(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(OutputError, match="--overwrite"):
        folder(tmp_path)
    with folder(tmp_path, overwrite=True) as f:
        f.write_file("new", b"y")
        assert (tmp_path / "out" / "precious").exists()
        f.finish({"new"})
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_output_that_is_a_file_or_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(OutputError, match="no folder"):
        folder(tmp_path, overwrite=True)
    (tmp_path / "out").unlink()
    (tmp_path / "out").symlink_to(tmp_path)
    with pytest.raises(OutputError, match="no folder"):
        folder(tmp_path, overwrite=True)


def test_a_place_that_cannot_be_written_is_one_message() -> None:
    with pytest.raises(OutputError, match="Cannot write"):
        PartialFolder(Path("/proc/nowhere/out"), "plan", resume=False, overwrite=False)


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with folder(tmp_path) as f:
            f.write_json("config.json", {})
            f.finish({"config.json"})
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "out" / "config.json").stat().st_mode & 0o777 == 0o640


def test_too_little_room_is_told_before_anything_is_written(tmp_path: Path) -> None:
    check_room(tmp_path / "a" / "b", 1000)
    with pytest.raises(OutputError, match="free"):
        check_room(tmp_path / "a" / "b", 2**60)
    check_room(tmp_path / "a", 2**60, already=2**60)


def test_a_journal_is_plain_json_lines(tmp_path: Path) -> None:
    with folder(tmp_path) as f:
        f.note("a", "1")
        lines = (f.path / JOURNAL).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"fingerprint": "plan"}, {"tensor": "a", "digest": "1"}]
