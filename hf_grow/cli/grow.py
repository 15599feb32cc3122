"""`hf-grow dus`, `depth`, `width` and `grow`: plan, then carry out."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from hf_grow.api import find_method, open_sources, plan_for
from hf_grow.checkpoint.partial_folder import PartialFolder
from hf_grow.checkpoint.shard_sink import peak_shard_bytes
from hf_grow.checkpoint.writer import DEFAULT_MEMORY, DEFAULT_SHARD_SIZE, DEFAULT_SOURCE_CACHE, WORKERS, check_disk_space, layout
from hf_grow.cli import flags, render
from hf_grow.cli.allocator import keep_freed_memory
from hf_grow.cli.commands import add_json, add_source, print_json, show_next
from hf_grow.cli.parsing import one_of
from hf_grow.cli.push import PublishOptions, push_with_bar, pushed_facts, show_pushed
from hf_grow.cli.streamed import fetch_small, heads_compared, streamed
from hf_grow.common.suggest import did_you_mean
from hf_grow.common.units import format_bytes
from hf_grow.convert.measure import measure
from hf_grow.errors import InputError
from hf_grow.growth.growth import Method
from hf_grow.growth.plan import GrowthPlan
from hf_grow.methods import METHODS
from hf_grow.model.param_count import format_count
from hf_grow.options import Bytes, Options, Requires, load_yaml, parse, raise_errors, unmet_requirements
from hf_grow.publish.card import license_warnings
from hf_grow.publish.manifest import path_warnings, title_of
from hf_grow.publish.push import Destination, Pushed, check_destination, prepare_repo
from hf_grow.publish.stream import SHARD_SIZE as STREAM_SHARD_SIZE
from hf_grow.publish.stream import StreamSink
from hf_grow.training.growth_state.grow_optimizer import check_trainer_checkpoint, grow_checkpoint_state
from hf_grow.training.growth_state.state_files import warn_unsettled

if TYPE_CHECKING:
    from hf_grow.checkpoint.reader import Checkpoint
    from hf_grow.convert.execute import Result

KINDS = {kind: {m.name: m for m in METHODS.values() if m.kind == kind} for kind in ("depth", "width")}
"""Commands that choose among several methods by --method."""
RECIPES = {path.stem: path for path in sorted((Path(__file__).parents[1] / "_recipes").glob("*.yaml"))}
"""The recipes that come with hf-grow; in the repository they lie in recipes/."""


BY_RANGES = "length, ETag and commit of every range agreed; its bytes are proved by `hf-grow verify`, which downloads the source"
"""What can be said of a source that never was here whole."""


class OutputOptions(PublishOptions):
    """How the result is written; the same for every method."""

    output: str | None = None
    """Folder to write (also -o). Default: the source's name with method and size, in the current folder."""
    max_shard_size: Annotated[Bytes, Field(ge=1)] | None = None
    """Largest weight file, such as 10GB. Default: 50GB, as transformers; 5GB where shards are streamed."""
    resume: bool = False
    """Go on with an interrupted run: only unfinished tensors are written again. With --overwrite, an existing output is replaced when all is done."""
    overwrite: bool = False
    """Replace an existing output; the old one goes only when the new one is whole. An interrupted one is discarded, or gone on with by --resume too."""
    dry_run: bool = False
    """Print the plan and stop; reads config and headers only."""
    memory_budget: Annotated[Bytes, Field(ge=1 << 20)] = DEFAULT_MEMORY
    """Memory for computing tensors that are no copies. Default: 256MiB."""
    allow_nonfinite: bool = False
    """Accept weights that are NaN or infinite."""
    stream_source: bool = False
    """Fetch each tensor of a Hub source when it is needed and remove it after its last use, instead of downloading all first."""
    source_cache: Annotated[Bytes, Field(ge=0), Requires("stream_source")] = DEFAULT_SOURCE_CACHE
    """With --stream-source, disk for tensors that are needed again later; others are fetched again. Default: 2GB."""
    with_optimizer: str | None = None
    """Folder of a Trainer checkpoint (with optimizer.pt or optimizer.bin) of the source: its optimizer state grows along, and training resumes from the result."""
    optimizer_policy: Annotated[Literal["map", "keep-and-zero", "reset"], Requires("with_optimizer")] = "map"
    """What new entries start with: the mapped state (map), zero (keep-and-zero), or no moments for any parameter (reset)."""
    exact_steps: Annotated[bool, Requires("with_optimizer"), Requires("optimizer_policy", ("map", "keep-and-zero"))] = False
    """Write optimizer groups with which AdamW repeats the small model's steps exactly; for an optimizer made from hf_grow.training.growth_state.trajectory.groups."""

    @property
    def shard_size(self) -> int:
        return self.max_shard_size or (STREAM_SHARD_SIZE if self.stream_push else DEFAULT_SHARD_SIZE)


class RecipeOptions(OutputOptions):
    """The keys of a growth recipe besides those of its method."""

    source: str
    """Checkpoint folder or Hub id."""
    revision: str | None = None
    """Branch, tag or commit of a Hub repository."""
    method: str | None = None
    """Growth method. Default: dus, or pipeline where there are steps."""


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Flags of one method, or of all methods of a kind with --method to choose."""
    add_source(parser)
    methods = KINDS.get(command) or {command: METHODS[command]}
    if command in KINDS:
        default = {"depth": "dus, or layers where --layers is given", "width": "tile"}[command]
        about = "; ".join(f"{m.name}: {m.summary}" for m in methods.values()).replace("%", "%%")
        parser.add_argument("--method", type=one_of(methods), metavar="{" + ",".join(methods) + "}", help=f"{about}. Default: {default}")
    flags.add_flags(parser.add_argument_group("growth"), [m.options for m in methods.values()])
    _add_output(parser.add_argument_group("output"))


def _add_output(group: argparse._ArgumentGroup) -> None:
    flags.add_flags(group, [OutputOptions], short={"output": "-o"})
    add_json(group)


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe",
        metavar="RECIPE",
        help="YAML file, or the name of a recipe that comes with hf-grow: " + ", ".join(RECIPES) + ". Keys: source, revision, method, "
        "the options of the method (see hf-grow depth --help) and the output options below, with _ for -",
    )
    parser.add_argument("--source", help="checkpoint folder or Hub id, instead of the recipe's")
    output = parser.add_argument_group("output (these override the recipe)")
    _add_output(output)


def run(arguments: argparse.Namespace) -> int:
    method = find_method(arguments.command) if arguments.command in METHODS else _chosen(arguments)
    options = parse(method.options, flags.given(arguments, method.options), where="The command line", strict=False)
    output = parse(OutputOptions, flags.given(arguments, OutputOptions), where="The command line", strict=False)
    return carry_out(arguments.source, arguments.revision, method, options, output, as_json=arguments.json)


def find_recipe(text: str) -> Path:
    """A file, or a bare name of RECIPES (a file of that name in the current folder goes first). Raises InputError."""
    path = Path(text)
    if path.is_file() or path.suffix or os.sep in text:
        return path  # where it is missing, reading it says so
    if text not in RECIPES:
        raise InputError(
            f"There is no recipe {text!r}.{did_you_mean(text, RECIPES)}", hint=f"Give a YAML file, or one of: {', '.join(RECIPES)}."
        )
    return RECIPES[text]


def run_recipe(arguments: argparse.Namespace) -> int:
    data = load_yaml(find_recipe(arguments.recipe))
    if arguments.source:
        data = {**data, "source": arguments.source, "revision": None}
    method = find_method(str(data.get("method") or ("pipeline" if "steps" in data else "dus")))
    # One model of both, so that every mistake of the recipe is told at once.
    keys: type[RecipeOptions] = type("Recipe", (RecipeOptions, method.options), {"__module__": __name__})
    recipe = parse(keys, data, where=arguments.recipe, check_requirements=False)
    options = method.options(**{name: getattr(recipe, name) for name in recipe.model_fields_set & method.options.model_fields.keys()})
    flagged = parse(OutputOptions, flags.given(arguments, OutputOptions), where="The command line", strict=False, check_requirements=False)
    output = OutputOptions(**{m: getattr(o, m) for o in (recipe, flagged) for m in o.model_fields_set & OutputOptions.model_fields.keys()})
    raise_errors(arguments.recipe, unmet_requirements(output, options))
    return carry_out(recipe.source, recipe.revision, method, options, output, as_json=arguments.json)


def _chosen(arguments: argparse.Namespace) -> Method:
    methods = KINDS[arguments.command]
    listed = getattr(arguments, "layers", flags.SKIP) != flags.SKIP
    default = "tile" if arguments.command == "width" else "layers" if listed else "dus"
    method = methods[arguments.method or default]
    flags.refuse_foreign(arguments, method, methods)
    return method


def carry_out(source: str, revision: str | None, method: Method, options: Options, output: OutputOptions, *, as_json: bool) -> int:
    checkpoint = open_sources(source, options, revision=revision, weights=False, notify=render.note)
    plan = plan_for(checkpoint.info, method, options)
    out = Path(output.output) if output.output is not None else default_output(source, plan)
    PartialFolder.check(out, resume=output.resume, overwrite=output.overwrite)
    to = output.destination()
    if to:
        check_destination(to)
        for warning in license_warnings(plan, to.repo):
            render.note(warning)
    if output.stream_push and output.with_optimizer:
        raise InputError("--stream-push sends the model only, and --with-optimizer writes more.", hint="Leave one of them out.")
    if not as_json:
        if plan.growth.candidates:
            render.show_candidates(plan.growth.candidates)
        render.show_plan(plan)
    cache, companions = None, None
    if output.stream_source and not output.dry_run:
        checkpoint, plan = _with_heads(heads_compared(checkpoint), plan, method, options)
    shards = layout(plan.targets, output.shard_size)
    if output.stream_source:
        checkpoint, cache = streamed(plan, checkpoint, shards, output.source_cache, quiet=as_json)
    if output.with_optimizer:
        check_trainer_checkpoint(Path(output.with_optimizer), output.optimizer_policy)
        warn_unsettled(Path(output.with_optimizer), render.note)
    if output.dry_run:
        here = peak_shard_bytes(shards, StreamSink.window if output.stream_push else None)
        check_disk_space(out, here + (cache.peak_bytes(WORKERS) if cache else 0))
        return _finish(plan, out, None, as_json, to)
    if cache:
        companions = fetch_small(checkpoint)
    elif any(c.folder is None for c in (checkpoint, *checkpoint.donors.values())):
        checkpoint = open_sources(checkpoint.ref, options, revision=checkpoint.revision, weights=True, notify=render.note)
        checkpoint, plan = _with_heads(checkpoint, plan, method, options)
        shards = layout(plan.targets, output.shard_size)
    plan = measure(plan, checkpoint, notify=render.note)
    if to:
        to = prepare_repo(to)  # before the work: a token that may not write is told now
    from hf_grow.convert.execute import execute

    keep_freed_memory()
    sink = None
    if to and output.stream_push:
        sink = StreamSink(to, title_of(plan.growth.method, plan.source.ref), render.note)
        for doubt in path_warnings(plan.source.ref, change="a shorter one, or a Hub id, as the source changes that"):
            render.note(doubt)
    with render.bytes_bar("growing", plan.nbytes, quiet=as_json) as progress:
        result = execute(
            plan,
            checkpoint,
            out,
            shards,
            companions=companions,
            resume=output.resume,
            overwrite=output.overwrite,
            memory_budget=output.memory_budget,
            allow_nonfinite=output.allow_nonfinite,
            progress=progress,
            also=_also(output, plan),
            sink=sink,
            cache=cache,
        )
    return _finish(plan, out, result, as_json, to, sink, BY_RANGES if cache else "")


def _with_heads(checkpoint: Checkpoint, plan: GrowthPlan, method: Method, options: Options) -> tuple[Checkpoint, GrowthPlan]:
    """The plan made anew of weights that are known now; the one that was shown came from headers. What differs is told."""
    new = plan_for(checkpoint.info, method, options)
    for warning in new.growth.warnings:
        if warning not in plan.growth.warnings:
            render.note(warning)
    return checkpoint, new


def _also(output: OutputOptions, plan: GrowthPlan) -> Callable[[Path], set[str]]:
    """What is written besides the model, before the folder gets its name."""
    if not output.with_optimizer:
        return lambda folder: set()
    return grow_checkpoint_state(Path(output.with_optimizer), plan, output.optimizer_policy, exact_steps=output.exact_steps)


def default_output(source: str, plan: GrowthPlan) -> Path:
    name = Path(source).resolve().name if Path(source).exists() else source.rsplit("/", 1)[-1]
    return Path(f"{name}-{plan.growth.method}-{format_count(plan.sizes[1].total)}")


def _finish(
    plan: GrowthPlan, out: Path, result: Result | None, as_json: bool, to: Destination | None = None, sink: StreamSink | None = None,
    source_checked: str = "",
) -> int:  # fmt: skip
    def published() -> Pushed | None:
        return sink.pushed if sink else push_with_bar(out, to, quiet=as_json) if to and result else None

    if as_json:
        facts: dict[str, Any] = {"output": str(out), "dry_run": result is None, "plan": render.plan_facts(plan)}
        if result:
            facts |= {"seconds": result.seconds, "bytes": result.nbytes, "shards": dict(result.shards), "resumed_tensors": result.resumed}
            facts |= {"source_checked": source_checked} if source_checked else {}
        if pushed := published():
            facts["pushed"] = pushed_facts(pushed)
        print_json(facts)
    elif result is None:
        render.console.print(f"output     {out} (nothing written: --dry-run)", markup=False)
        if to:
            render.console.print(f"publish    {to.repo} (nothing sent)", markup=False)
    else:
        rate = result.nbytes / 1e9 / result.seconds
        kept = f", {result.resumed} tensors kept from the interrupted run" if result.resumed else ""
        what = f"{out}: {format_bytes(result.nbytes)} in {result.seconds:.2f} s ({rate:.2f} GB/s), checked and "
        render.console.print(f"wrote      {what}{'sent' if sink else 'synced'}{kept}", markup=False)
        if source_checked:
            render.console.print(f"source     {source_checked}", markup=False)
        if pushed := published():
            show_pushed(pushed)
        if sink and pushed:
            render.console.print(f"{out} was not kept; to verify: hf download {pushed.repo} --local-dir {out}", markup=False)
        show_next("verify", plan.source.ref, out)
    return 0
