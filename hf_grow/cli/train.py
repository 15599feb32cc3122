"""`hf-grow train RECIPE.yaml`: continued pretraining, with every key of the recipe as a flag."""

from __future__ import annotations

import argparse
import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from hf_grow.checkpoint.reader import open_folder
from hf_grow.cli import flags, render
from hf_grow.cli.commands import add_json, out_of_memory_errors, print_json, show_next
from hf_grow.common import yaml_io
from hf_grow.common.units import format_bytes, format_duration
from hf_grow.errors import ExecutionError, InputError
from hf_grow.model.param_count import format_count
from hf_grow.options import Excludes, Options, Requires, find_yaml, parse, raise_errors
from hf_grow.training.config.recipe_files import RECIPES, load_recipe, parse_overrides
from hf_grow.training.distributed.launch import is_main_process

if TYPE_CHECKING:
    from hf_grow.training.distributed.launch import Launch
    from hf_grow.training.train import TrainResult

OVERRIDES = True
"""This command reads further --key value pairs itself."""


class RunOptions(Options):
    """Output of the command, and dry runs."""

    output: str | None = None
    """Folder for the trained model, its checkpoints and events.jsonl."""
    resume: bool = False
    """Resume from the newest complete checkpoint in the output folder."""
    overwrite: bool = False
    """Replace an earlier training in the output folder."""
    dry_run: bool = False
    """Print recipe, parameter groups, memory, tokens and FLOPs, and stop."""
    time: Annotated[bool, Requires("dry_run"), Excludes("accelerate"), Excludes("processes")] = False
    """With --dry-run: load the model and time a few real steps on random tokens."""
    accelerate: Annotated[Path | None, Requires("dry_run")] = None
    """With --dry-run: plan for the processes of this config file of `accelerate launch`."""
    processes: Annotated[Annotated[int, Field(ge=1)] | None, Requires("dry_run")] = None
    """With --dry-run: plan for this many processes (without --accelerate: DDP)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _epilog()
    parser.add_argument("recipe", metavar="RECIPE", help=f"YAML file, or one of: {', '.join(RECIPES)}")
    flags.add_flags(parser, [RunOptions], short={"output": "-o"})
    next(a for a in parser._actions if a.dest == "accelerate").metavar = "FILE"
    add_json(parser)


def _epilog() -> str:
    """hf-grow's keys, with the first sentence of their help."""
    from hf_grow.training.config.train_config import TrainRecipe

    lines = ["any key of the recipe, with dots for nested ones, as --KEY VALUE: --learning_rate 1e-4 --data.seq_length 512", "", "keys:"]
    for name, field in TrainRecipe.model_fields.items():
        text = (field.description or "").replace("\n", " ")
        lines.append(f"  {name:<26}{text.split('. ')[0].rstrip('.')}")
    return "\n".join([*lines, "  and every argument of transformers' TrainingArguments: learning_rate, max_steps, bf16, report_to, ..."])


def run(arguments: argparse.Namespace) -> int:
    path = find_yaml(arguments.recipe, RECIPES, "There is no training recipe")
    if is_main_process() and not arguments.json:
        render.note(f"Reading {path} ...")  # what comes next imports torch and transformers, which takes seconds
    from hf_grow.common.safe_files import replace_nonfinite
    from hf_grow.training.config.stage_options import is_staged
    from hf_grow.training.stages.dry_run import dry_run_stages
    from hf_grow.training.stages.runner import RunResult, train_stages
    from hf_grow.training.train import dry_run, train

    run_options = parse(RunOptions, flags.given(arguments, RunOptions), where="The command line", strict=False)
    _silence_transformers()
    recipe = load_recipe(path, parse_overrides(arguments.overrides))
    settings: dict[str, Any] = {"output": run_options.output, "resume": run_options.resume, "overwrite": run_options.overwrite}
    first = is_main_process()
    if run_options.dry_run and is_staged(recipe.given):
        if run_options.time or run_options.accelerate is not None or run_options.processes is not None:
            raise InputError(
                "--time, --accelerate and --processes plan one training, not stages.", hint="Remove them, or dry-run one stage's recipe."
            )
        raise_errors(recipe.where, recipe.mistakes)
        stages = dry_run_stages(recipe, output=run_options.output, notify=render.note if first else _ignore)
        if first:
            print_json(stages) if arguments.json else _show_stages(stages)
        return 0
    if run_options.dry_run:
        with training_resource_errors():
            facts = dry_run(
                recipe, notify=render.note if first else _ignore, started=_launch(run_options), timed=run_options.time, **settings
            )
        if not first:
            pass
        elif arguments.json:
            print_json(facts)
        else:
            _show_plan(facts)
        return 0
    with training_resource_errors():
        carry_out = train_stages if is_staged(recipe.given) else train
        result = carry_out(
            recipe, notify=render.note if first else _ignore, show=_ignore if arguments.json or not first else _print_line, **settings
        )
    if not first:
        return 0
    if arguments.json:
        print_json(replace_nonfinite(result.to_json(), nonfinite=str))
    else:
        _show_result(result.last if isinstance(result, RunResult) else result)
    return 0


def _launch(options: RunOptions) -> Launch | None:
    """The processes that a dry run plans for; None for those of this launch."""
    from hf_grow.training.distributed.launch import Launch, launch_from_file

    if options.accelerate is not None:
        return launch_from_file(options.accelerate, options.processes)
    return None if options.processes is None else Launch(options.processes, "ddp" if options.processes > 1 else "one")


@contextmanager
def training_resource_errors() -> Iterator[None]:
    """Turns a full memory or disk while training into an ExecutionError with the next step."""
    from safetensors import SafetensorError

    from hf_grow.training.dry_run.dry_run import OUT_OF_MEMORY_HINT

    resume = "Then resume from the last checkpoint with --resume."
    try:
        with out_of_memory_errors(OUT_OF_MEMORY_HINT):
            yield
    except (OSError, RuntimeError, SafetensorError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(
            word in str(error) for word in ("No space left", "os error 28", "file write failed")
        )
        if not full:
            raise
        raise ExecutionError(
            "The disk of the output is full.", hint=f"Free some space; save_total_limit keeps fewer checkpoints. {resume}"
        ) from None


def _ignore(message: str) -> None:
    pass


def _print_line(text: str) -> None:
    render.console.print(text, markup=False)


def _silence_transformers() -> None:
    """Without progress bars and hints of transformers."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _show_stages(facts: dict[str, Any]) -> None:
    """The stages of a run, a row each."""
    from rich.table import Table

    table = Table(title=f"{facts['max_steps']:,} steps in {len(facts['stages'])} stages", title_justify="left", title_style="bold")
    for column in ("stage", "grows by", "layers", "parameters", "FLOPs a token", "until"):
        table.add_column(column, justify="right" if column in ("layers", "parameters", "FLOPs a token") else "left")
    for row in facts["stages"]:
        growth = "" if row["grow"] is None else ", ".join(f"{k} {v}" if k != "method" else str(v) for k, v in row["grow"].items())
        until = "the end of the run" if row["until"] is None else yaml_io.dumps(row["until"]).strip().replace("\n", "; ")
        table.add_row(row["name"], growth, str(row["layers"]), format_count(row["parameters"]), f"{row['flops_a_token']:.3g}", until)
    render.console.print(f"{'output':<12} {Path(facts['output']).absolute()} (nothing written: --dry-run)", markup=False)
    render.console.print(table)


def _show_plan(facts: dict[str, Any]) -> None:
    from rich.table import Table

    out = render.console
    for line in summary(facts):
        out.print(line, markup=False)
    if facts["differs"]:
        out.print("not the defaults:")
        out.print("\n".join(f"  {line}" for line in yaml_io.dumps(facts["differs"]).splitlines()), markup=False)
    groups = Table(title="parameters", title_justify="left", title_style="bold")
    for column in ("", "tensors", "parameters"):
        groups.add_column(column, justify="left" if not column else "right")
    for kind, tensors, parameters in facts["parameter_groups"]:
        groups.add_row(kind, str(tensors), format_count(parameters))
    out.print(groups)
    several = facts["processes"] > 1
    title = f"memory of each process ({facts['sharing']})" if several else "memory, all on one device"
    memory = Table(title=title, title_justify="left", title_style="bold")
    memory.add_column("")
    memory.add_column("", justify="right")
    for purpose, nbytes in facts["memory"].items():
        if nbytes:
            names = {
                "activations": "activations (estimated)",
                "gathered": "gathered (estimated)",
                "step": "optimizer step",
                "total": "peak",
            }
            memory.add_row(names.get(purpose, purpose), format_bytes(nbytes))
    out.print(memory)
    for text in facts["texts"]:
        size = "size unknown" if text["tokens"] is None else f"about {format_count(text['tokens'])} tokens"
        out.print(f"{text['use']:<12} {text['label']}: {size}", markup=False)


def summary(facts: dict[str, Any]) -> list[str]:
    """Output, length, and whether it fits, one line each."""
    trainable, parameters = facts["parameters"]
    lines = [f"{'output':<12} {Path(facts['output']).absolute()} (nothing written: --dry-run)"]
    lines.append(f"{'model':<12} {facts['model']}: {format_count(trainable)} of {format_count(parameters)} parameters train")
    if facts["tokens"]:
        steps, each = facts["steps"], facts["tokens_a_step"]
        lines.append(
            f"{'training':<12} {steps:,} steps of {each:,} tokens: {format_count(facts['tokens'])} tokens, {facts['flops']:.3g} FLOPs"
        )
    if facts.get("time"):
        lines.append(f"{'time':<12} {_time(facts['time'])}")
    needs, free = facts["memory"]["total"], facts["free_memory"]
    free_text = (
        f"{format_bytes(free['bytes'])} free on {free['device']}"
        if free["bytes"] is not None
        else f"free memory of {free['device']} is unknown"
    )
    tight = "; MORE THAN IS FREE" if free["bytes"] is not None and needs > free["bytes"] else ""
    lines.append(f"{'memory':<12} about {format_bytes(needs)} {'per process' if facts['processes'] > 1 else 'needed'}; {free_text}{tight}")
    return lines


def _time(time: dict[str, Any]) -> str:
    """Time per step, and of the whole training."""
    count, without = len(time["timed_steps"]), ", ".join(time["leaves_out"])
    rate = "" if time["tokens_a_second"] is None else f", {time['tokens_a_second']:,.0f} tokens/s"
    measured = f"{time['seconds_a_step']:.3g} s per step{rate} (median of {count})"
    if time["seconds"] is None:
        return f"{measured}; the number of steps is unknown"
    return f"{measured}: {format_duration(time['seconds'])} in all, without {without}"


def after_training(output: Path) -> list[tuple[str | Path, ...]]:
    """Next commands: verify and card for a grown model, inspect for another."""
    growth = open_folder(output).growth
    source = growth.get("source") if growth else None
    if not isinstance(source, dict):
        return [("inspect", output)]
    revision = ("--revision", source["revision"]) if source.get("revision") else ()
    return [("verify", source["ref"], output, *revision), ("card", output)]


def _show_result(result: TrainResult) -> None:
    out = render.console
    for name, loss in result.end.items():
        start, source = result.start.get(name), result.source.get(name)
        over_source = "" if source is None else f"; {loss - source:+.4f} over the source"
        out.print(
            f"{name:<12} loss {loss:.4f}" + ("" if start is None else f" ({loss - start:+.4f} since the start{over_source})"), markup=False
        )
    why = f", ended by {result.stopped}" if result.stopped else ""
    out.print(
        f"trained      {result.output}: {result.steps:,} steps, {format_count(result.tokens)} tokens, {result.flops:.3g} FLOPs, {result.seconds:.0f} s{why}",
        markup=False,
    )
    for words in after_training(result.output):
        show_next(*words)
