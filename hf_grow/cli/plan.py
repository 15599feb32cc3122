"""`hf-grow plan SOURCE --to SIZE`: every way there, side by side."""

from __future__ import annotations

import argparse
import shlex
from typing import Any

from rich import box
from rich.table import Table

from hf_grow.api import plan_for
from hf_grow.checkpoint.source import open_source
from hf_grow.cli import COMMANDS, render
from hf_grow.cli.commands import add_json, add_source, print_json
from hf_grow.errors import InputError
from hf_grow.methods import METHODS
from hf_grow.methods.sizing import TOLERANCE, measure, short
from hf_grow.planning import GrowthPlan, check_source
from hf_grow.recipe import parse_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source(parser)
    parser.add_argument("--to", required=True, metavar="SIZE", help="number of parameters to reach, such as 10.7B")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    try:
        target = int(parse_size(arguments.to))
    except ValueError as error:
        raise InputError(f"--to: {error}.") from None
    checkpoint = open_source(arguments.source, revision=arguments.revision, weights=False, notify=render.note)
    check_source(checkpoint.info)
    now = measure(checkpoint.info.architecture).total
    if target <= now:
        raise InputError(f"{checkpoint.ref} has {short(now)} parameters already; {short(target)} is no growth.", hint="Give a larger --to.")
    ways: list[tuple[GrowthPlan, str]] = []
    for method in METHODS.values():
        options = method.for_size(checkpoint.info.architecture, target)
        if options is not None:
            plan = plan_for(checkpoint.info, method, options)
            own = method.name in COMMANDS  # a command of its own; the others are chosen by --method
            words = ["hf-grow", method.name if own else method.kind, arguments.source, *([] if own else ["--method", method.name])]
            given = {k: arguments.to if k == "to" else str(v) for k, v in options.given().items()}
            words += [w for k, v in given.items() for w in (f"--{k.replace('_', '-')}", v)]
            words += ["--revision", arguments.revision] if arguments.revision else []
            ways.append((plan, shlex.join(words)))
    ways.sort(key=lambda way: abs(way[0].sizes[1].total - target))
    if arguments.json:
        facts = [{**render.plan_facts(p), "command": c, "off_target": p.sizes[1].total / target - 1} for p, c in ways]
        print_json({"source": checkpoint.ref, "parameters": measure(checkpoint.info.architecture).total, "target": target, "ways": facts})
    else:
        _show(checkpoint.info.architecture, target, ways, arguments.source)
    return 0


def _show(arch: Any, target: int, ways: list[tuple[GrowthPlan, str]], source: str) -> None:
    size = measure(arch)
    title = f"{source} ({short(size.total)}, {arch.layers} layers) to {short(target)}; FLOPs and KV cache are of one token"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    columns = ["method", "layers", "size", "off", *(["active"] if arch.is_moe else []), "disk", "FLOPs", "KV", "function"]
    for column in columns:
        table.add_column(column, justify="left" if column in ("method", "function") else "right", no_wrap=True)
    for plan, _ in ways:
        new = plan.sizes[1]
        off = new.total / target - 1
        style = "" if abs(off) <= TOLERANCE else "dim"
        cells = [plan.growth.method, str(plan.architecture.layers), short(new.total), f"{off:+.1%}"]
        cells += [short(new.active)] if arch.is_moe else []
        cells += [
            render.gigabytes(plan.nbytes),
            short(new.flops),
            f"{new.kv_values / 512:.0f} KiB",
            "lossless" if plan.guarantee.lossless else "changes",
        ]
        table.add_row(*cells, style=style)
    render.console.print(table)
    for plan, command in ways:
        if abs(plan.sizes[1].total / target - 1) <= TOLERANCE:
            render.console.print(f"{plan.growth.method:<11} [bold]{command}[/]")
    if not any(abs(p.sizes[1].total / target - 1) <= TOLERANCE for p, _ in ways):
        render.console.print(f"No way comes within {TOLERANCE:.0%} of {short(target)}; the nearest sizes are above.", style="yellow")
