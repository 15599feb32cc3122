"""The argument parser: its errors are InputErrors with suggestions."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Sequence
from typing import Any, NoReturn

from hf_grow.common.suggest import closest, did_you_mean
from hf_grow.errors import InputError

GREETING = """\
hf-grow grows a trained checkpoint into a larger one, and continues its training.

The whole workflow on a small model (a few minutes, nothing to download):
  hf-grow demo

With a model of your own, a folder or a Hub id:
  hf-grow inspect MODEL                 architecture, size and provenance
  hf-grow plan MODEL --to 10B           growth options, side by side; reads headers only
  hf-grow dus MODEL --to 10B -o GROWN   one of them (also: depth, width, hybrid, experts)
  hf-grow verify MODEL GROWN            check it
  hf-grow train RECIPE --model GROWN    continue training; then card and push

next: hf-grow plan MODEL --to SIZE, or hf-grow demo. All commands: hf-grow --help; one of them: hf-grow COMMAND --help
"""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message[0].upper()}{message[1:]}{'' if message.endswith('?') else '.'}", hint=f"See {self.prog} --help.")


def one_of(choices: Collection[str]) -> Callable[[str], str]:
    """An argparse type that accepts one of ``choices``."""

    def read(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(choices)}.{did_you_mean(text, choices)}")
        return text

    return read


def check_command(words: Sequence[str], commands: Collection[str], methods: Callable[[], dict[str, str]]) -> str | None:
    """The command in the arguments, or None. Raises InputError for an unknown one.

    ``methods``: returns growth methods without a command of their own -> the command that has them as --method.
    """
    command = next((w for w in words if not w.startswith("-")), None)
    if command is None or command in commands:
        return command
    by_flag = {name: f"{kind} --method {name}" for name, kind in methods().items()}
    near = closest(command, [*commands, *by_flag])
    suggestion = f" Did you mean hf-grow {by_flag.get(near, near)}?" if near else ""
    raise InputError(f"There is no command {command!r}.{suggestion}", hint=f"Commands: {', '.join(commands)}.")


def reject_unknown_arguments(rest: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Raises InputError for arguments that the parser does not know."""
    known = [name for action in parser._actions for name in action.option_strings if name.startswith("--")]
    flags = [w.partition("=")[0] for w in rest if w.startswith("-") and w != "--"]
    if flags:
        lines = [f"{parser.prog} has no {flag}.{did_you_mean(flag, known)}" for flag in dict.fromkeys(flags)]
        raise InputError("\n  ".join(lines), hint=f"See {parser.prog} --help.")
    if rest:
        raise InputError(f"{parser.prog} does not accept: {' '.join(rest)}.", hint=f"See {parser.prog} --help.")


def error_facts(error: Any) -> dict[str, Any]:
    """An error for --json."""
    return {"error": error.message, "hint": error.hint, "status": error.exit_code}
