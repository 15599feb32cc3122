"""`hf-grow verify OLD NEW`: prove that a grown checkpoint is what its plan says."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from hf_grow.api import verify
from hf_grow.checkpoint.provenance import record_text
from hf_grow.checkpoint.reader import GROWTH, Checkpoint, open_folder
from hf_grow.cli import render
from hf_grow.cli.commands import add_json, existing_folder, print_json
from hf_grow.cli.flags import add_flags, given
from hf_grow.cli.report import show_report
from hf_grow.errors import InputError
from hf_grow.options import Excludes, parse
from hf_grow.verification import Report, TaskOptions
from hf_grow.verification.stored_report import kept


class CompareOptions(TaskOptions):
    """How the comparison is made, and what becomes of it."""

    structure_only: bool = False
    """Tables, bytes and digests only; needs no model in memory."""
    text: Annotated[Path | None, Excludes("structure_only")] = None
    """Text to compare the models on; default: a small built-in one."""
    tokens: Annotated[int, Field(ge=2), Excludes("structure_only")] = 2048
    """Compare on at most this many tokens."""
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16", "float64"], Excludes("structure_only")] = "auto"
    """Dtype to compute in."""
    no_record: bool = False
    """Do not write the result into NEW/growth.json."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("old", metavar="OLD", help="the source: folder or Hub id")
    parser.add_argument("new", metavar="NEW", help="the grown checkpoint's folder")
    parser.add_argument("--revision", help="branch, tag or commit of OLD on the Hub; default: the one it was grown from")
    add_flags(parser, [CompareOptions])
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    how = parse(CompareOptions, given(arguments, CompareOptions), where="The command line", strict=False)
    if how.text is not None and not how.text.is_file():
        raise InputError(f"{how.text} is no file.")
    new = open_folder(existing_folder(arguments.new))
    nbytes = sum(t.stop - t.start for t in new.tensors.values())
    with render.bytes_bar("verifying", nbytes, quiet=arguments.json) as progress:
        report = verify(
            arguments.old,
            arguments.new,
            revision=arguments.revision,
            structure_only=how.structure_only,
            text=how.text,
            tokens=how.tokens,
            dtype=how.dtype,
            **given(arguments, TaskOptions),
            progress=progress,
            notify=render.note,
        )
    # A comparison with something else than the source says nothing of this growth, and must not replace what was found before.
    if not how.no_record and all(c.status == "pass" for c in report.checks if c.name == "source"):
        _record(new, report)
    if arguments.json:
        print_json(report.to_json())
    else:
        show_report(report)
    return 0 if report.ok else 1


def _record(new: Checkpoint, report: Report) -> None:
    """Keeps the result in growth.json, where card and inspect find it."""
    if new.growth is None or new.folder is None:
        return
    target = new.folder / GROWTH
    temporary = target.with_suffix(".json.new")
    try:
        temporary.write_text(record_text({**new.growth, "verification": kept(new.growth.get("verification"), report)}), encoding="utf-8")
        os.replace(temporary, target)
    except OSError as error:
        render.note(f"The result could not be recorded in {target}: {error.strerror}.")
