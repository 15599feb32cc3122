"""How much memory this process may still take: what the machine has free, and what every control group (container) that it lies in leaves it.

Control groups: Linux, Documentation/admin-guide/cgroup-v2.rst (memory.max, memory.current) and cgroup-v1/memory.rst (memory.limit_in_bytes).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

UNIFIED = ("memory.max", "memory.current", "inactive_file")
SEPARATE = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
"""Files of the limit and of what is used, and what memory.stat calls pages of files that go when memory is short; of version 2 and 1."""


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that can be taken without being killed, as far as the system tells."""
    left = [_of_machine(root)]
    for folder, (limit, used, reclaimable) in _groups(root):
        most, taken = _number(folder / limit), _number(folder / used)
        if most is not None and taken is not None:
            left.append(max(0, most - max(0, taken - _field(folder / "memory.stat", reclaimable))))
    return min(left)


def _of_machine(root: Path) -> int:
    # In KiB. Without /proc: what there is at all.
    return 1024 * _field(root / "proc/meminfo", "MemAvailable:") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _groups(root: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """The groups that this process lies in and all above them. Inside a container the paths may be the host's: then only the top is there."""
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
                yield root / top / group, SEPARATE if controllers else UNIFIED


def _number(path: Path) -> int | None:
    """None where there is no file, or no limit ("max")."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _field(path: Path, name: str) -> int:
    """A number of a file with lines "name number ..."; 0 where there is none."""
    try:
        rows = [line.split() for line in path.read_text().splitlines()]
        return next((int(row[1]) for row in rows if len(row) > 1 and row[0] == name), 0)
    except (OSError, ValueError):
        return 0
