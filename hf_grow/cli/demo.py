"""`hf-grow demo`: pretrain, grow, verify and train a small model, with nothing to download."""

from __future__ import annotations

import argparse

from hf_grow.cli import flags, run_command
from hf_grow.demo.run import DemoOptions
from hf_grow.demo.run import run as run_demo
from hf_grow.options import parse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flags.add_flags(parser, [DemoOptions], short={"output": "-o"})


def run(arguments: argparse.Namespace) -> int:
    options = parse(DemoOptions, flags.given(arguments, DemoOptions), where="The command line", strict=False)
    run_demo(options, run_command)
    return 0
