"""`hf-grow replay MODEL -o DIR`: samples text from a model, to mix into the training of models grown from it."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path

from hf_grow.checkpoint.source import open_source
from hf_grow.cli import flags, render
from hf_grow.cli.commands import add_json, add_source, out_of_memory_errors, print_json
from hf_grow.common.extras import require_packages
from hf_grow.common.units import format_duration
from hf_grow.errors import InputError
from hf_grow.options import Options, parse
from hf_grow.training.config.replay_options import ReplayOptions
from hf_grow.training.data.replay import ReplayResult, SamplingEstimate, estimate_sampling, sample_replay
from hf_grow.training.data.replay_files import check_output
from hf_grow.training.data.vllm_engine import check_engine, engine_of, with_engine


class ReplayRunOptions(Options):
    """Output and device of the command."""

    output: str
    """Folder for the texts (also -o); a training reads it with `replay: {path: DIR}`."""
    device: str | None = None
    """Device of the model: cpu, cuda, cuda:1. Default: the first GPU, else the CPU."""
    overwrite: bool = False
    """Replace the samples in DIR. Without it the command continues them."""
    dry_run: bool = False
    """Sample one batch to estimate the time, and write nothing."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source(parser)
    flags.add_flags(parser.add_argument_group("sampling and filters"), [ReplayOptions])
    output = parser.add_argument_group("output")
    flags.add_flags(output, [ReplayRunOptions], short={"output": "-o"})
    add_json(output)


def run(arguments: argparse.Namespace) -> int:
    options = with_engine(parse(ReplayOptions, flags.given(arguments, ReplayOptions), where="The command line", strict=False))
    run_options = parse(ReplayRunOptions, flags.given(arguments, ReplayRunOptions), where="The command line", strict=False)
    if options.prompts is not None:
        require_packages("datasets")
    check_engine(options, arguments.source)
    if options.engine == "vllm" and run_options.device is not None:
        raise InputError(
            "vLLM chooses its device itself.", hint="Omit --device (CUDA_VISIBLE_DEVICES hides GPUs), or use --engine transformers."
        )
    out = Path(run_options.output).expanduser()
    if not run_options.dry_run:
        check_output(out, overwrite=run_options.overwrite)
    checkpoint = open_source(arguments.source, revision=arguments.revision, weights=True, notify=render.note)
    from hf_grow.training.data.source_model import load_with_tokenizer

    engine = engine_of(options, checkpoint)
    model, tokenizer = load_with_tokenizer(checkpoint, options.dtype, run_options.device if engine is None else "cpu")
    if run_options.dry_run:
        with engine or nullcontext():
            estimate = estimate_sampling(model, tokenizer, options, engine=engine)
        return _show_estimate(estimate, options, run_options, as_json=arguments.json)
    memory_errors = out_of_memory_errors("Use a smaller --batch-size, or --device cpu.")
    with memory_errors, engine or nullcontext(), render.tokens_bar("sampling", options.tokens, quiet=arguments.json) as progress:
        try:
            replay = sample_replay(
                model, tokenizer, out, options, ref=checkpoint.ref, revision=checkpoint.revision or "", overwrite=run_options.overwrite, progress=progress,
                on_token=progress.within, engine=engine,
            )  # fmt: skip
        except KeyboardInterrupt:
            render.note("Finished batches are kept: repeat the command to continue.")
            raise
    if arguments.json:
        print_json(replay.to_json())
    else:
        _show(replay, out)
    return 0


def _show_estimate(estimate: SamplingEstimate, options: ReplayOptions, run_options: ReplayRunOptions, *, as_json: bool) -> int:
    if as_json:
        print_json({"output": run_options.output, "dry_run": True, "tokens": options.tokens, **estimate.to_json()})
        return 0
    render.console.print(
        f"speed      {estimate.tokens_per_second:,.0f} tokens/s sampled, of which {estimate.kept:.0%} pass the filters", markup=False
    )
    render.console.print(
        f"estimate   {format_duration(estimate.seconds)} for {options.tokens:,} tokens (nothing written: --dry-run)", markup=False
    )
    return 0


def _show(replay: ReplayResult, out: Path) -> None:
    counts, facts = replay.record["counts"], replay.to_json()
    dropped = ", ".join(f"{n} {reason}" for reason, n in counts["dropped"].items()) or "none"
    render.console.print(f"texts      {counts['texts']:,} of {counts['sampled_texts']:,} kept; dropped: {dropped}", markup=False)
    if replay.record["settings"]["chat_share"]:
        render.console.print(f"chats      {counts['chat_tokens']:,} of {counts['tokens']:,} tokens are conversations", markup=False)
    if counts["cut"]:
        length = replay.record["settings"]["max_length"]
        render.console.print(
            f"cut        {counts['cut']:,} texts, at {length:,} tokens (--max-length): they are packed without EOS", markup=False
        )
    render.console.print(f"wrote      {out}: {counts['tokens']:,} tokens, {format_duration(replay.seconds)}", markup=False)
    if replay.sampled_tokens:
        render.console.print(f"speed      {facts['tokens_per_second']:,.0f} tokens/s sampled", markup=False)
    render.console.print(f"use it     replay: {{path: {out}, share: 0.25}} in the recipe of hf-grow train", markup=False)
