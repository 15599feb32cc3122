"""Helpers that several commands share: common arguments, and printing results."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.text import Text

from hf_grow.cli.render import console
from hf_grow.common.safe_files import error_text, replace_nonfinite, to_json
from hf_grow.errors import ExecutionError, InputError


def add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="checkpoint folder, or Hub id such as mistralai/Mistral-7B-v0.1")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub repository")


def add_json(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--json", action="store_true", help="print one machine-readable result and nothing else")


@contextmanager
def out_of_memory_errors(hint: str) -> Iterator[None]:
    """Turns an out-of-memory error of the accelerator or the machine into an ExecutionError with this hint."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        raise ExecutionError("The accelerator is out of memory.", hint=hint) from None
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):  # the message of torch's CPU allocator
            raise
        raise ExecutionError("This machine is out of memory.", hint=hint) from None


def print_json(data: Any) -> None:
    """Prints one JSON value: NaN and infinity become null, characters that a terminal does not show are escaped."""
    text = to_json(replace_nonfinite(data)).rstrip("\n")
    if not text.isascii():
        unicode = (sys.stdout.encoding or "utf-8").lower().replace("-", "") == "utf8"
        text = "".join(c if c.isascii() or (unicode and c.isprintable()) else json.dumps(c)[1:-1] for c in text)
    print(text.replace("\x7f", "\\u007f"))


def show_next(*words: str | Path) -> None:
    console.print(Text.assemble("next: ", (shlex.join(["hf-grow", *map(str, words)]), "bold")))


def existing_folder(text: str) -> Path:
    """The path of a folder. Raises InputError if it is not a folder or cannot be read."""
    path = Path(text)
    try:
        with os.scandir(path):
            return path
    except (FileNotFoundError, NotADirectoryError, ValueError):
        raise InputError(f"{text} is not a folder.", hint="Give the folder that holds config.json and the weights.") from None
    except OSError as error:
        raise InputError(f"Cannot read {text}: {error_text(error)}.") from None
