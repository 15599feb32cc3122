"""`hf-grow plan SOURCE --to SIZE`: growth options for a target size, side by side."""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from hf_grow.api.size_options import SizeOption, TargetSize, size_options
from hf_grow.checkpoint.source import open_source
from hf_grow.cli import COMMANDS, render
from hf_grow.cli.commands import add_json, add_source, print_json
from hf_grow.errors import InputError
from hf_grow.methods import starting_loss
from hf_grow.model.param_count import LARGEST_STEP, TOLERANCE, count_parameters, format_count
from hf_grow.options import parse_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source(parser)
    parser.add_argument("--to", required=True, metavar="SIZE", help="target number of parameters, such as 10.7B")
    parser.add_argument(
        "--active", metavar="SIZE", help="target number of active parameters per token, such as 13B, for mixtures of experts"
    )
    parser.add_argument("--context", type=int, default=8192, metavar="N", help="sequence length for the serving memory; default: 8192")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    target = TargetSize(_size("--to", arguments.to), _size("--active", arguments.active) if arguments.active else None)
    if arguments.context < 1:
        raise InputError("--context must be at least 1.")
    checkpoint = open_source(arguments.source, revision=arguments.revision, weights=False, notify=render.note)
    options = size_options(checkpoint.info, target)
    commands = [_command(option, arguments) for option in options]
    if arguments.json:
        print_json(
            {
                "source": checkpoint.ref,
                "parameters": count_parameters(checkpoint.info.architecture).total,
                "target": target.total,
                "active": target.active,
                "context": arguments.context,
                "ways": [_facts(o, c, arguments.context) for o, c in zip(options, commands, strict=True)],
            }
        )
    else:
        _show(arguments.source, checkpoint.info.architecture, target, options, commands, arguments.context)
    return 0


def _size(flag: str, text: str) -> int:
    try:
        return int(parse_size(text))
    except ValueError as error:
        raise InputError(f"{flag}: {error}.") from None


def _command(option: SizeOption, arguments: argparse.Namespace) -> str:
    """The command line that carries out an option."""
    method = option.method
    words = (
        ["hf-grow", method.name, arguments.source]
        if method.name in COMMANDS
        else ["hf-grow", method.kind, arguments.source, "--method", method.name]
    )
    for name, value in option.options.non_defaults().items():
        words += [f"--{name.replace('_', '-')}", arguments.to if name == "to" else str(value)]
    return shlex.join([*words, *(["--revision", arguments.revision] if arguments.revision else [])])


def _facts(option: SizeOption, command: str, context: int) -> dict[str, Any]:
    size, target = option.plan.sizes[1], option.target
    return {
        **render.plan_facts(option.plan),
        "command": command,
        "beyond": option.extrapolation,
        "off_target": size.total / target.total - 1,
        "off_active": size.active / target.active - 1 if target.active else None,
        "serving_bytes": size.serving_bytes(context),
    }


def _short_bytes(nbytes: float) -> str:
    """Three digits and a letter, so that a row fits 80 columns."""
    return f"{nbytes / 1e9:.0f}G" if nbytes >= 99.5e9 else f"{nbytes / 1e9:.3g}G" if nbytes >= 1e9 else f"{nbytes / 1e6:.3g}M"


def _show(source: str, arch: Any, target: TargetSize, options: Sequence[SizeOption], commands: Sequence[str], context: int) -> None:
    size = count_parameters(arch)
    title = f"{source} ({format_count(size.total)}, {arch.layers} layers) to {target}; forward FLOPs per token; serving {context} tokens in 16 bit"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    columns = ["method", "layers", "size", "off", "active", *(["off"] if target.active else []), "FLOPs", "disk", "serving", ""]
    for column in columns:
        table.add_column(column, justify="left" if column in ("method", "") else "right", no_wrap=True)
    starts = [starting_loss.nearest_starting_loss(option.plan.growth, arch) for option in options]
    for option, start in zip(options, starts, strict=True):
        plan, new = option.plan, option.plan.sizes[1]
        cells = [plan.growth.method, str(plan.architecture.layers), format_count(new.total), f"{new.total / target.total - 1:+.1%}"]
        cells += [format_count(new.active), *([f"{new.active / target.active - 1:+.0%}"] if target.active else [])]
        cells += [format_count(new.flops), _short_bytes(plan.nbytes), _short_bytes(new.serving_bytes(context))]
        cells += ["lossless" if plan.guarantee.lossless else f"{start.prose:+.1f} nats" if start else "changes"]
        table.add_row(*cells, style="" if option.recommended else "dim")
    render.console.print(table)
    if any(starts):
        render.console.print(
            f"nats: the increase of the loss of {starting_loss.MODEL} on prose right after such a growth; one model, guidance only.",
            style="dim",
        )
    for option, command in zip(options, commands, strict=True):
        if option.recommended:
            render.console.print(Text.assemble(f"{option.plan.growth.method:<11} ", (command, "bold")))
    for option, command in zip(options, commands, strict=True):
        if option.reaches_target and option.extrapolation:
            render.console.print(f"{option.plan.growth.method:<11} {command}", style="dim", markup=False)
            render.console.print(f"{'':<11} {' '.join(option.extrapolation)}", style="yellow", markup=False)
    if not any(option.recommended for option in options):
        _show_steps(size.total, target)


def _show_steps(now: int, target: TargetSize) -> None:
    """What to do if no recommended option reaches the target."""
    count = math.ceil(math.log(target.total / now) / math.log(LARGEST_STEP))
    if count < 2:
        render.console.print(f"No growth option is within {TOLERANCE:.0%} of {target}; the nearest are listed above.", style="yellow")
        return
    sizes = " -> ".join(format_count(now * (target.total / now) ** (i / count)) for i in range(count + 1))
    render.console.print(
        f"No growth that is known to work reaches {target} in one step. In {count} steps, with training after each: {sizes}; "
        "hf-grow plan shows the options of each.",
        style="yellow",
    )
