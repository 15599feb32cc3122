"""How long growing a checkpoint takes beside `cp` of the same bytes, and beside mergekit: `python benchmarks/conversion.py --size 1b`.

All contenders run in turn, several times, in one session; README.md beside this file says what each line means.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import with_mergekit
from generate import CONFIGS, SHARD_SIZES, generate
from measure import Usage, machine, remove, run, settle
from report import Row, markdown, show

from hf_grow.api import plan
from hf_grow.checkpoint.writer import check_disk_space
from hf_grow.convert.metadata import versions
from hf_grow.growth.plan import GrowthPlan
from hf_grow.methods import METHODS

HERE = Path(__file__).parent
OFFLINE = {"HF_HUB_OFFLINE": "1"}


@dataclass
class Contender:
    name: str
    commands: list[list[str]]
    reads: Path
    """What it reads, to be in the page cache or out of it."""
    runs: list[Usage] = field(default_factory=list)
    own: Callable[[Usage], float] | None = None
    """Its own time within the run, if it tells one."""


def grow_options(arguments: argparse.Namespace) -> dict[str, str]:
    given = {"layers_to": arguments.layers_to, "seam_average": arguments.seam_average, "factor": arguments.factor}
    given |= {"to": arguments.to, "experts": arguments.experts, "init": arguments.init}
    return {k: str(v) for k, v in given.items() if v is not None}


def grow_words(method: str, source: str) -> list[str]:
    """`dus SOURCE`, or `width SOURCE --method tile`: methods without a command of their own are chosen within their kind."""
    kind = METHODS[method].kind
    return [kind, source] if kind == method else [kind, source, "--method", method]


def contenders(scratch: Path, source: Path, grown: GrowthPlan, arguments: argparse.Namespace) -> list[Contender]:
    reference, out = scratch / "reference", scratch / "out"
    flags = [word for key, value in grow_options(arguments).items() for word in ("--" + key.replace("_", "-"), value)]
    grow = [sys.executable, "-m", "hf_grow", *grow_words(arguments.method, str(source)), *flags, "--json", "-o"]
    run([[*grow, str(reference)]], OFFLINE)
    copy = ["cp", "-r", str(reference), str(out)]
    files = [str(out / p.relative_to(reference)) for p in sorted(reference.rglob("*")) if p.is_file()]
    found = [
        Contender("cp", [copy], reference),
        Contender("cp, then sync", [copy, ["sync", *files]], reference),
        Contender("cp, then sync, then sha256sum", [copy, ["sync", *files], ["sha256sum", *files]], reference),
        Contender("hf-grow, whole process", [[*grow, str(out)]], source, own=lambda usage: float(json.loads(usage.stdout)["seconds"])),
    ]
    if arguments.mergekit and METHODS[arguments.method].kind == "depth":
        text = with_mergekit.recipe(source, grown.growth.layers)
        if text is None:
            print("mergekit is left out: passthrough has no means of layers.", file=sys.stderr)
        else:
            (scratch / "mergekit.yaml").write_text(text)
            command = [str(arguments.mergekit), str(scratch / "mergekit.yaml"), str(out), *arguments.mergekit_arguments.split()]
            found.append(Contender("mergekit-yaml, whole process", [command], source))
    if arguments.mergekit and arguments.method == "experts":
        with_mergekit.add_tokenizer(source)
        (scratch / "moe.yaml").write_text(with_mergekit.moe_recipe(source, int(arguments.experts)))
        command = [
            str(arguments.mergekit.parent / "mergekit-moe"),
            str(scratch / "moe.yaml"),
            str(out),
            *arguments.mergekit_arguments.split(),
        ]
        found.append(Contender("mergekit-moe, whole process", [command], source))
    return found


def check(found: list[Contender], scratch: Path, source: Path, grown: GrowthPlan) -> list[str]:
    """One untimed run of everything whose output can be wrong. Raises CommandFailed if it is."""
    reference, out = scratch / "reference", scratch / "out"
    done = run([[sys.executable, "-m", "hf_grow", "verify", "--structure-only", str(source), str(reference)]], OFFLINE)
    facts = ["`hf-grow verify --structure-only` passes on hf-grow's output"] if done else []
    for contender in found:
        if contender.name.startswith("mergekit-yaml"):
            run(contender.commands, OFFLINE)
            try:
                said = run([[sys.executable, str(HERE / "compare.py"), str(reference), str(out)]]).stdout.strip()
            finally:
                remove(out)
            facts.append(f"hf-grow's output against mergekit's: {said}")
        elif contender.name.startswith("mergekit-moe"):
            facts.append("mergekit-moe's output is not compared: its routers are other random numbers, its experts have other names")
    return facts


def time_all(found: list[Contender], out: Path, nbytes: int, arguments: argparse.Namespace) -> None:
    """Each contender once in each round, every round beginning with another one."""
    for number in range(arguments.repeats):
        first = number % len(found)
        for contender in (*found[first:], *found[:first]):
            if not arguments.no_settle:
                settle(contender.reads, cold=arguments.cold, needs=2 * nbytes)
            try:
                usage = run(contender.commands, OFFLINE)
            finally:
                remove(out)
            contender.runs.append(usage)
            print(f"{number + 1}/{arguments.repeats}  {contender.name:<32} {usage.wall:7.2f} s", file=sys.stderr)


def rows(found: list[Contender]) -> Iterator[Row]:
    for contender in found:
        if contender.own is not None:
            yield Row(contender.name.split(",")[0] + ", the conversion itself", [contender.own(u) for u in contender.runs])
        yield Row(contender.name, [u.wall for u in contender.runs], contender.runs)


def facts(scratch: Path, grown: GrowthPlan, found: list[Contender], checks: list[str], arguments: argparse.Namespace) -> dict[str, str]:
    old, new = grown.sizes
    mergekit = f"; beside it {with_mergekit.version(arguments.mergekit)}" if any("mergekit" in c.name for c in found) else ""
    others = max(u.others for c in found for u in c.runs)
    inputs = "out of the page cache (cold)" if arguments.cold else "in the page cache (warm), as far as they fit"
    if arguments.no_settle:
        inputs = "as they were: the machine was NOT prepared for measuring"
    return {
        "date": time.strftime("%Y-%m-%d"),
        "command": f"`{command_of(arguments)}`",
        "growth": f"{arguments.method}, {grown.source.architecture.layers} to {grown.architecture.layers} layers, {old.total / 1e9:.3g}B to "
        f"{new.total / 1e9:.3g}B parameters, {grown.source_nbytes / 1e9:.2f} to {grown.nbytes / 1e9:.2f} GB, "
        f"{len(grown.copies())} of {len(grown.targets)} tensors copied",
        "inputs": inputs,
        "checked": "; ".join(checks),
        **machine(scratch),
        "versions": ", ".join(f"{k} {v}" for k, v in versions().items()) + mergekit,
        "other load": f"other processes and other virtual machines had at most {others:.0%} of the processors during a run",
    }


def command_of(arguments: argparse.Namespace) -> str:
    """The command line again, without what only says where things lie on this machine."""
    words = ["python", "benchmarks/conversion.py", "--size", arguments.size, "--repeats", str(arguments.repeats)]
    for name in ("method", "layers_to", "seam_average", "factor", "to", "experts", "init"):
        if getattr(arguments, name) is not None:
            words += ["--" + name.replace("_", "-"), str(getattr(arguments, name))]
    words += ["--" + name.replace("_", "-") for name in ("cold", "no_settle", "mergekit") if getattr(arguments, name)]
    if arguments.mergekit_arguments:
        words += [f"--mergekit-arguments={arguments.mergekit_arguments}"]
    return shlex.join(words)


def benchmark(arguments: argparse.Namespace) -> Path:
    """Generates, checks, measures, writes the table; whatever happens, leaves nothing else behind. Returns the table's file."""
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    if arguments.mergekit:
        arguments.mergekit = with_mergekit.install() if arguments.mergekit == "install" else Path(arguments.mergekit)
    with tempfile.TemporaryDirectory(prefix="hf-grow-benchmark-", dir=arguments.scratch) as folder:
        scratch = Path(folder)
        source = scratch / "source"
        generate(source, CONFIGS[arguments.size], SHARD_SIZES[arguments.size])
        grown = plan(source, arguments.method, **grow_options(arguments))
        check_disk_space(scratch / "out", 2 * grown.nbytes)  # the copy to compare with, and the one being written
        found = contenders(scratch, source, grown, arguments)
        checks = check(found, scratch, source, grown)
        time_all(found, scratch / "out", grown.nbytes, arguments)
        about = facts(scratch, grown, found, checks, arguments)
    options = [
        arguments.size,
        arguments.method if arguments.method != "dus" else "",
        arguments.init or "",
        "seam-average" if arguments.seam_average else "",
    ]
    name = "conversion-" + "-".join([o for o in options if o] + ["cold"] * arguments.cold)
    title = f"Growing a {arguments.size} checkpoint, beside copying it"
    table = list(rows(found))
    show(table, about, title)
    arguments.results.mkdir(parents=True, exist_ok=True)
    path = arguments.results / f"{name}.md"
    path.write_text(markdown(table, about, title))
    return Path(path)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time hf-grow beside cp, and mergekit, on a generated checkpoint.")
    parser.add_argument("--size", choices=list(CONFIGS), default="tiny")
    parser.add_argument("--method", choices=[m for m in METHODS if m != "layers"], default="dus")
    parser.add_argument("--layers-to", type=int, help="default: the method's own")
    parser.add_argument("--seam-average", type=int, help="dus: layers to average on each side of the seam")
    parser.add_argument("--factor", type=int, help="width methods: grow hidden, FFN and heads by this")
    parser.add_argument("--experts", type=int, help="experts: how many")
    parser.add_argument("--init", help="experts: what they begin as")
    parser.add_argument("--to", help="size to grow to, such as 4B")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="drop the inputs from the page cache before each run")
    parser.add_argument(
        "--no-settle", action="store_true", help="do not prepare the machine before each run: faster, and worth nothing as a measurement"
    )
    parser.add_argument("--mergekit", nargs="?", const="install", metavar="MERGEKIT-YAML", help="the binary; installed where none is given")
    parser.add_argument("--mergekit-arguments", default="", help="more flags for mergekit-yaml, in one word")
    parser.add_argument(
        "--scratch", type=Path, default=Path(tempfile.gettempdir()), help="where the checkpoints go, on the disk to measure"
    )
    parser.add_argument("--results", type=Path, default=HERE / "results")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that nothing stays on the disk
    print(f"wrote {benchmark(parse(argv))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
