"""Runs cases, each in a process forked from this warm one, with bounds on time and memory, and says how each ended.

python tests/fuzz/worker.py --cases 10000 --seed 1     prints the seed and the bad endings; their folders are kept to be run again
python tests/fuzz/worker.py --seed 1 --case 4711       runs one case again and shows what it says
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import io
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")]
HOME = Path(tempfile.mkdtemp(prefix="hf-grow-fuzz-home-"))
HOME.chmod(0o777)
atexit.register(shutil.rmtree, HOME, ignore_errors=True)  # a child leaves by os._exit, which runs none of this
os.environ |= {
    "HOME": str(HOME),
    "HF_HOME": str(HOME),
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "COLUMNS": "100",
}

import corpus  # noqa: E402
from cases import Case, case, mutated  # noqa: E402

CPU_SECONDS, WALL_SECONDS = 40, 240
MEMORY = 700 << 20
"""What a case may take beyond what the warm process holds."""
LONGEST = 20_000
"""Characters on stderr."""


@dataclass(frozen=True)
class Ending:
    made: Case
    wrong: str
    """Empty for a good ending; else what was bad about it, in a line that cases of one cause share."""
    said: str = ""


def warm() -> None:
    """Imports what the commands import, so that no case pays for it."""
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401

    from hf_grow.training.config.train_config import training_arguments_model

    torch.set_num_threads(1)
    training_arguments_model()


def run_case(made: Case, seed: int, base: Path, keep: Path | None = None) -> Ending:
    folder = Path(tempfile.mkdtemp(prefix="hf-grow-fuzz-"))
    try:
        corpus.fresh(base, folder / "case")
        mutated(made, seed, folder / "case")
        ending = _judge(made, folder)
        if ending.wrong and keep is not None:
            shutil.copytree(folder / "case", keep / str(made.number), dirs_exist_ok=True, symlinks=True)
            (keep / str(made.number) / "ENDING").write_text(f"{made.told}\n{ending.wrong}\n{ending.said}", errors="backslashreplace")
        return ending
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _judge(made: Case, folder: Path) -> Ending:
    if os.getuid() == 0:  # odd words must not reach other folders, whatever the command does with them
        for path in (folder, *folder.rglob("*")):
            os.chown(path, 65534, 65534, follow_symlinks=False)
    child = os.fork()
    if child == 0:
        _work(made, folder)
    began, status, used = time.monotonic(), 0, None
    while used is None:
        ended, status, usage = os.wait4(child, os.WNOHANG)
        if ended:
            used = usage
        elif time.monotonic() - began > WALL_SECONDS:
            os.kill(child, signal.SIGKILL)
            os.wait4(child, 0)
            return Ending(made, "timeout")
        else:
            time.sleep(0.002)
    out, err = ((folder / n).read_text("utf-8", "replace") if (folder / n).exists() else "" for n in ("stdout", "stderr"))
    return Ending(made, _wrong(made, status, used, out, err, folder), (out[-1_000:] + err)[-6_000:])


def _wrong(made: Case, status: int, used: resource.struct_rusage, out: str, err: str, folder: Path) -> str:
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        return "too much time" if name == "SIGXCPU" else f"signal {name}"
    code = os.WEXITSTATUS(status)
    if "Traceback (most recent call last)" in err:
        lines = err.strip().splitlines()
        ours = [line.strip() for line in lines if "/hf_grow/" in line and line.strip().startswith("File")]
        return f"traceback: {lines[-1].split(':')[0][:80]} at {ours[-1].split('/hf_grow/')[1] if ours else '?'}"
    if code not in (0, 1, 2):
        return f"exit status {code}"
    if used.ru_maxrss << 10 > BASE_MEMORY + MEMORY:
        return "too much memory"
    if "out of memory" in err:
        return "out of memory"
    if any(not c.isprintable() and c not in "\n\t" for c in out + err):
        return "control characters"
    if len(err) > LONGEST:
        return "a long message"
    if "--json" in made.words and (out.strip() or code == 0) and "--help" not in made.words:
        try:
            json.loads(out, parse_constant=lambda text: 1 / 0)
        except (ValueError, ZeroDivisionError):
            return "no JSON"
    if code and not err.strip() and "verify" not in made.words[:1]:
        return "failed without a word"
    if code and (folder / "case" / "out").is_dir() and made.words[0] != "train":
        return "failed, and the output is there"
    return ""


def _work(made: Case, folder: Path) -> None:
    """The child: the command with its streams in files. Never returns."""
    try:
        os.chdir(folder / "case")
        for number, name in ((1, "stdout"), (2, "stderr")):
            handle = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            os.dup2(handle, number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout, sys.stderr = os.fdopen(1, "w", encoding="utf-8"), os.fdopen(2, "w", encoding="utf-8")
        if os.getuid() == 0:
            _drop_privileges()
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        from hf_grow.cli import main

        try:
            code = main(list(made.words))
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        code = 1
    os._exit(code)


def _drop_privileges() -> None:
    """To nobody, who writes nowhere else; reading stays allowed everywhere (CAP_DAC_READ_SEARCH), since Python itself may lie in a home folder."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    os.setgroups([])
    os.setgid(65534)
    libc.prctl(8, 1, 0, 0, 0)  # PR_SET_KEEPCAPS
    os.setuid(65534)
    head, read = (ctypes.c_uint32 * 2)(0x20080522, 0), 1 << 2
    assert libc.capset(head, (ctypes.c_uint32 * 6)(read, read, 0, 0, 0, 0)) == 0, "capset"


BASE_MEMORY = 0


def prepare(root: Path) -> Path:
    """The corpus, and this process warmed up. Returns the corpus's folder."""
    global BASE_MEMORY
    base = root / "corpus"
    here = Path.cwd()
    base.mkdir(parents=True)
    os.chdir(base)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            corpus.build(base)
    finally:
        os.chdir(here)
    warm()
    BASE_MEMORY = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    return base


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--case", type=int, help="run this one again, and show what it says")
    parser.add_argument("--verbose", action="store_true", help="show every case")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", default="", help="targets whose name holds this; 'words' for command lines")
    parser.add_argument("--keep", type=Path, default=Path("build/fuzz"), help="folder for the files of bad endings")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="hf-grow-fuzz-corpus-") as root:
        os.chmod(root, 0o755)
        base = prepare(Path(root))
        if options.case is not None:
            ending = run_case(case(options.seed, options.case, options.only), options.seed, base, options.keep)
            print(f"{ending.made.told}\n{ending.said}\n{ending.wrong or 'a good ending'}")
            return int(bool(ending.wrong))
        found: Counter[str] = Counter()
        for number in range(options.first, options.first + options.cases):
            ending = run_case(case(options.seed, number, options.only), options.seed, base, options.keep)
            if options.verbose:
                print(f"{ending.made.told} -> {ending.wrong or 'fine'}: {ending.said.strip()[-160:]!r}", flush=True)
            if ending.wrong:
                found[ending.wrong] += 1
                if found[ending.wrong] <= 3:
                    print(f"{ending.wrong}\n    {ending.made.told}".encode("utf-8", "backslashreplace").decode(), flush=True)
    print(f"{options.cases} cases, {found.total()} bad endings in {len(found)} classes; seed {options.seed}")
    for wrong, count in found.most_common():
        print(f"{count:6} {wrong}")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
