"""`hf-grow dus`, `depth`, `width`, `hybrid`, `experts` and `grow`: parse, show the plan, run the `GrowthJob`, print the result."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_grow.api.growth_job import GrowthJob
from hf_grow.api.output_options import OutputOptions
from hf_grow.checkpoint.writer import WORKERS
from hf_grow.cli import flags, render
from hf_grow.cli.allocator import keep_freed_memory
from hf_grow.cli.commands import add_json, add_source, print_json, show_next
from hf_grow.cli.parsing import one_of
from hf_grow.cli.push import publishing_bar, pushed_facts, show_pushed
from hf_grow.common.units import format_bytes
from hf_grow.convert.planning import find_method
from hf_grow.growth.growth import Method
from hf_grow.methods import METHODS
from hf_grow.options import Options, combined, find_yaml, load_yaml, parse, part, raise_errors, unmet_requirements

if TYPE_CHECKING:
    from hf_grow.checkpoint.writer import Result
    from hf_grow.publish.push import PushResult

KINDS = {kind: {m.name: m for m in METHODS.values() if m.kind == kind} for kind in ("depth", "width")}
"""Commands that choose among several methods by --method."""
RECIPES = {path.stem: path for path in sorted((Path(__file__).parents[1] / "_recipes").glob("*.yaml"))}
"""The recipes that come with hf-grow; in the repository they are in recipes/."""

STREAMED = "length, ETag and commit of every range matched; its bytes are checked by `hf-grow verify`, which downloads the source"
"""What was checked of a source that was never on this machine as a whole."""


class CommandOptions(Options):
    """What only the command line and recipes have; in Python, `out` is an argument and a dry run is `hf_grow.plan`."""

    output: str | None = None
    """Folder to write (also -o). Default: the source's name with method and size, in the current folder."""
    dry_run: bool = False
    """Print the plan and stop; reads config and headers only."""


class RecipeOptions(Options):
    """The keys of a growth recipe besides the output options and those of its method."""

    source: str
    """Checkpoint folder or Hub id."""
    revision: str | None = None
    """Branch, tag or commit of a Hub repository."""
    method: str | None = None
    """Growth method. Default: dus, or pipeline if there are steps."""


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Flags of one method, or of all methods of a kind with --method to choose."""
    add_source(parser)
    methods = KINDS.get(command) or {command: METHODS[command]}
    if command in KINDS:
        default = {"depth": "dus, or layers if --layers is given", "width": "tile"}[command]
        about = "; ".join(f"{m.name}: {m.summary}" for m in methods.values()).replace("%", "%%")
        parser.add_argument("--method", type=one_of(methods), metavar="{" + ",".join(methods) + "}", help=f"{about}. Default: {default}")
    flags.add_flags(parser.add_argument_group("growth"), [m.options for m in methods.values()])
    _add_output(parser.add_argument_group("output"))


def _add_output(group: argparse._ArgumentGroup) -> None:
    flags.add_flags(group, [CommandOptions, OutputOptions], short={"output": "-o"})
    add_json(group)


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe",
        metavar="RECIPE",
        help="YAML file, or the name of a recipe that comes with hf-grow: " + ", ".join(RECIPES) + ". Keys: source, revision, method, "
        "the options of the method (see hf-grow depth --help) and the output options below, with _ for -",
    )
    parser.add_argument("--source", help="checkpoint folder or Hub id, instead of the recipe's")
    _add_output(parser.add_argument_group("output (these override the recipe)"))


def run(arguments: argparse.Namespace) -> int:
    method = METHODS.get(arguments.command) or _chosen(arguments)
    keys = combined(CommandOptions, OutputOptions, method.options)
    options = parse(keys, flags.given(arguments, keys), where="The command line", strict=False)
    return carry_out(arguments.source, arguments.revision, method, options, as_json=arguments.json)


def run_recipe(arguments: argparse.Namespace) -> int:
    data = load_yaml(find_yaml(arguments.recipe, RECIPES, "There is no recipe"))
    if arguments.source:
        data = {**data, "source": arguments.source, "revision": None}
    method = find_method(str(data.get("method") or ("pipeline" if "steps" in data else "dus")))
    recipe = parse(
        combined(RecipeOptions, CommandOptions, OutputOptions, method.options), data, where=arguments.recipe, check_requirements=False
    )
    flagged = parse(
        combined(CommandOptions, OutputOptions),
        flags.given(arguments, combined(CommandOptions, OutputOptions)),
        where="The command line",
        strict=False,
        check_requirements=False,
    )
    options = type(recipe)(**{name: getattr(o, name) for o in (recipe, flagged) for name in o.model_fields_set})
    raise_errors(arguments.recipe, unmet_requirements(options))
    where = part(options, RecipeOptions)
    return carry_out(where.source, where.revision, method, options, as_json=arguments.json)


def _chosen(arguments: argparse.Namespace) -> Method:
    methods = KINDS[arguments.command]
    listed = getattr(arguments, "layers", flags.SKIP) != flags.SKIP
    default = "tile" if arguments.command == "width" else "layers" if listed else "dus"
    method = methods[arguments.method or default]
    flags.reject_other_methods_flags(arguments, method, methods)
    return method


def carry_out(source: str, revision: str | None, method: Method, options: Options, *, as_json: bool) -> int:
    command = part(options, CommandOptions)
    out = Path(command.output) if command.output is not None else None
    job = GrowthJob(
        source, method, part(options, method.options), part(options, OutputOptions), out=out, revision=revision, notify=render.note
    )
    job.check()
    if not as_json:
        if job.plan.growth.candidates:
            render.show_candidates(job.plan.growth.candidates)
        render.show_plan(job.plan)
    if command.dry_run:
        job.check_room()
        print_json(_facts(job, None)) if as_json else _show_dry_run(job)
        return 0
    job.prepare()
    keep_freed_memory()
    if not as_json:
        _show_download(job)
    with render.bytes_bar("growing", job.plan.nbytes, quiet=as_json) as progress:
        result = job.carry_out(progress)
    if not as_json:
        _show_result(job, result)
    pushed = _publish(job, quiet=as_json)
    if as_json:
        print_json(_facts(job, result) | ({"pushed": pushed_facts(pushed)} if pushed else {}))
        return 0
    if pushed:
        show_pushed(pushed)
        if job.output.stream_push:
            render.console.print(f"{job.out} was not kept; to verify: hf download {pushed.repo} --local-dir {job.out}", markup=False)
    show_next("verify", job.plan.source.ref, job.out)
    return 0


def _publish(job: GrowthJob, *, quiet: bool) -> PushResult | None:
    if job.destination is None or job.output.stream_push:
        return job.publish()
    with publishing_bar(job.manifest, job.destination, quiet=quiet) as progress:
        return job.publish(progress)


def _facts(job: GrowthJob, result: Result | None) -> dict[str, Any]:
    facts: dict[str, Any] = {"output": str(job.out), "dry_run": result is None, "plan": render.plan_facts(job.plan)}
    if result:
        facts |= {"seconds": result.seconds, "bytes": result.nbytes, "shards": dict(result.shards), "resumed_tensors": result.resumed}
        facts |= {"source_checked": STREAMED} if job.cache else {}
    return facts


def _show_download(job: GrowthJob) -> None:
    if job.cache:
        schedule = job.cache.schedule
        refetched = schedule.fetched - schedule.once
        repeated = f" ({format_bytes(refetched)} of them a second time)" if refetched else ""
        most = format_bytes(job.cache.peak_bytes(WORKERS))
        render.console.print(f"fetching   {format_bytes(schedule.fetched)} by byte ranges{repeated}; at most {most} on the disk at a time")


def _show_dry_run(job: GrowthJob) -> None:
    _show_download(job)
    render.console.print(f"output     {job.out} (nothing written: --dry-run)", markup=False)
    if job.destination:
        render.console.print(f"publish    {job.destination.repo} (nothing sent)", markup=False)


def _show_result(job: GrowthJob, result: Result) -> None:
    rate = result.nbytes / 1e9 / result.seconds
    kept = f", {result.resumed} tensors kept from the interrupted run" if result.resumed else ""
    done = "sent" if job.output.stream_push else "synced"
    size = f"{format_bytes(result.nbytes)} in {result.seconds:.2f} s ({rate:.2f} GB/s)"
    render.console.print(f"wrote      {job.out}: {size}, checked and {done}{kept}", markup=False)
    if job.cache:
        render.console.print(f"source     {STREAMED}", markup=False)
