"""Memory that a process may take: in and outside of control groups of both versions."""

from __future__ import annotations

from pathlib import Path

from hf_grow.common.free_memory import available_memory

GB = 10**9


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": "MemTotal: 64000000 kB\nMemAvailable:   32000000 kB\n", **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_the_machine_s_own(tmp_path: Path) -> None:
    assert available_memory(tree(tmp_path, {})) == 32_000_000 * 1024
    assert available_memory(tmp_path / "nothing") > 0
    assert available_memory() > 0


def test_a_container_of_version_2_whose_path_is_that_of_the_host(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/docker/abc\n", "sys/fs/cgroup/memory.max": f"{8 * GB}\n", "sys/fs/cgroup/memory.current": f"{5 * GB}\n",
             "sys/fs/cgroup/memory.stat": f"anon 1\ninactive_file {2 * GB}\n"}  # fmt: skip
    assert available_memory(tree(tmp_path, files)) == 5 * GB


def test_the_narrowest_of_nested_groups_counts(tmp_path: Path) -> None:
    top = "sys/fs/cgroup/user.slice"
    files = {"proc/self/cgroup": "0::/user.slice/job.scope\n", f"{top}/memory.max": f"{6 * GB}", f"{top}/memory.current": f"{GB}",
             f"{top}/job.scope/memory.max": "max\n", f"{top}/job.scope/memory.current": "7"}  # fmt: skip
    assert available_memory(tree(tmp_path, files)) == 5 * GB


def test_version_1_and_a_limit_that_is_none(tmp_path: Path) -> None:
    top = "sys/fs/cgroup/memory"
    files = {"proc/self/cgroup": "5:cpu:/\n4:memory,hugetlb:/slurm/job\n0::/\n", f"{top}/memory.limit_in_bytes": f"{2**63 - 4096}",
             f"{top}/memory.usage_in_bytes": f"{GB}", f"{top}/slurm/job/memory.limit_in_bytes": f"{4 * GB}",
             f"{top}/slurm/job/memory.usage_in_bytes": f"{3 * GB}", f"{top}/slurm/job/memory.stat": "total_inactive_file 500\n"}  # fmt: skip
    assert available_memory(tree(tmp_path, files)) == GB + 500


def test_what_is_used_beyond_the_limit_leaves_nothing_and_odd_files_are_passed_over(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/../../etc\nodd\n1:name=x:/\n0::/a\n", "sys/fs/cgroup/a/memory.max": "10", "sys/fs/cgroup/a/memory.current": "20",
             "sys/fs/cgroup/memory.max": "many", "sys/fs/cgroup/memory.current": "1"}  # fmt: skip
    assert available_memory(tree(tmp_path, files)) == 0
