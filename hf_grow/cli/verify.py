"""`hf-grow verify OLD NEW`: checks a grown checkpoint against its source."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from hf_grow.api import verify
from hf_grow.checkpoint.provenance import format_growth_json
from hf_grow.checkpoint.reader import GROWTH, Checkpoint, open_folder
from hf_grow.cli import render
from hf_grow.cli.commands import add_json, existing_folder, print_json
from hf_grow.cli.flags import add_flags, given
from hf_grow.cli.report import show_report
from hf_grow.errors import InputError
from hf_grow.options import Excludes, parse
from hf_grow.verification import Report, TaskOptions
from hf_grow.verification.report import merge_verification


class CompareOptions(TaskOptions):
    """Options of the comparison."""

    structure_only: bool = False
    """Check only structure, bytes and digests; loads no model."""
    text: Annotated[Path | None, Excludes("structure_only")] = None
    """Text file to compare the models on; default: a small built-in text."""
    tokens: Annotated[int, Field(ge=2), Excludes("structure_only")] = 2048
    """Compare on at most this many tokens."""
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16", "float64"], Excludes("structure_only")] = "auto"
    """Dtype of the computation."""
    no_record: bool = False
    """Do not store the result in NEW/growth.json."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("old", metavar="OLD", help="source checkpoint: folder or Hub id")
    parser.add_argument("new", metavar="NEW", help="folder of the grown checkpoint")
    parser.add_argument("--revision", help="branch, tag or commit of OLD on the Hub; default: the commit NEW was grown from")
    add_flags(parser, [CompareOptions])
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    options = parse(CompareOptions, given(arguments, CompareOptions), where="The command line", strict=False)
    if options.text is not None and not options.text.is_file():
        raise InputError(f"{options.text} is not a file.")
    new = open_folder(existing_folder(arguments.new))
    nbytes = sum(t.stop - t.start for t in new.tensors.values())
    with render.bytes_bar("verifying", nbytes, quiet=arguments.json) as progress:
        report = verify(
            arguments.old,
            arguments.new,
            revision=arguments.revision,
            structure_only=options.structure_only,
            text=options.text,
            tokens=options.tokens,
            dtype=options.dtype,
            **given(arguments, TaskOptions),
            progress=progress,
            notify=render.note,
        )
    # A comparison with a different source must not replace an earlier result.
    if not options.no_record and all(c.status == "pass" for c in report.checks if c.name == "source"):
        _store(new, report)
    if arguments.json:
        print_json(report.to_json())
    else:
        show_report(report)
    return 0 if report.ok else 1


def _store(new: Checkpoint, report: Report) -> None:
    """Stores the result in growth.json, for the model card and `inspect`."""
    if new.growth is None or new.folder is None:
        return
    target = new.folder / GROWTH
    temporary = target.with_suffix(".json.new")
    try:
        temporary.write_text(
            format_growth_json({**new.growth, "verification": merge_verification(new.growth.get("verification"), report)}), encoding="utf-8"
        )
        os.replace(temporary, target)
    except OSError as error:
        render.note(f"The result could not be stored in {target}: {error.strerror}.")
