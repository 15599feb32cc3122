"""Layout of shards, and the partial folder with its journal and lock."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from hf_grow.checkpoint import partial_folder as partial
from hf_grow.checkpoint.journal import JOURNAL
from hf_grow.checkpoint.partial_folder import PartialFolder
from hf_grow.checkpoint.safetensors_header import read_header
from hf_grow.checkpoint.writer import build_index, check_disk_space, layout
from hf_grow.errors import OutputError
from hf_grow.growth.source_info import TensorInfo

tensor_lists = st.lists(
    st.tuples(st.sampled_from(["BF16", "F32", "F64"]), st.lists(st.integers(1, 9), min_size=1, max_size=3)), min_size=1, max_size=20
).map(lambda items: {f"t{i}": TensorInfo(d, tuple(s)) for i, (d, s) in enumerate(items)})


@settings(deadline=None)  # machines may be busy
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
    index = build_index(shards)
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
    with pytest.raises(OutputError, match="different plan"):
        folder(tmp_path, key="other", resume=True)


def existing(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    return tmp_path / "out"


def names(path: Path) -> list[str]:
    return sorted(str(p.relative_to(path)) for p in path.rglob("*"))


def test_overwrite_and_resume_go_on_and_replace_at_the_end(tmp_path: Path) -> None:
    out = existing(tmp_path)
    with folder(tmp_path, overwrite=True) as f:
        f.note("a", "1")
    with pytest.raises(OutputError, match="left over") as caught:
        folder(tmp_path, resume=True)
    assert "--overwrite --resume" in caught.value.hint
    with folder(tmp_path, resume=True, overwrite=True) as f:
        assert f.done == {"a": "1"}
        assert f.resume_hint.endswith("--overwrite --resume.")
        f.write_file("new", b"y")
        assert names(out) == ["precious"]
        f.finish({"new"})
    assert names(tmp_path) == ["out", "out/new"]


class Killed(BaseException):
    """Stands for the end of the process: what is open is closed, and nothing else happens."""


@pytest.mark.parametrize("can_exchange", [True, False], ids=["exchange", "two renames"])
@pytest.mark.parametrize("replacing", [True, False], ids=["replacing", "new"])
@pytest.mark.parametrize("again", ["same", "anew"])
def test_a_crash_between_any_two_steps_of_finishing_loses_neither_model(
    can_exchange: bool, replacing: bool, again: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before every call into the system from the first step of `finish` on: one of both models is whole, and the next run ends what was begun."""
    crashes = 0
    for at in range(1, 100):
        place = tmp_path / str(at)
        place.mkdir()
        if replacing:
            existing(place)
        calls = [0]

        def counted(real: Any, calls: list[int] = calls, at: int = at) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                calls[0] += 1
                if calls[0] == at:
                    raise Killed
                return real(*args, **kwargs)

            return call

        monkeypatch.setattr(partial, "unlock", lambda path, handle: os.close(handle))  # kill -9 removes no file
        f = folder(place, overwrite=replacing)
        f.write_file("config.json", b"new")
        f.note("a", "1")
        with monkeypatch.context() as patch, f:
            patch.setattr(partial, "exchange", counted(partial.exchange if can_exchange else lambda one, other: False))
            for name in ("fsync", "rename", "unlink", "rmdir", "write"):
                patch.setattr(os, name, counted(getattr(os, name)))
            try:
                f.finish({"config.json"})
                ended = True
            except Killed:
                ended = False
                crashes += 1
        monkeypatch.undo()
        whole = place / "out" / "config.json"
        old = list(place.rglob("precious"))
        settled = whole.exists() and not (place / "out" / JOURNAL).exists()
        if not settled:
            assert whole.exists() or not replacing or len(old) == 1
            if replacing and not (place / "out").exists():
                with pytest.raises(OutputError, match=r"is now .*\.replaced-\d+"):
                    folder(place)
            with folder(place, resume=again == "same", overwrite=replacing or again == "anew") as f:
                if not f.complete:
                    f.write_file("config.json", b"new")
                    f.finish({"config.json"})
                elif again == "anew":
                    raise AssertionError("nothing was asked to be gone on with")
        assert [n for n in names(place) if n != ".out.lock" or not settled] == ["out", "out/config.json"]
        if ended:
            break
    assert crashes >= (9 if replacing else 5)


def test_a_stranded_old_model_is_told_and_never_forgotten(tmp_path: Path) -> None:
    existing(tmp_path).rename(tmp_path / "out.replaced-123")
    for mode in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(OutputError, match=r"out\.replaced-123 was .*out before an interrupted run") as caught:
            folder(tmp_path, **mode)
        assert "mv " in caught.value.hint
    assert names(tmp_path) == ["out.replaced-123", "out.replaced-123/precious"]


def test_a_journal_cannot_name_another_folder_to_be_removed(tmp_path: Path) -> None:
    """Only the folder that stood under the name before, by its inode, and only beside it."""
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text("x")
    found = victim.stat()
    for aside in ("victim", "../victim", "out.replaced-1/../victim", str(victim), "out.replaced-1"):
        out = existing(tmp_path)
        entries = [{"fingerprint": "plan"}, {"finished": True, "replaced": {"inode": [found.st_dev, found.st_ino], "aside": aside}}]
        (out / JOURNAL).write_text("".join(json.dumps(e) + "\n" for e in entries))
        (tmp_path / "out.replaced-1").mkdir()
        with folder(tmp_path, resume=True) as f:
            assert f.complete
        assert (victim / "file").exists()
        assert (tmp_path / "out.replaced-1").exists()
        assert names(out) == ["precious"]
        (tmp_path / "out.replaced-1").rmdir()
        shutil.rmtree(out)


@pytest.mark.parametrize("entry", [3, [], "x", {"finished": True}, {"finished": True, "replaced": 3}, {"finished": True, "replaced": [1]},
                                   {"finished": True, "replaced": {"inode": "x", "aside": 3}}, {"finished": 1, "replaced": None},
                                   {"tensor": 3, "digest": []}, {"tensor": "a"}, {"sent": "x", "size": "y"}, {"committed": 3}], ids=str)  # fmt: skip
def test_a_journal_of_other_types_is_no_traceback(entry: Any, tmp_path: Path) -> None:
    with folder(tmp_path) as f:
        f.note("b", "2")
    journal = tmp_path / "out.partial" / JOURNAL
    journal.write_text(journal.read_text() + json.dumps(entry) + "\n")
    with folder(tmp_path, resume=True) as f:
        assert f.done == {"b": "2"}
        assert (f.sent, f.committed) == ({}, {})


def test_a_first_line_that_was_torn_does_not_swallow_the_next_run(tmp_path: Path) -> None:
    with folder(tmp_path) as f:
        f.note("a", "1")
    (tmp_path / "out.partial" / JOURNAL).write_bytes(b'{"finger')
    with folder(tmp_path, resume=True) as f:
        f.note("b", "2")
    with folder(tmp_path, resume=True) as f:
        assert f.done == {"b": "2"}


PLANTED: dict[str, Any] = {
    "link": lambda p, victim: p.symlink_to(victim),
    "link to a folder": lambda p, victim: p.symlink_to(victim.parent),
    "second name": lambda p, victim: os.link(victim, p),
    "pipe": lambda p, victim: os.mkfifo(p),
    "device": lambda p, victim: p.symlink_to("/dev/zero"),
    "folder": lambda p, victim: p.mkdir(),
}


@pytest.mark.parametrize("kind", PLANTED)
@pytest.mark.parametrize("name", [JOURNAL, "model.safetensors", "config.json", "growth.json", "tokenizer.json", "additional_chat_templates/a.jinja",
                                  ".source/x", "optimizer.pt"])  # fmt: skip
def test_what_was_planted_in_a_partial_folder_is_refused_and_nothing_written_through_it(kind: str, name: str, tmp_path: Path) -> None:
    victim = tmp_path / "elsewhere" / "victim"
    victim.parent.mkdir()
    victim.write_text("precious")
    folder(tmp_path).close()
    path = tmp_path / "out.partial" / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    PLANTED[kind](path, victim)
    with pytest.raises(OutputError, match="was not written by hf-grow") as caught:
        folder(tmp_path, resume=True)
    assert str(path) in caught.value.message
    assert victim.read_text() == "precious"
    with folder(tmp_path, overwrite=True) as f:  # the way out that the message names
        (f.path / name).parent.mkdir(exist_ok=True)
        f.write_file(name, b"new")
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("kind", ["link", "second name", "pipe"])
@pytest.mark.parametrize("name", ["config.json", "additional_chat_templates/a.jinja"])
def test_what_is_planted_while_it_is_written_is_not_written_through(kind: str, name: str, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    with folder(tmp_path) as f:
        path = f.path / name
        path.parent.mkdir(exist_ok=True)
        PLANTED[kind](path, victim)
        with pytest.raises((OutputError, OSError)):
            f.write_file(name, b"overwritten")
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("name", ["stray", "sub", "model.bin", "model-1-of-2.safetensors", "other.safetensors", "a\nb"])
def test_an_unknown_name_in_a_partial_folder_is_refused(name: str, tmp_path: Path) -> None:
    folder(tmp_path).close()
    (tmp_path / "out.partial" / name).write_text("x")
    with pytest.raises(OutputError, match="was not written by hf-grow"):
        folder(tmp_path, resume=True)


@pytest.mark.parametrize("name", ["out", "out.partial", ".out.lock"])
@pytest.mark.parametrize("kind", ["link", "link to a folder", "pipe"])
def test_a_link_or_a_pipe_in_place_of_a_folder_or_the_lock_is_refused(name: str, kind: str, tmp_path: Path) -> None:
    victim = tmp_path / "elsewhere" / "victim"
    victim.parent.mkdir()
    victim.write_text("precious")
    PLANTED[kind](tmp_path / name, victim)
    for mode in ({"resume": True}, {"overwrite": True}):
        if name == ".out.lock" and kind == "pipe":
            folder(tmp_path, **mode).close()  # a lock holds on whatever it is, and nothing is written to it
            os.mkfifo(tmp_path / name)
            continue
        with pytest.raises(OutputError, match=r"is not a folder|Cannot write"):
            folder(tmp_path, **mode)
    assert names(victim.parent) == ["victim"]


def test_a_command_that_cannot_resume_does_not_advise_it(tmp_path: Path) -> None:
    def merge(overwrite: bool = False) -> PartialFolder:
        return PartialFolder(tmp_path / "out", "merge", resume=False, overwrite=overwrite, resumable=False)

    with merge() as f:
        assert f.resume_hint == "Repeat the command with --overwrite."
    with pytest.raises(OutputError, match="left over") as caught:
        merge()
    assert "--resume" not in str(caught.value)
    with merge(overwrite=True) as f:
        f.write_file("config.json", b"new")
        f.finish({"config.json"})
    (tmp_path / "out" / JOURNAL).write_text('{"fingerprint": "merge"}\n{"finished": true, "replaced": null}\n')
    with pytest.raises(OutputError, match="interrupted in the last step") as caught:
        merge()
    assert "--resume" not in str(caught.value)
    merge(overwrite=True).close()
    assert "config.json" in names(tmp_path / "out")


@pytest.mark.parametrize("final", ["", ".", "..", "/", "a\0b"])
def test_what_cannot_be_the_name_of_a_folder_is_one_message(final: str) -> None:
    with pytest.raises(OutputError, match="is not a valid folder name"):
        PartialFolder.check(Path(final), resume=False, overwrite=True)


@pytest.mark.parametrize("mode", [{"resume": True}, {"overwrite": True}])
def test_a_second_writer_is_refused_while_the_first_lives(tmp_path: Path, mode: dict[str, bool]) -> None:
    with folder(tmp_path) as first:
        first.note("a", "1")
        with pytest.raises(OutputError, match="Another hf-grow"):
            folder(tmp_path, **mode)
        assert first.path.exists()


RACER = """
import os, sys, time
from pathlib import Path
from hf_grow.checkpoint.partial_folder import PartialFolder
from hf_grow.errors import OutputError
place, mine, written, refused = Path(sys.argv[1]), str(os.getpid()).encode(), 0, 0
while written < int(sys.argv[2]):
    try:
        with PartialFolder(place / "out", "plan", resume=False, overwrite=True) as folder:
            busy = os.open(place / "busy", os.O_CREAT | os.O_EXCL | os.O_WRONLY)  # fails where another writer is inside too
            for name in ("a", "b"):
                folder.write_file(name, mine)
            assert all((folder.path / name).read_bytes() == mine for name in ("a", "b"))
            os.close(busy)
            os.unlink(place / "busy")
            folder.finish({"a", "b"})
        written += 1
    except OutputError as error:
        assert "Another hf-grow" in error.message, error
        refused += 1
    time.sleep(0.0005)
print(refused)
"""


def test_two_processes_that_replace_one_output_are_never_inside_together(tmp_path: Path) -> None:
    """With the lock in the folder that is removed, either could delete what the other wrote."""
    words = [sys.executable, "-c", RACER, str(tmp_path), "60"]
    racers = [subprocess.Popen(words, stdout=-1, stderr=-1, text=True) for _ in range(3)]
    ended = [racer.communicate(timeout=100) for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0, 0], ended
    assert sum(int(out) for out, _ in ended) > 0  # they did meet
    assert names(tmp_path) == ["out", "out/a", "out/b"]


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
    with pytest.raises(OutputError, match="not a folder"):
        folder(tmp_path, overwrite=True)
    (tmp_path / "out").unlink()
    (tmp_path / "out").symlink_to(tmp_path)
    with pytest.raises(OutputError, match="not a folder"):
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
    check_disk_space(tmp_path / "a" / "b", 1000)
    with pytest.raises(OutputError, match="free"):
        check_disk_space(tmp_path / "a" / "b", 2**60)


def test_a_journal_is_plain_json_lines(tmp_path: Path) -> None:
    with folder(tmp_path) as f:
        f.note("a", "1")
        lines = (f.path / JOURNAL).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"fingerprint": "plan"}, {"tensor": "a", "digest": "1"}]
