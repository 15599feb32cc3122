"""Faults of the operating system at any call: one message, no traceback, and the same bytes when the run is gone on with."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from models import BY_NAME, make, save

from hf_grow import api

SUPPORT = Path(__file__).parents[1] / "support"


def carried_out(jobs: Sequence[dict[str, Any]], limit: float = 900) -> list[dict[str, Any]]:
    text = "".join(json.dumps(job) + "\n" for job in jobs)
    done = subprocess.run([sys.executable, str(SUPPORT / "faults.py")], input=text, capture_output=True, text=True, timeout=limit)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == len(jobs)
    return results


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save(make(BY_NAME["mistral"], dtype=torch.bfloat16), tmp_path_factory.mktemp("source") / "mistral", sharded=True)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "LICENSE").write_text("free")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ x }}")
    return folder


def words(source: Path, out: Path, *more: str) -> list[str]:
    return ["depth", str(source), "--method", "identity", "--noise", "0.01", "--max-shard-size", "60KB", "-o", str(out), *more]


def test_every_kind_of_call_is_reached(source: Path, tmp_path: Path) -> None:
    """What the tests below inject into is what a run does, so that none of them passes by missing it."""
    api.grow(source, tmp_path / "out")
    (counted,) = carried_out([{"argv": words(source, tmp_path / "out", "--overwrite"), "how": "count"}])
    assert counted["status"] == 0, counted["err"]
    kinds = {
        "open",
        "close",
        "read",
        "write",
        "pwrite",
        "preadv",
        "stat",
        "lstat",
        "fstat",
        "fsync",
        "ftruncate",
        "unlink",
        "rmdir",
        "mkdir",
        "renameat2",
    }
    assert kinds <= set(counted["calls"])
    assert len(counted["calls"]) > 500


def check_faults(source: Path, tmp_path: Path, replacing: bool, hows: Sequence[str], points: int, seed: int) -> dict[str, int]:
    """Injects, looks, goes on, compares. Returns how the runs with a fault ended."""
    old = tmp_path / "old"
    api.grow(source, old, "dus")
    more = ("--overwrite",) if replacing else ()

    def place(name: str) -> Path:
        (tmp_path / name).mkdir()
        if replacing:
            shutil.copytree(old, tmp_path / name / "out")
        return tmp_path / name / "out"

    whole, before = place("whole"), (place("before") if replacing else tmp_path / "none")
    counted, looked = carried_out(
        [
            {"argv": words(source, whole, *more), "how": "count", "look": str(whole)},
            {"argv": ["--version"], "how": "count", "look": str(before)},
        ]
    )
    assert counted["status"] == 0, counted["err"]
    calls, draw = len(counted["calls"]), random.Random(seed)
    jobs: list[dict[str, Any]] = []
    cases = []
    for number in range(points):
        # Early, late and anywhere: the ends of a run are where the traps are.
        at = draw.choice([draw.randrange(1, 120), draw.randrange(1, calls), draw.randrange(calls - 150, calls)])
        how = hows[number % len(hows)]
        out = place(f"{number}-{how}-{at}")
        cases.append((how, at, out))
        jobs.append({"argv": words(source, out, *more), "how": how, "at": at, "look": str(out)})
        jobs.append({"argv": words(source, out, *more, "--resume"), "how": "count", "look": str(out)})
    results = carried_out(jobs)
    ends: dict[str, int] = {}
    for (how, at, out), first, second in zip(cases, results[::2], results[1::2], strict=True):
        case = f"{how} at {at} ({first['calls']}): {first['err']}\nthen: {second['err']}"
        status = "not reached" if not first["calls"] else "killed" if first["status"] == -9 else str(first["status"])
        ends[status] = ends.get(status, 0) + 1
        assert "Traceback" not in first["err"] + first["out"], case
        if how == "kill":
            assert first["status"] in (-9, 0), case
        elif first["status"] == 0:
            assert first["files"] == counted["files"], case  # a call that may fail, such as removing the lock
        else:
            assert first["status"] in (1, 2), case
            assert first["err"].count("hf-grow: ") == 1, case
            assert re.search(r"/|standard output", first["err"]), case  # the file is named
        journal = [n for n in first["files"] if n.startswith(".")]
        assert {n: h for n, h in first["files"].items() if n not in journal} in (looked["files"], counted["files"], {}), case
        if second["status"] == 2:  # all had been done when the fault came
            assert "exists and is not empty" in second["err"], case
        else:
            assert second["status"] == 0, case
        assert second["files"] == counted["files"], case
        assert [p.name for p in out.parent.iterdir() if p.name != ".out.lock" or second["status"] == 0] == ["out"], case
    return ends


@pytest.mark.parametrize("replacing", [False, True], ids=["new", "replacing"])
def test_faults_at_some_calls(replacing: bool, source: Path, tmp_path: Path) -> None:
    ends = check_faults(source, tmp_path, replacing, ["kill", "EIO", "ENOSPC"], 12, int.from_bytes(os.urandom(4), "little"))
    assert ends.get("not reached", 0) <= 3, ends


@pytest.mark.slow
@pytest.mark.parametrize("replacing", [False, True], ids=["new", "replacing"])
@pytest.mark.parametrize("how", ["kill", "EIO", "ENOSPC", "EACCES"])
def test_faults_at_many_calls(how: str, replacing: bool, source: Path, tmp_path: Path) -> None:
    ends = check_faults(source, tmp_path, replacing, [how], 60, 7)
    assert ends.get("not reached", 0) <= 6, ends


def test_several_processes_that_replace_one_output_do_not_meet(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    jobs = [{"argv": words(source, out, "--overwrite"), "how": "count", "look": str(out), "times": 3} for _ in range(6)]
    results = carried_out(jobs)
    for result in results:
        ends = sorted(r["status"] for r in result["all"])
        assert ends[0] == 0, result
        assert set(ends) <= {0, 2}
        for one in result["all"]:
            assert one["status"] == 0 or "Another hf-grow process is writing" in one["err"], one
        assert result["files"] == results[0]["files"] != {}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# ---- a disk that is really full ------------------------------------------------------------------------------------------------------


@contextmanager
def small_disk(path: Path, kilobytes: int) -> Iterator[Path]:
    path.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(path)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("a file system of a chosen size needs the right to mount one")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.mark.parametrize("part", [0, 0.02, 0.4, 0.8, 0.97])
def test_a_disk_that_gets_full_anywhere_is_one_message_and_is_gone_on_with(part: float, source: Path, tmp_path: Path) -> None:
    """The disk is filled by another file while the growth runs: its check of the room before cannot know."""
    api.grow(source, tmp_path / "whole", "identity", noise=0.01, max_shard_size=60_000)
    need = sum(p.stat().st_size for p in (tmp_path / "whole").rglob("*"))
    with small_disk(tmp_path / "disk", 4 * need // 1024 + 400) as disk:
        code = (
            "import shutil, sys\nfrom hf_grow.checkpoint import partial_folder as partial\nfrom hf_grow.cli import main\n"
            "real = partial.PartialFolder._begin\n"
            "def begin(self, resume):\n"
            f"    fill = open({str(disk / 'filler')!r}, 'wb', buffering=0)\n"
            f"    free = shutil.disk_usage({str(disk)!r}).free - {int(part * need)}\n"
            "    while free > 0: free -= fill.write(bytes(min(free, 1 << 20)))\n"
            "    fill.close()\n"
            "    real(self, resume)\n"
            "partial.PartialFolder._begin = begin\n"
            "sys.exit(main(sys.argv[1:]))\n"
        )
        argv = words(source, disk / "out")
        done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, timeout=120)
        assert done.returncode in (1, 2), done.stderr
        assert "Traceback" not in done.stderr
        assert done.stderr.count("hf-grow: ") == 1
        assert "Free some space" in done.stderr, done.stderr
        assert not (disk / "out").exists()
        (disk / "filler").unlink()
        result = api.grow(source, disk / "out", "identity", noise=0.01, max_shard_size=60_000, resume=True)
        assert result.out == disk / "out"
        found = {p.relative_to(disk / "out"): p.read_bytes() for p in (disk / "out").rglob("*") if p.is_file()}
        assert found == {p.relative_to(tmp_path / "whole"): p.read_bytes() for p in (tmp_path / "whole").rglob("*") if p.is_file()}
