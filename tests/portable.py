"""The tests as on other processors: every instruction set that torch knows, one thread and two, other last bits; in random order.

    python tests/portable.py                   all legs that have not passed yet with the code as it is
    python tests/portable.py default-1 avx2-2  these
    python tests/portable.py --seed 7 --again  all, in the order that seed 7 makes

A leg is INSTRUCTIONS-THREADS. `perturbed-1` runs with `--perturb SEED` (tests/support/perturbed.py). A leg whose instructions this processor lacks is
skipped, and so is one that has passed (build/portable/ remembers which, and keeps the output of each). Exit status 1 where a leg failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "build" / "portable"
LEGS = [f"{instructions}-{threads}" for instructions in ("default", "avx2", "native") for threads in (1, 2)] + ["perturbed-1"]


def code() -> str:
    """A digest of all that the tests run."""
    found = hashlib.sha256()
    for folder in ("hf_grow", "tests", "benchmarks", "recipes", "docs"):
        for path in sorted(p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".yaml", ".md", ".txt")):
            found.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return found.hexdigest()


def environment(leg: str) -> dict[str, str]:
    instructions, threads = leg.split("-")
    others = {k: v for k, v in os.environ.items() if k != "ATEN_CPU_CAPABILITY"}
    own = {} if instructions in ("native", "perturbed") else {"ATEN_CPU_CAPABILITY": instructions}
    return others | own | {"OMP_NUM_THREADS": threads}


def lacks(leg: str) -> bool:
    """Whether torch uses other instructions than the leg asks for."""
    wanted = environment(leg).get("ATEN_CPU_CAPABILITY")
    ask = [sys.executable, "-c", "import torch; print(torch.backends.cpu.get_cpu_capability())"]
    used = subprocess.run(ask, env=environment(leg), capture_output=True, text=True, check=True).stdout.strip().lower()
    return wanted is not None and used != wanted


def run(leg: str, seed: int, more: list[str]) -> int:
    """Runs the leg, with as many workers as there are processors for its threads; its exit status. What pytest says goes into a file too."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = max(1, min(4, processors // int(leg.split("-")[1])))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "randomly", f"--randomly-seed={seed}"]
    command += ["-n", str(workers), "--dist", "worksteal"] if workers > 1 else []
    command += ["--perturb", str(seed % 2**16)] if leg.startswith("perturbed") else []
    own = {k: v for k, v in environment(leg).items() if k in ("ATEN_CPU_CAPABILITY", "OMP_NUM_THREADS")}
    print(f"\n== {leg}: " + " ".join([*(f"{k}={v}" for k, v in own.items()), "python", *command[1:], *more]), flush=True)
    with (KEPT / f"{leg}.txt").open("w", encoding="utf-8") as kept:
        process = subprocess.Popen(
            [*command, *more], cwd=ROOT, env=environment(leg), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace",
        )  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            kept.write(line)
            print(line, end="", flush=True)
        return process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("legs", nargs="*", metavar="LEG", help=f"of {', '.join(LEGS)}; default: all")
    parser.add_argument("--seed", type=int, help="of the order, and of the perturbed leg (default: drawn, and printed)")
    parser.add_argument("--again", action="store_true", help="also legs that have passed")
    parser.add_argument("--pytest", nargs=argparse.REMAINDER, default=[], help="what else pytest is given, such as files")
    given = parser.parse_args()
    if unknown := [leg for leg in given.legs if leg not in LEGS]:
        parser.error(f"no leg is called {', '.join(unknown)}; there are {', '.join(LEGS)}")
    seed = given.seed if given.seed is not None else random.SystemRandom().randrange(2**16)
    KEPT.mkdir(parents=True, exist_ok=True)
    record, digest = KEPT / "passed.json", code() + " ".join(given.pytest)
    told = json.loads(record.read_text()) if record.exists() else {}
    passed: dict[str, str] = told["legs"] if told.get("code") == digest else {}
    said = {}
    for leg in given.legs or LEGS:
        if lacks(leg):
            said[leg] = "skipped: this processor lacks the instructions"
        elif leg in passed and not given.again:
            said[leg] = f"passed before ({passed[leg]})"
        else:
            start = time.monotonic()
            status = run(leg, seed, given.pytest)
            facts = f"seed {seed}, {time.monotonic() - start:.0f} s"
            said[leg] = f"passed ({facts})" if status == 0 else f"FAILED with status {status} ({facts}): {KEPT / leg}.txt"
            if status == 0:
                passed[leg] = facts
                record.write_text(json.dumps({"code": digest, "legs": passed}, indent=1))
    print("\n" + "\n".join(f"{leg:12} {word}" for leg, word in said.items()))
    return int(any(word.startswith("FAILED") for word in said.values()))


if __name__ == "__main__":
    sys.exit(main())
