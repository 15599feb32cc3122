"""Times the growth of a checkpoint against `cp` of the same bytes and against mergekit: `python benchmarks/conversion.py --size 1b`.

All contenders run in turn, several times, in one session; README.md in this folder explains each row.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import with_mergekit
from conversion_table import Row, markdown, show
from generate import CONFIGS, SHARD_SIZES, generate
from measure import Usage, machine, remove, run, settle
from results_file import RESULTS, command_line

from hf_grow.api import plan
from hf_grow.checkpoint.writer import check_disk_space
from hf_grow.convert.metadata import versions
from hf_grow.growth.plan import GrowthPlan
from hf_grow.methods import METHODS

HERE = Path(__file__).parent
OFFLINE = {"HF_HUB_OFFLINE": "1"}
IN_COMMAND = (
    "size",
    "repeats",
    "method",
    "layers_to",
    "seam_average",
    "factor",
    "to",
    "experts",
    "init",
    "cold",
    "no_settle",
    "mergekit",
    "mergekit_arguments",
)


@dataclass
class Contender:
    name: str
    commands: list[list[str]]
    reads: Path
    """Input, which is put into the page cache or dropped from it before each run."""
    runs: list[Usage] = field(default_factory=list)
    own_seconds: Callable[[Usage], float] | None = None
    """The time that it reports for its own work within the run."""


def grow_options(arguments: argparse.Namespace) -> dict[str, str]:
    given = {"layers_to": arguments.layers_to, "seam_average": arguments.seam_average, "factor": arguments.factor}
    given |= {"to": arguments.to, "experts": arguments.experts, "init": arguments.init}
    return {k: str(v) for k, v in given.items() if v is not None}


def grow_command(method: str, source: str) -> list[str]:
    """`dus SOURCE`, or `width SOURCE --method tile` for a method without a command of its own."""
    kind = METHODS[method].kind
    return [kind, source] if kind == method else [kind, source, "--method", method]


def contenders(scratch: Path, source: Path, grown: GrowthPlan, arguments: argparse.Namespace) -> list[Contender]:
    reference, out = scratch / "reference", scratch / "out"
    flags = [word for key, value in grow_options(arguments).items() for word in ("--" + key.replace("_", "-"), value)]
    grow = [sys.executable, "-m", "hf_grow", *grow_command(arguments.method, str(source)), *flags, "--json", "-o"]
    run([[*grow, str(reference)]], OFFLINE)
    copy = ["cp", "-r", str(reference), str(out)]
    files = [str(out / p.relative_to(reference)) for p in sorted(reference.rglob("*")) if p.is_file()]
    found = [
        Contender("cp", [copy], reference),
        Contender("cp, then sync", [copy, ["sync", *files]], reference),
        Contender("cp, then sync, then sha256sum", [copy, ["sync", *files], ["sha256sum", *files]], reference),
        Contender(
            "hf-grow, whole process", [[*grow, str(out)]], source, own_seconds=lambda usage: float(json.loads(usage.stdout)["seconds"])
        ),
    ]
    recipe = None
    if arguments.mergekit and METHODS[arguments.method].kind == "depth":
        program, recipe = "mergekit-yaml", with_mergekit.recipe(source, grown.growth.layers)
        if recipe is None:
            print("mergekit is left out: passthrough cannot average layers.", file=sys.stderr)
    elif arguments.mergekit and arguments.method == "experts":
        with_mergekit.add_tokenizer(source)
        program, recipe = "mergekit-moe", with_mergekit.moe_recipe(source, arguments.experts)
    if recipe is not None:
        config = scratch / "mergekit.yaml"
        config.write_text(recipe)
        command = [str(arguments.mergekit.with_name(program)), str(config), str(out), *arguments.mergekit_arguments.split()]
        found.append(Contender(f"{program}, whole process", [command], source))
    return found


def check(found: list[Contender], scratch: Path, source: Path) -> list[str]:
    """Checks the outputs in one untimed run of each contender. Raises CommandFailed if one is wrong."""
    reference, out = scratch / "reference", scratch / "out"
    run([[sys.executable, "-m", "hf_grow", "verify", "--structure-only", str(source), str(reference)]], OFFLINE)
    facts = ["`hf-grow verify --structure-only` passes on hf-grow's output"]
    for contender in found:
        if contender.name.startswith("mergekit-yaml"):
            run(contender.commands, OFFLINE)
            try:
                comparison = run([[sys.executable, str(HERE / "compare.py"), str(reference), str(out)]]).stdout.strip()
            finally:
                remove(out)
            facts.append(f"hf-grow's output against mergekit's: {comparison}")
        elif contender.name.startswith("mergekit-moe"):
            facts.append("mergekit-moe's output is not compared: its routers are other random numbers, its experts have other names")
    return facts


def time_all(found: list[Contender], out: Path, nbytes: int, arguments: argparse.Namespace) -> None:
    """Runs each contender once per round; each round starts with another one."""
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
        if contender.own_seconds is not None:
            yield Row(contender.name.split(",")[0] + ", the conversion itself", [contender.own_seconds(u) for u in contender.runs])
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
        "command": f"`{command_line('conversion', arguments, IN_COMMAND)}`",
        "growth": f"{arguments.method}, {grown.source.architecture.layers} to {grown.architecture.layers} layers, {old.total / 1e9:.3g}B to "
        f"{new.total / 1e9:.3g}B parameters, {grown.source_nbytes / 1e9:.2f} to {grown.nbytes / 1e9:.2f} GB, "
        f"{len(grown.copies())} of {len(grown.targets)} tensors copied",
        "inputs": inputs,
        "checked": "; ".join(checks),
        **machine(scratch),
        "versions": ", ".join(f"{k} {v}" for k, v in versions().items()) + mergekit,
        "other load": f"other processes and other virtual machines had at most {others:.0%} of the processors during a run",
    }


def benchmark(arguments: argparse.Namespace) -> Path:
    """Generates a checkpoint, checks, measures and writes the table. Returns the table's path; everything else is deleted, also on errors."""
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
        checks = check(found, scratch, source)
        time_all(found, scratch / "out", grown.nbytes, arguments)
        about = facts(scratch, grown, found, checks, arguments)
    method = "" if arguments.method == "dus" else arguments.method
    parts = [arguments.size, method, arguments.init, "seam-average" if arguments.seam_average else "", "cold" if arguments.cold else ""]
    name = "-".join(["conversion", *(part for part in parts if part)])
    title = f"Growing a {arguments.size} checkpoint, beside copying it"
    table = list(rows(found))
    show(table, about, title)
    arguments.results.mkdir(parents=True, exist_ok=True)
    path = arguments.results / f"{name}.md"
    path.write_text(markdown(table, about, title))
    return Path(path)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time hf-grow against cp and mergekit on a generated checkpoint.")
    parser.add_argument("--size", choices=list(CONFIGS), default="tiny")
    parser.add_argument("--method", choices=[m for m in METHODS if m != "layers"], default="dus")
    parser.add_argument("--layers-to", type=int, help="default: the method's own")
    parser.add_argument("--seam-average", type=int, help="dus: layers to average on each side of the seam")
    parser.add_argument("--factor", type=int, help="width methods: factor for hidden size, FFN and heads")
    parser.add_argument("--experts", type=int, help="experts: how many")
    parser.add_argument("--init", help="experts: how they are initialized")
    parser.add_argument("--to", help="size to grow to, such as 4B")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="drop the inputs from the page cache before each run")
    parser.add_argument(
        "--no-settle", action="store_true", help="do not prepare the machine before each run: faster, but not a valid measurement"
    )
    parser.add_argument(
        "--mergekit",
        nargs="?",
        const="install",
        metavar="MERGEKIT-YAML",
        help="path of mergekit-yaml; without one, mergekit is installed into the cache",
    )
    parser.add_argument("--mergekit-arguments", default="", help="more flags for mergekit-yaml, as one argument")
    parser.add_argument(
        "--scratch", type=Path, default=Path(tempfile.gettempdir()), help="folder for the checkpoints, on the disk to measure"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the temporary folder is removed
    print(f"wrote {benchmark(parse(argv))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
