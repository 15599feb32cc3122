"""`hf-grow fisher MODEL --text OLD_DATA -o FILE`: per-parameter importance (Fisher) on old data, for the penalty of a training."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from hf_grow.cli import flags, render
from hf_grow.cli.commands import add_json, add_source, out_of_memory_errors, print_json
from hf_grow.common.units import format_bytes
from hf_grow.model.param_count import format_count
from hf_grow.options import parse
from hf_grow.training.config.fisher_options import FisherFileOptions, FisherOptions
from hf_grow.training.distributed.launch import is_main_process


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source(parser)
    files = parser.add_argument_group("input and output")
    flags.add_flags(files, [FisherFileOptions], short={"output": "-o"})
    for action in parser._actions:
        if action.dest in ("output", "from_growth", "merge"):
            action.metavar = "FILE"
        elif action.dest == "from_optimizer":
            action.metavar = "DIR"
    flags.add_flags(parser.add_argument_group("estimation"), [FisherOptions])
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    checked_together: dict[str, Any] = {"where": "The command line", "strict": False, "check_requirements": False}
    files = parse(FisherFileOptions, flags.given(arguments, FisherFileOptions), **checked_together)
    options = parse(FisherOptions, flags.given(arguments, FisherOptions), **checked_together)
    from hf_grow.training.fisher import write_fisher

    first = is_main_process()

    with out_of_memory_errors(
        "Use a smaller --batch or --seq-length, or --device cpu. --dry-run estimates the memory without activations."
    ):
        facts = write_fisher(
            arguments.source, arguments.revision, files, options,
            notify=render.note if first else lambda message: None,
            progress_bar=partial(render.tokens_bar, quiet=arguments.json or not first),
        )  # fmt: skip
    if not first:
        return 0
    print_json(facts) if arguments.json else _show(facts)
    return 0


def _show(facts: dict[str, Any]) -> None:
    say = render.console.print
    if "dry_run" in facts:
        say(f"parameters {format_count(facts['parameters'])}; the file takes {format_bytes(facts['file_bytes'])}")
        if "memory_bytes" in facts:
            parts = ", ".join(f"{k} {format_bytes(v)}" for k, v in facts["memory_bytes"].items() if k != "total")
            say(f"memory     {format_bytes(facts['memory_bytes']['total'])}: {parts}")
            say(f"compute    {format_count(facts['flops'])} FLOPs for {facts['tokens']:,} tokens")
        say(f"{facts['note']} (nothing done: --dry-run)")
        return
    if "mapped_by" in facts:
        say(f"wrote      {facts['output']}: mapped through {facts['mapped_by']}, {facts['seconds']} s", markup=False)
    elif "optimizer" in facts:
        say(f"wrote      {facts['output']} ({format_bytes(facts['bytes'])}): exp_avg_sq of {facts['optimizer']} after {facts['steps']:,.0f} steps, "
            f"times {facts['tokens_per_step']:,.0f} tokens per step, {facts['seconds']} s", markup=False)  # fmt: skip
    else:
        how = "one sequence at a time" if facts["exact"] else f"batches of {facts['batch']}"
        say(f"wrote      {facts['output']} ({format_bytes(facts['bytes'])}): {facts['kind']} Fisher, {facts['tokens']:,} tokens, {how}, "
            f"mean {facts['mean']:.3g}, {facts['seconds']} s", markup=False)  # fmt: skip
    if "utility" in facts:
        say(f"wrote      {facts['utility']}: squared gradients of the experts (hf-grow experts --add N --utility FILE)", markup=False)
    if "calibration" in facts:
        c = facts["calibration"]
        say(
            f"before     old {c['before']['old']:.4f}, new {c['before']['new']:.4f} nats per token; {c['steps']} steps at {c['lr']:g} "
            f"({c['schedule']}, decay {c['weight_decay']:g}, {c['batch']} sequences per step):"
        )
        for t in c["trials"]:
            mark = "   <-" * (t["lambda"] == c["lambda"])
            say(
                f"lambda {t['lambda']:<10.4g} old {t['old']:.4f} ({t['rise']:+.4f}; 1/2 F d^2 = {t['forecast']:.4f})   new {t['new']:.4f}{mark}"
            )
    strength = facts.get("calibration", {}).get("lambda", 10.0)
    say(
        f"use it     regularizer: {{kind: ewc, fisher: {facts['output']}, lambda: {strength:.4g}}} in the recipe of hf-grow train",
        markup=False,
    )
