"""local_main_process_first: no process waits in a collective, so no process group times out."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate.utils
import filelock
import pytest
from trained import recipe
from two_processes import model, together

from hf_grow.errors import ExecutionError
from hf_grow.training.distributed.process_order import local_main_process_first

HANG = 600
"""Timeout in seconds, long enough for a busy machine."""


@dataclass
class FakeArguments:
    """The fields of TrainingArguments that are used, for a process that a thread stands for."""

    local_process_index: int
    world_size: int = 3


@pytest.fixture
def collectives(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Collectives of three threads, and how many threads are in one."""
    state, guard, barrier, named = {"inside": 0}, threading.Lock(), threading.Barrier(3, timeout=HANG), []

    def collective() -> None:
        with guard:
            state["inside"] += 1
        barrier.wait()
        with guard:
            state["inside"] -= 1

    def broadcast(objects: list[Any]) -> list[Any]:
        if threading.current_thread().name == "0":
            named[:] = objects
        collective()
        return list(named)

    monkeypatch.setattr(accelerate.utils, "broadcast_object_list", broadcast)
    monkeypatch.setattr(accelerate.utils, "wait_for_everyone", collective)
    return state


def run(body: Any) -> None:
    threads = [threading.Thread(target=body, args=(rank,), name=str(rank)) for rank in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(timeout=HANG)
        assert not t.is_alive()


def test_waiting_processes_are_in_no_collective(collectives: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[int] = []
    waiting = threading.Semaphore(0)

    class CountingLock(filelock.FileLock):
        def acquire(self, *positional: Any, **named: Any) -> Any:
            waiting.release()
            return super().acquire(*positional, **named)

    monkeypatch.setattr(filelock, "FileLock", CountingLock)

    def process(rank: int) -> None:
        with local_main_process_first(FakeArguments(rank), "the texts"):  # type: ignore[arg-type]
            if rank == 0:
                assert all(waiting.acquire(timeout=HANG) for _ in range(3)), "its own, and both others are at the lock"
                assert order == [] and collectives["inside"] == 0
            order.append(rank)

    run(process)
    assert order[0] == 0 and sorted(order) == [0, 1, 2]


def test_failure_of_first_process_stops_the_others(collectives: dict[str, int]) -> None:
    found: dict[int, BaseException] = {}

    def process(rank: int) -> None:
        try:
            with local_main_process_first(FakeArguments(rank), "the texts"):  # type: ignore[arg-type]
                assert rank == 0, "the others do not begin"
                raise ValueError("no room")
        except (ValueError, ExecutionError) as error:
            found[rank] = error

    run(process)
    assert str(found[0]) == "no room"
    assert all("failed at the texts" in str(found[rank]) for rank in (1, 2))


def test_single_process_uses_no_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerate.utils, "broadcast_object_list", lambda *a: pytest.fail("a collective"))
    with local_main_process_first(FakeArguments(0, 1), "the texts"):  # type: ignore[arg-type]
        pass


@pytest.mark.slow
def test_packing_may_exceed_process_group_timeout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAUNCHED_SLOW", "10")
    monkeypatch.setenv("LAUNCHED_PATIENCE", "20")
    path = recipe(tmp_path, model(tmp_path), max_steps=2)
    facts = together("ddp", path, tmp_path / "out")
    assert [f["packed"] for f in facts] == [3, 0]
    assert (tmp_path / "out" / "config.json").is_file()
