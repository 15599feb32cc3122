"""Memory available to this process: the machine's free memory and the limits of its control groups (containers).

Linux Documentation/admin-guide/cgroup-v2.rst (memory.max, memory.current) and cgroup-v1/memory.rst (memory.limit_in_bytes). psutil is no
replacement: its virtual_memory() ignores control groups.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

CGROUP_V2 = ("memory.max", "memory.current", "inactive_file")
CGROUP_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
"""The files of limit and usage, and the memory.stat field of reclaimable page cache."""


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this process can allocate before it runs into a limit, as far as the system reports. ``root``: where /proc and /sys are."""
    available = [_machine_memory(root)]
    for folder, (limit_file, usage_file, reclaimable) in _control_groups(root):
        limit, usage = _number(folder / limit_file), _number(folder / usage_file)
        if limit is not None and usage is not None:
            available.append(max(0, limit - max(0, usage - _field(folder / "memory.stat", reclaimable))))
    return min(available)


def _machine_memory(root: Path) -> int:
    # MemAvailable is in KiB. Without /proc, the physical memory.
    return 1024 * _field(root / "proc/meminfo", "MemAvailable:") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _control_groups(root: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """The control groups of this process and their parents. In a container the paths may be the host's; then only the root group exists."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        inside = PurePosixPath(path.lstrip("/"))
        if ".." in inside.parts or (controllers and "memory" not in controllers.split(",")):
            continue
        for top in ("sys/fs/cgroup/memory",) if controllers else ("sys/fs/cgroup", "sys/fs/cgroup/unified"):
            for group in (inside, *inside.parents):
                yield root / top / group, CGROUP_V1 if controllers else CGROUP_V2


def _number(path: Path) -> int | None:
    """None if the file does not exist or says "max" (no limit)."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _field(path: Path, name: str) -> int:
    """The number in the line "name number ..."; 0 if there is none."""
    try:
        rows = [line.split() for line in path.read_text().splitlines()]
        return next((int(row[1]) for row in rows if len(row) > 1 and row[0] == name), 0)
    except (OSError, ValueError):
        return 0
