"""Mutated files and odd command lines end in one message: no traceback, signal, hang, flood of memory, damaged JSON or control character.

Every class of bad ending that was found has a fast test of its own beside the code it was in; this looks for further ones.
`HF_GROW_FUZZ=10000 HF_GROW_FUZZ_SEED=1` set the number of cases and the seed; `make fuzz` runs 10,000.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_mutated_input_ends_in_one_message(tmp_path: Path) -> None:
    cases, seed = os.environ.get("HF_GROW_FUZZ", "200"), os.environ.get("HF_GROW_FUZZ_SEED", "1")
    worker = Path(__file__).with_name("worker.py")
    words = [sys.executable, str(worker), "--cases", cases, "--seed", seed, "--keep", str(tmp_path / "bad")]
    done = subprocess.run(words, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stdout[-6_000:] + done.stderr[-2_000:]
    assert f"{cases} cases, 0 bad endings" in done.stdout


def test_a_case_follows_from_its_seed_and_number_alone() -> None:
    code = "import sys; sys.path[:0] = sys.argv[1:]\nfrom cases import case\nprint([case(5, n) for n in range(60)])"
    here = Path(__file__).parent
    words = [sys.executable, "-c", code, str(here), str(here.parent / "support")]
    first, second = (subprocess.run(words, capture_output=True, text=True, check=True).stdout for _ in range(2))
    assert first == second
    assert "source/config.json" in first and "target=''" in first
