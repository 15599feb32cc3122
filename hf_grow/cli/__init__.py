"""The command line: one module per command. `--help` never imports torch, and a command imports only what it needs."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from io import TextIOWrapper

from hf_grow._version import __version__
from hf_grow.cli.parsing import GREETING, Parser, check_command, error_facts, reject_unknown_arguments
from hf_grow.cli.streams import only_json_on_stdout
from hf_grow.errors import GrowError, InputError, printable

# command -> (module of its arguments and run, one line of help)
COMMANDS = {
    "plan": ("plan", "growth options for a target size, side by side"),
    "dus": ("grow", "depth up-scaling, as in SOLAR 10.7B"),
    "depth": ("grow", "depth growth by any method: dus, stack, interleave, identity, a list of layers"),
    "width": ("grow", "width growth by any method: hidden_size, intermediate_size, heads, head_dim"),
    "hybrid": ("grow", "depth, width and FFN growth together, to a target size"),
    "experts": ("grow", "upcycle a dense model into a mixture of experts, or add experts"),
    "grow": ("grow", "run a growth recipe (YAML)"),
    "verify": ("verify", "check a grown checkpoint against its source and its plan"),
    "push": ("push", "publish a checkpoint on the Hub"),
    "card": ("card", "write the model card of a grown checkpoint"),
    "inspect": ("inspect", "show what a checkpoint is and what it was grown from"),
    "replay": ("replay", "sample text from a model, to replay it in further training"),
    "fisher": ("fisher", "per-parameter importance (Fisher) on old data, for a penalty (EWC)"),
    "train": ("train", "continued pretraining without forgetting, by a recipe (YAML)"),
    "merge": ("merge", "merge a LoRA adapter, or the shards of an FSDP2 checkpoint, into a plain checkpoint"),
    "demo": ("demo", "train a small model, grow it, go on training; nothing to download"),
}

RESUMABLE = {name for name, (module, _) in COMMANDS.items() if module in ("grow", "train")}

LAUNCHED = {"train", "fisher"}
"""Commands that share their work among the processes of a launcher."""

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
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show is no reason to fail
    started_by_caller = _has_process_group()
    with only_json_on_stdout("--json" in arguments):
        status = _run_reporting_errors(arguments)
    if _has_process_group() and not started_by_caller:
        from hf_grow.training.distributed.launch import close_process_group

        close_process_group(failed=status != 0)
    return status


def _has_process_group() -> bool:
    """Whether torch.distributed is in use; without importing torch."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _run_reporting_errors(arguments: list[str]) -> int:
    try:
        status = run_command(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where a full disk can still be reported
        return status
    except GrowError as error:
        # All processes of a distributed training find the same mistakes; the first of each machine reports them.
        if isinstance(error, InputError) and _env_number("LOCAL_RANK"):
            return error.exit_code
        return _report(error, arguments)
    except KeyboardInterrupt:
        hint = " Repeat the command with --resume to continue." if RESUMABLE & set(arguments[:1]) else ""
        print(file=sys.stderr)
        return _report(GrowError(f"interrupted.{hint}"), arguments)
    except BrokenPipeError:
        _discard_stdout()
        return 1
    except MemoryError:
        return _report(GrowError("out of memory.", hint="Use a smaller --memory-budget, or verify --structure-only."), arguments)
    except OSError as error:
        # Checkpoints and recipes have messages of their own where they are read and written; this is stdout, the caches of libraries, and the like.
        place = error.filename if isinstance(error.filename, str) else "a file, or standard output"
        return _report(GrowError(f"{printable(place)} could not be read or written: {printable(error.strerror or str(error))}."), arguments)


def _report(error: GrowError, arguments: Sequence[str]) -> int:
    print(f"hf-grow: {error}", file=sys.stderr)
    try:
        if "--json" in arguments:
            from hf_grow.cli.commands import print_json

            print_json(error_facts(error))
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        _discard_stdout()
    return error.exit_code


def _discard_stdout() -> None:
    """Discards what is still buffered, so that Python does not try to write it again at exit."""
    with suppress(OSError, AttributeError):  # it may be None, or not a file
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
        description="Grow a trained checkpoint into a larger one, and continue its training.",
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
    started = _world_size()
    if started > 1 and arguments.command not in LAUNCHED:
        raise InputError(
            f"hf-grow {arguments.command} runs in one process, and {started} were started.",
            hint=f"Start it without a launcher; only {' and '.join(sorted(LAUNCHED))} take one.",
        )
    module = importlib.import_module(f"hf_grow.cli.{COMMANDS[arguments.command][0]}")
    if not getattr(module, "OVERRIDES", False):
        reject_unknown_arguments(rest, commands.choices[arguments.command])
    arguments.overrides = rest
    run = module.run_recipe if arguments.command == "grow" else module.run
    return int(run(arguments))


def _env_number(name: str) -> int | None:
    """An environment variable set by a launcher: 0 if it is not set, None if it is not a number."""
    value = os.environ.get(name) or "0"
    return int(value) if value.isascii() and value.isdigit() and len(value) < 10 else None


def _world_size() -> int:
    """The number of processes that a launcher started. Raises InputError for variables that are not numbers; torch and accelerate read them too."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        if _env_number(name) is None:
            raise InputError(f"The environment variable {name} is {os.environ[name]!r}, which is not a number.", hint=f"unset {name}")
    return _env_number("WORLD_SIZE") or 1


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
