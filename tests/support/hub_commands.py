"""Commands run against the test Hub of hub_server.py, in this process or another, and what they published."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import hub_uploads
import pytest
from hub_server import HubServer, client_environment
from hub_uploads import READ, WRITE

from hf_grow.cli import main

REPO = "someone/grown"


@pytest.fixture
def open_hub(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """A Hub where the token of the environment may write for `someone` and `tester`; the library's pauses are skipped."""
    hub_uploads.allow(hub, "someone", "tester")
    monkeypatch.setenv("HF_TOKEN", WRITE)
    hub_uploads.no_pauses(monkeypatch)
    return hub


def run(*words: object) -> int:
    return main([str(w) for w in words])


def refused(capsys: pytest.CaptureFixture[str], *words: object, status: int = 2, lines: int = 2) -> str:
    capsys.readouterr()
    assert run(*words) == status
    captured = capsys.readouterr()
    output = captured.err[captured.err.index("hf-grow: ") :]
    assert "Traceback" not in captured.err
    assert output.count("\n") == lines, output  # what is wrong, and the next step
    for secret in (WRITE, READ, "secret-signature"):
        assert secret not in output
    return output


def process(hub: HubServer, home: Path, words: list[Any], **settings: str) -> subprocess.Popen[str]:
    environment = {**os.environ, **client_environment(hub, home), "HF_TOKEN": WRITE, **settings}
    return subprocess.Popen(
        [sys.executable, "-m", "hf_grow", *map(str, words)], stdout=-1, stderr=-1, text=True, env=environment, cwd=Path(__file__).parents[2]
    )


@contextmanager
def watched(folder: Path, pattern: str = "*.safetensors*") -> Iterator[list[int]]:
    """Bytes of weights (or of what the pattern says) on the disk under `folder`, looked at all the time by another thread: [most so far, number of looks]."""
    seen, done = [0, 0], threading.Event()

    def look() -> None:
        while not done.is_set():
            nbytes = 0
            with suppress(FileNotFoundError):  # a folder that goes away while it is listed
                for path in folder.rglob(pattern):
                    with suppress(FileNotFoundError):
                        nbytes += path.stat().st_size if path.is_file() else 0
            seen[:] = [max(seen[0], nbytes), seen[1] + 1]
            time.sleep(0.0005)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def published(hub: HubServer, *, branch: str = "main") -> dict[str, bytes]:
    repo = hub.repos[REPO]
    return {n: b"".join(b.chunks()) for n, b in repo.commits[repo.refs[branch]].items() if n != ".gitattributes"}


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def without_card(files: dict[str, bytes]) -> dict[str, bytes]:
    return {n: data for n, data in files.items() if n not in ("README.md", "layer-map.svg")}
