"""The command line. One small file a command; help never imports torch, and each command loads only what it needs."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from io import TextIOWrapper

from hf_grow._version import __version__
from hf_grow.cli.parsing import GREETING, Parser, check_command, error_facts, refuse_rest
from hf_grow.cli.streams import json_alone
from hf_grow.errors import GrowError, InputError, printable

# command -> (module of its arguments and run, one line of help)
COMMANDS = {
    "plan": ("plan", "the ways to a size, side by side"),
    "dus": ("grow", "depth up-scaling as SOLAR 10.7B"),
    "depth": ("grow", "any depth method: dus, stack, interleave, identity, a list of layers"),
    "width": ("grow", "any width method: hidden_size, intermediate_size, heads, head_dim"),
    "hybrid": ("grow", "depth, width and FFN together, to any size"),
    "experts": ("grow", "a dense model into a mixture of experts, or more experts"),
    "grow": ("grow", "carry out a growth recipe (YAML)"),
    "verify": ("verify", "prove that a grown checkpoint is what its plan says"),
    "push": ("push", "publish a finished checkpoint on the Hub"),
    "card": ("card", "write the model card of a grown checkpoint"),
    "inspect": ("inspect", "what a checkpoint is, and what it was grown from"),
    "replay": ("replay", "text sampled from a model, to keep what it knows in further training"),
    "fisher": ("fisher", "per-parameter importance (Fisher) on old data, for a penalty (EWC)"),
    "train": ("train", "continued pretraining that does not forget, by a recipe (YAML)"),
    "merge": ("merge", "a LoRA adapter, replicated layers and all, as a plain checkpoint"),
    "demo": ("demo", "train a small model, grow it, go on training; nothing to download"),
}

RESUMABLE = {name for name, (module, _) in COMMANDS.items() if module in ("grow", "train")}

EPILOG = """\
examples:
  hf-grow plan mistralai/Mistral-7B-v0.1 --to 10.7B
  hf-grow dus mistralai/Mistral-7B-v0.1 --to 10.7B -o Mistral-10.7B
  hf-grow depth ./my-model --method identity --layers-to 40 --dry-run
  hf-grow verify ./my-model ./my-model-grown

exit status: 0 done; 1 failed, or the verification failed; 2 the input cannot be used
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status. Errors are one message on stderr, never a traceback, and with --json an object on stdout too."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that cannot show a name must not end the work
    with json_alone("--json" in arguments):
        return _ended(arguments)


def _ended(arguments: list[str]) -> int:
    try:
        status = run_command(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where a full disk can still be told
        return status
    except GrowError as error:
        # All processes of a distributed training find the same mistakes; the first of each machine tells of them.
        if isinstance(error, InputError) and _launched("LOCAL_RANK"):
            return error.exit_code
        return _failed(error, arguments)
    except KeyboardInterrupt:
        again = " Repeat the command with --resume to go on where it stopped." if RESUMABLE & set(arguments[:1]) else ""
        print(file=sys.stderr)
        return _failed(GrowError(f"interrupted.{again}"), arguments)
    except BrokenPipeError:
        _abandon_stdout()
        return 1
    except MemoryError:
        return _failed(GrowError("out of memory.", hint="Use a smaller --memory-budget, or verify --structure-only."), arguments)
    except OSError as error:
        # Files of the work have messages of their own where they are read and written; this is stdout, the caches of libraries, and the like.
        place = error.filename if isinstance(error.filename, str) else "a file, or standard output"
        return _failed(GrowError(f"{printable(place)} could not be read or written: {printable(error.strerror or str(error))}."), arguments)


def _failed(error: GrowError, arguments: Sequence[str]) -> int:
    print(f"hf-grow: {error}", file=sys.stderr)
    try:
        if "--json" in arguments:
            from hf_grow.cli.commands import print_json

            print_json(error_facts(error))
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        _abandon_stdout()
    return error.exit_code


def _abandon_stdout() -> None:
    """What is still in its buffer is thrown away, so that Python does not try once more at its end."""
    with suppress(OSError, AttributeError):  # there is none, or it is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_command(argv: list[str]) -> int:
    """Runs one command and returns its exit status. Raises GrowError, where `main` prints the message."""
    if not argv or argv == ["help"]:
        print(GREETING, end="")
        return 0
    if argv[0] == "help":
        argv = [argv[1], "--help"]
    chosen = check_command(argv, COMMANDS, _methods)
    parser = Parser(
        "hf-grow",
        description="Grow a trained checkpoint into a larger one, and go on training it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hf-grow {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (_, text) in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
        if name == chosen:
            _add_arguments(name, sub)
    arguments, rest = parser.parse_known_args(argv)
    started = _started()
    if started > 1 and arguments.command != "train":
        raise InputError(
            f"hf-grow {arguments.command} runs in one process, and {started} were started.",
            hint="Start it without a launcher; train takes one.",
        )
    module = importlib.import_module(f"hf_grow.cli.{COMMANDS[arguments.command][0]}")
    if not getattr(module, "OVERRIDES", False):
        refuse_rest(rest, commands.choices[arguments.command])
    arguments.overrides = rest
    run = module.run_recipe if arguments.command == "grow" else module.run
    return int(run(arguments))


def _launched(name: str) -> int | None:
    """A number that a launcher left in the environment: 0 where it is not set, None where it is no number."""
    value = os.environ.get(name) or "0"
    return int(value) if value.isascii() and value.isdigit() and len(value) < 10 else None


def _started() -> int:
    """How many processes a launcher started. Raises InputError for variables of it that are no numbers, which torch and accelerate read too."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        if _launched(name) is None:
            raise InputError(f"The environment variable {name} is {os.environ[name]!r}, and a number belongs there.", hint=f"unset {name}")
    return _launched("WORLD_SIZE") or 1


def _methods() -> dict[str, str]:
    from hf_grow.methods import METHODS

    return {name: method.kind for name, method in METHODS.items() if name not in COMMANDS}


def _add_arguments(name: str, parser: argparse.ArgumentParser) -> None:
    module = importlib.import_module(f"hf_grow.cli.{COMMANDS[name][0]}")
    if name == "grow":
        module.add_recipe_arguments(parser)
    elif module.__name__.endswith(".grow"):
        module.add_arguments(parser, name)
    else:
        module.add_arguments(parser)
