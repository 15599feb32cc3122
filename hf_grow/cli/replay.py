"""`hf-grow replay MODEL -o DIR`: text sampled from a model, to be mixed into the training of what is grown from it."""

from __future__ import annotations

import argparse
from pathlib import Path

from hf_grow.checkpoint.source import open_source
from hf_grow.cli import flags, render
from hf_grow.cli.commands import add_json, add_source, enough_memory, print_json
from hf_grow.common.extras import require_packages
from hf_grow.options import Options, parse
from hf_grow.training.config.replay_options import ReplayOptions
from hf_grow.training.data.replay import Estimate, Replay, check_output, estimate, sample_replay


class RunOptions(Options):
    """Where the texts go, and how the command runs."""

    output: str
    """Folder for the texts (also -o); a training reads it as `replay: {path: DIR}`."""
    device: str | None = None
    """Where the model runs: cpu, cuda, cuda:1. Default: the first GPU, else the CPU."""
    overwrite: bool = False
    """Begin anew where DIR holds samples; without it the same command goes on where it stopped."""
    dry_run: bool = False
    """Sample one batch, say how long the rest would take, and write nothing."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source(parser)
    flags.add_flags(parser.add_argument_group("sampling and filters"), [ReplayOptions])
    output = parser.add_argument_group("output")
    flags.add_flags(output, [RunOptions], short={"output": "-o"})
    add_json(output)


def run(arguments: argparse.Namespace) -> int:
    options = parse(ReplayOptions, flags.given(arguments, ReplayOptions), where="The command line", strict=False)
    how = parse(RunOptions, flags.given(arguments, RunOptions), where="The command line", strict=False)
    if options.prompts is not None:
        require_packages("datasets")
    out = Path(how.output).expanduser()
    if not how.dry_run:
        check_output(out, overwrite=how.overwrite)
    checkpoint = open_source(arguments.source, revision=arguments.revision, weights=True, notify=render.note)
    from hf_grow.training.data.sampling import load

    model, tokenizer = load(checkpoint, options.dtype, how.device)
    if how.dry_run:
        return _tell_estimate(estimate(model, tokenizer, options), options, how, as_json=arguments.json)
    smaller = enough_memory("Take a smaller --batch-size, or --device cpu.")
    with smaller, render.tokens_bar("sampling", options.tokens, quiet=arguments.json) as progress:
        try:
            replay = sample_replay(
                model, tokenizer, out, options, ref=checkpoint.ref, revision=checkpoint.revision or "", overwrite=how.overwrite, progress=progress,
                drawing=progress.within,
            )  # fmt: skip
        except KeyboardInterrupt:
            render.note("The batches that are finished are kept: the same command goes on with them.")
            raise
    if arguments.json:
        print_json(replay.to_json())
    else:
        _show(replay, out)
    return 0


def _tell_estimate(found: Estimate, options: ReplayOptions, how: RunOptions, *, as_json: bool) -> int:
    if as_json:
        print_json({"output": how.output, "dry_run": True, "tokens": options.tokens, **found.to_json()})
        return 0
    render.console.print(
        f"speed      {found.tokens_per_second:,.0f} tokens/s sampled, of which {found.kept:.0%} pass the filters", markup=False
    )
    render.console.print(
        f"estimate   {render.duration(found.seconds)} for {options.tokens:,} tokens (nothing written: --dry-run)", markup=False
    )
    return 0


def _show(replay: Replay, out: Path) -> None:
    counts, facts = replay.record["counts"], replay.to_json()
    dropped = ", ".join(f"{n} {reason}" for reason, n in counts["dropped"].items()) or "none"
    render.console.print(f"texts      {counts['texts']:,} of {counts['sampled_texts']:,} kept; dropped: {dropped}", markup=False)
    if replay.record["settings"]["chat_share"]:
        render.console.print(f"chats      {counts['chat_tokens']:,} of {counts['tokens']:,} tokens are conversations", markup=False)
    if counts["cut"]:
        length = replay.record["settings"]["max_length"]
        render.console.print(
            f"cut        {counts['cut']:,} texts, at {length:,} tokens: no end is put after them (--max-length)", markup=False
        )
    render.console.print(f"wrote      {out}: {counts['tokens']:,} tokens, {render.duration(replay.seconds)}", markup=False)
    if replay.sampled_tokens:
        render.console.print(f"speed      {facts['tokens_per_second']:,.0f} tokens/s sampled", markup=False)
    render.console.print(f"use it     replay: {{path: {out}, share: 0.25}} in the recipe of hf-grow train", markup=False)
