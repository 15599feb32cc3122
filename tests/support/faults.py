"""Runs hf-grow with a fault in its n-th call into the operating system. Jobs come as JSON lines on stdin, and so do the results on stdout.

A job: argv; how: `count`, `kill` or the name of an errno; at: which call; look: a folder whose files are wanted afterwards; times: how many
processes at once. Each runs in a fork of this process, which has loaded everything before: a fault costs a tenth of a second.

Only calls of hf-grow itself count (through whatever part of the standard library), and what is written to stdout.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import signal
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

CALLS = (
    "open", "close", "dup", "write", "pwrite", "pread", "preadv", "stat", "lstat", "fstat", "fsync", "ftruncate", "rename", "replace", "unlink", "mkdir",
    "rmdir", "listdir", "scandir", "copy_file_range", "sendfile", "readlink",
)  # fmt: skip
LIBRARY = os.path.dirname(os.__file__)
KILL = os.kill
WRITE = os.write


class Faults:
    def __init__(self, how: str, at: int, log: int) -> None:
        import hf_grow

        self.how, self.at, self.log, self.count, self.lock = how, at, log, 0, threading.Lock()
        self.home = os.path.dirname(hf_grow.__file__)
        for name in CALLS:
            setattr(os, name, self.wrapped(name, getattr(os, name)))

    def ours(self) -> bool:
        """Whether the innermost caller that is not of the standard library is hf-grow."""
        frame = sys._getframe(2)
        while frame is not None:
            file = frame.f_code.co_filename
            if file.startswith(self.home):
                return True
            if file != __file__ and not file.startswith("<") and (not file.startswith(LIBRARY) or "site-packages" in file):
                return False
            frame = frame.f_back
        return False

    def hit(self, name: str) -> bool:
        with self.lock:
            self.count += 1
            now = self.count == self.at
        if self.how == "count":
            WRITE(self.log, f"{name}\n".encode())
        if now:
            WRITE(self.log, f"{name}\n".encode())
        return now

    def fail(self) -> None:
        if self.how == "kill":
            KILL(os.getpid(), signal.SIGKILL)
        code = getattr(errno, self.how)
        raise OSError(code, os.strerror(code))

    def wrapped(self, name: str, real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not self.ours() or not self.hit(name):
                return real(*args, **kwargs)
            if name == "close" or (self.how == "kill" and self.at % 2):  # a close that fails has closed; kill before or after the call
                real(*args, **kwargs)
            return self.fail()

        return call


def install(how: str, at: int, log: int) -> None:
    from hf_grow.checkpoint import partial_folder as partial
    from hf_grow.common import safe_files as untrusted

    faults = Faults(how, at, log)
    partial.exchange = faults.wrapped("renameat2", partial.exchange)

    class Read(io.FileIO):
        def read(self, size: int = -1) -> Any:
            if faults.hit("read"):
                faults.fail()
            return super().read(size)

    untrusted.FileIO = Read  # type: ignore[misc]

    class Out(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            if faults.hit("write"):
                faults.fail()
            return WRITE(1, data)

        def fileno(self) -> int:
            return 1

    sys.stdout = io.TextIOWrapper(io.BufferedWriter(Out()), encoding="utf-8")


def child(job: dict[str, Any], streams: list[Any]) -> None:
    status = 70
    try:
        for target, stream in zip((1, 2), streams, strict=False):
            os.dup2(stream.fileno(), target)
        install(job["how"], job.get("at", 0), streams[2].fileno())
        from hf_grow.cli import main

        status = main(job["argv"])
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def run(job: dict[str, Any]) -> dict[str, Any]:
    started = []
    for _ in range(job.get("times", 1)):
        streams = [tempfile.TemporaryFile() for _ in range(3)]  # noqa: SIM115 - closed below
        pid = os.fork()
        if pid == 0:
            child(job, streams)
        started.append((pid, streams))
    found = []
    for pid, streams in started:
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        texts = []
        for stream in streams:
            stream.seek(0)
            texts.append(stream.read().decode(errors="replace"))
            stream.close()
        found.append({"status": status, "out": texts[0], "err": texts[1], "calls": texts[2].split()})
    look = Path(job["look"]) if "look" in job else None
    files = (
        {p.relative_to(look).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(look.rglob("*")) if p.is_file()}
        if look and look.is_dir()
        else {}
    )
    return {**found[0], "files": files, "all": found}


if __name__ == "__main__":
    import hf_grow.api
    import hf_grow.cli.grow
    import hf_grow.convert.execute
    import hf_grow.growth.evaluate
    import hf_grow.verification  # noqa: F401

    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
