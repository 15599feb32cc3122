"""`hf-grow plan SOURCE --to SIZE`: every way there, side by side."""

from __future__ import annotations

import argparse
import math
import shlex
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from hf_grow.api.planning import plan_for
from hf_grow.checkpoint.source import open_source
from hf_grow.cli import COMMANDS, render
from hf_grow.cli.commands import add_json, add_source, print_json
from hf_grow.errors import InputError
from hf_grow.growth.plan import GrowthPlan, check_source
from hf_grow.methods import METHODS
from hf_grow.methods import starting_loss as starting
from hf_grow.model.param_count import LARGEST_STEP, TOLERANCE, count_parameters, extrapolation_warnings, format_count
from hf_grow.options import parse_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source(parser)
    parser.add_argument("--to", required=True, metavar="SIZE", help="number of parameters to reach, such as 10.7B")
    parser.add_argument(
        "--active", metavar="SIZE", help="parameters that a token passes through, such as 13B: mixtures of experts are chosen by both"
    )
    parser.add_argument(
        "--context", type=int, default=8192, metavar="N", help="tokens of the sequence in the memory for serving; default: 8192"
    )
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    target, active = _size("--to", arguments.to), _size("--active", arguments.active) if arguments.active else None
    if arguments.context < 1:
        raise InputError("--context must be at least 1.")
    checkpoint = open_source(arguments.source, revision=arguments.revision, weights=False, notify=render.note)
    check_source(checkpoint.info)
    now = count_parameters(checkpoint.info.architecture).total
    if target <= now or format_count(target) == format_count(now):
        raise InputError(
            f"{checkpoint.ref} already has {format_count(now)} parameters ({now:,}); {format_count(target)} is not larger.",
            hint="Give a larger --to.",
        )
    ways: list[tuple[GrowthPlan, str]] = []
    for method in METHODS.values():
        wanted = (target, active) if method.kind == "experts" else (target,)
        options = method.for_size(checkpoint.info.architecture, *wanted)
        if options is not None:
            plan = plan_for(checkpoint.info, method, options)
            own = method.name in COMMANDS  # a command of its own; the others are chosen by --method
            words = ["hf-grow", method.name if own else method.kind, arguments.source, *([] if own else ["--method", method.name])]
            given = {k: arguments.to if k == "to" else str(v) for k, v in options.non_defaults().items()}
            words += [w for k, v in given.items() for w in (f"--{k.replace('_', '-')}", v)]
            words += ["--revision", arguments.revision] if arguments.revision else []
            ways.append((plan, shlex.join(words)))
    ways.sort(key=lambda way: _off(way[0], target, active))
    if arguments.json:
        facts = [
            {
                **render.plan_facts(p),
                "command": c,
                "beyond": extrapolation_warnings(p.source.architecture, p.architecture),
                "off_target": p.sizes[1].total / target - 1,
                "off_active": p.sizes[1].active / active - 1 if active else None,
                "serving_bytes": p.sizes[1].serving_bytes(arguments.context),
            }
            for p, c in ways
        ]
        print_json(
            {"source": checkpoint.ref, "parameters": now, "target": target, "active": active, "context": arguments.context, "ways": facts}
        )
    else:
        _show(checkpoint.info.architecture, target, active, arguments.context, ways, arguments.source)
    return 0


def _size(flag: str, text: str) -> int:
    try:
        return int(parse_size(text))
    except ValueError as error:
        raise InputError(f"{flag}: {error}.") from None


def _off(plan: GrowthPlan, target: int, active: int | None) -> float:
    """How far a plan ends from what is wanted, as a share of it: in total, and in active parameters where they are asked for."""
    size = plan.sizes[1]
    return max(abs(size.total / target - 1), abs(size.active / active - 1) if active else 0.0)


def _gigabytes(nbytes: float) -> str:
    return f"{nbytes / 1e9:.0f}G" if nbytes >= 99.5e9 else f"{nbytes / 1e9:.3g}G" if nbytes >= 1e9 else f"{nbytes / 1e6:.3g}M"


def _show(arch: Any, target: int, active: int | None, context: int, ways: list[tuple[GrowthPlan, str]], source: str) -> None:
    size = count_parameters(arch)
    wanted = format_count(target) + (f", {format_count(active)} active" if active else "")
    title = f"{source} ({format_count(size.total)}, {arch.layers} layers) to {wanted}; FLOPs of one token forward; serving {context} tokens, 16 bit"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    columns = ["method", "layers", "size", "off", "active", *(["off"] if active else []), "FLOPs", "disk", "serving", ""]
    for column in columns:
        table.add_column(column, justify="left" if column in ("method", "") else "right", no_wrap=True)
    for plan, _ in ways:
        new = plan.sizes[1]
        cells = [plan.growth.method, str(plan.architecture.layers), format_count(new.total), f"{new.total / target - 1:+.1%}"]
        cells += [format_count(new.active), *([f"{new.active / active - 1:+.0%}"] if active else [])]
        # Short, so that the row fits 80 columns.
        cells += [format_count(new.flops), _gigabytes(plan.nbytes), _gigabytes(new.serving_bytes(context))]
        start = starting.nearest_starting_loss(plan.growth, arch)
        cells += ["lossless" if plan.guarantee.lossless else f"{start.prose:+.1f} nats" if start else "changes"]
        table.add_row(*cells, style="" if _normal(plan, target, active) else "dim")
    render.console.print(table)
    if any(starting.nearest_starting_loss(plan.growth, arch) for plan, _ in ways):
        render.console.print(
            f"nats: how much the loss of {starting.MODEL} rose on prose right after such a growth; one model, guidance only.", style="dim"
        )
    normal = [way for way in ways if _normal(way[0], target, active)]
    for plan, command in normal:
        render.console.print(Text.assemble(f"{plan.growth.method:<11} ", (command, "bold")))
    for plan, command in ways:
        if _reaches(plan, target, active) and (far := extrapolation_warnings(arch, plan.architecture)):
            render.console.print(f"{plan.growth.method:<11} {command}", style="dim", markup=False)
            render.console.print(f"{'':<11} {' '.join(far)}", style="yellow", markup=False)
    if not normal:
        _show_steps(size.total, target, wanted)


def _reaches(plan: GrowthPlan, target: int, active: int | None) -> bool:
    """Within 5 % of what is wanted, and nearer to it than the source is."""
    old, new = plan.sizes
    return _off(plan, target, active) <= TOLERANCE and abs(new.total - target) < abs(old.total - target)


def _normal(plan: GrowthPlan, target: int, active: int | None) -> bool:
    return _reaches(plan, target, active) and not extrapolation_warnings(plan.source.architecture, plan.architecture)


def _show_steps(now: int, target: int, wanted: str) -> None:
    """What to do where nothing reaches a target at once."""
    count = math.ceil(math.log(target / now) / math.log(LARGEST_STEP))
    if count < 2:
        render.console.print(f"No way comes within {TOLERANCE:.0%} of {wanted}; the nearest are above.", style="yellow")
        return
    sizes = " -> ".join(format_count(now * (target / now) ** (i / count)) for i in range(count + 1))
    render.console.print(
        f"No way that is known to work reaches {wanted} at once. In {count} steps, training after each: {sizes}; hf-grow plan shows the ways of each.",
        style="yellow",
    )
