"""Measures commands: the same state of caches, disk and memory before each run, then time and memory from the kernel."""

from __future__ import annotations

import mmap
import os
import platform
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PAGE = mmap.PAGESIZE
READ = 1 << 20
SAMPLE_SECONDS = 0.01


@dataclass(frozen=True)
class Usage:
    """Time and memory of one or more commands, run one after another."""

    wall: float
    cpu: float
    peak: int
    """Peak resident bytes, including pages of mapped files."""
    anonymous: int
    """Peak anonymous bytes (not backed by a file)."""
    disk_read: int
    others: float
    """Share of the machine's CPU time that other processes and other virtual machines used."""
    stdout: str = ""


class CommandFailed(Exception):
    pass


def run(commands: Sequence[Sequence[str]], environment: dict[str, str] | None = None) -> Usage:
    """Runs the commands in order, as one measurement. Raises CommandFailed with the end of the failing one's output."""
    busy, total = _processor_times()
    began = time.perf_counter()
    cpu, peak, anonymous, blocks, output = 0.0, 0, 0, 0, ""
    for command in commands:
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env={**os.environ, **(environment or {})})
            sampler = _MemorySampler(process.pid)
            try:
                _, status, usage = os.wait4(process.pid, 0)
            except BaseException:
                process.kill()
                process.wait()
                raise
            finally:
                sampler.stop()
            process.returncode = os.waitstatus_to_exitcode(status)
            out.seek(0)
            output = out.read().decode(errors="replace")
            if process.returncode:
                err.seek(0)
                tail = (output + err.read().decode(errors="replace"))[-3000:]
                raise CommandFailed(f"{' '.join(command[:6])} ... ended with {process.returncode}:\n{tail}")
        cpu += usage.ru_utime + usage.ru_stime
        blocks += usage.ru_inblock
        peak, anonymous = max(peak, sampler.peak), max(anonymous, sampler.anonymous)
    wall = time.perf_counter() - began
    busy_after, total_after = _processor_times()
    others = max(0.0, busy_after - busy - cpu) / max(total_after - total, 1e-9)
    return Usage(wall, cpu, peak, anonymous, blocks * 512, others, output)


class _MemorySampler:
    """Samples /proc/PID/status. VmHWM is the kernel's high-water mark, so only growth after the last sample is missed.

    wait4's ru_maxrss does not serve: a child inherits its parent's value.
    """

    def __init__(self, pid: int) -> None:
        self.path = f"/proc/{pid}/status"
        self.peak = self.anonymous = 0
        self.end = threading.Event()
        self.thread = threading.Thread(target=self._loop, daemon=True)
        self.thread.start()

    def _loop(self) -> None:
        while not self.end.is_set():
            try:
                with open(self.path) as file:
                    fields = dict(line.split(":", 1) for line in file)
            except OSError:
                return
            self.peak = max(self.peak, _bytes_of(fields.get("VmHWM")))
            self.anonymous = max(self.anonymous, _bytes_of(fields.get("RssAnon")))
            self.end.wait(SAMPLE_SECONDS)

    def stop(self) -> None:
        self.end.set()
        self.thread.join()


def _bytes_of(text: str | None) -> int:
    return int(text.split()[0]) << 10 if text else 0


def _processor_times() -> tuple[float, float]:
    """Busy seconds of all processors (including steal time), and total seconds."""
    with open("/proc/stat") as file:
        user, nice, system, idle, iowait, irq, softirq, steal = map(int, file.readline().split()[1:9])
    busy = user + nice + system + irq + softirq + steal
    tick = os.sysconf("SC_CLK_TCK")
    return busy / tick, (busy + idle + iowait) / tick


def settle(inputs: Path, *, cold: bool, needs: int) -> None:
    """Brings the machine into the same state before each run: no dirty pages, ``inputs`` in the page cache or (``cold``) not, and ``needs`` bytes
    of free memory that is backed by the host.

    The last matters in virtual machines that report free pages to their host (virtio-balloon): a page freed some seconds ago has been taken
    back, and its next user waits for the host to find and zero a new one; the same cp then costs six times the CPU time. The kernel reports
    up to a sixteenth of each free list at a time, newest first, hence the margin.
    """
    os.sync()
    for path in sorted(inputs.rglob("*")):
        if path.is_file():
            _evict(path) if cold else _read(path)
    free = _memory("MemFree")
    _touch(min(needs + free // 8, int(0.8 * free)))


def _evict(path: Path) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read(path: Path) -> None:
    buffer = bytearray(READ)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def _touch(nbytes: int) -> None:
    if nbytes >= PAGE:
        with mmap.mmap(-1, nbytes) as memory:
            pages = np.frombuffer(memory, np.uint8)
            pages[::PAGE] = 1
            del pages


def _memory(key: str) -> int:
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(key + ":"))


def remove(path: Path) -> None:
    """Deletes a folder and syncs the file system."""
    if path.exists():
        shutil.rmtree(path)
        os.sync()


def machine(folder: Path) -> dict[str, str]:
    """The hardware and file system that the numbers depend on."""
    with open("/proc/cpuinfo") as file:
        models = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    return {
        "processor": f"{models[0] if models else platform.processor()}, {os.cpu_count()} cores",
        "memory": f"{_memory('MemTotal') / 1e9:.0f} GB",
        "kernel": f"{platform.system()} {platform.release().split('-')[0]}",
        "file system": _file_system(folder),
    }


def _file_system(folder: Path) -> str:
    """The type of the file system that holds ``folder``: that of the longest mount point above it."""
    with open("/proc/self/mounts") as file:
        mounts = [line.split()[1:3] for line in file]
    inside = [(point, kind) for point, kind in mounts if folder.resolve().is_relative_to(point)]
    return max(inside, key=lambda m: len(m[0]))[1]
