"""`hf-grow push DIR REPO`: publish a finished checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.table import Table

from hf_grow.checkpoint.writer import Progress
from hf_grow.cli import flags, render
from hf_grow.cli.commands import add_json, existing_folder, print_json
from hf_grow.common.units import format_bytes
from hf_grow.errors import ExecutionError
from hf_grow.options import Options, parse
from hf_grow.publish.manifest import Manifest, make_manifest
from hf_grow.publish.push import Destination, PushResult, card_additions, push, retry_hint, uploaded_weights


class PushOptions(Options):
    """Options of `push`."""

    private: bool = False
    """Make the repository private; refused if a public one exists."""
    revision: str | None = None
    """Branch to commit to, created if needed; or refs/pr/N."""
    create_pr: bool = False
    """Open a pull request instead of committing; needs no write permission."""
    message: str | None = None
    """First line of the commit message. Default: method and source."""
    dry_run: bool = False
    """List what would be uploaded, and upload nothing."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="checkpoint folder, as hf-grow or save_pretrained writes it")
    parser.add_argument("repo", metavar="REPO", help="repository on the Hub, OWNER/NAME; NAME alone is one of your account")
    flags.add_flags(parser, [PushOptions])
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    options = parse(PushOptions, flags.given(arguments, PushOptions), where="The command line", strict=False)
    folder = existing_folder(arguments.folder)
    to = Destination(arguments.repo, options.private, options.revision, options.create_pr, options.message)
    manifest = make_manifest(folder)
    if options.dry_run:
        return _dry_run(manifest, to, as_json=arguments.json)
    with publishing_bar(manifest, to, quiet=arguments.json) as progress:
        pushed = push(manifest, to, progress=progress, notify=render.note)
    if arguments.json:
        print_json(pushed_facts(pushed))
    else:
        show_pushed(pushed)
    return 0


@contextmanager
def publishing_bar(manifest: Manifest, to: Destination, *, quiet: bool) -> Iterator[Progress]:
    """A progress bar for `push`: it counts the bytes checked, and pulses while huggingface_hub sends all files at once. An interruption inside
    becomes an ExecutionError that says how to continue."""
    if manifest.left_out:
        render.note(f"Left out: {', '.join(manifest.left_out)}.")
    try:
        with render.bytes_bar("checking", manifest.weight_nbytes, quiet=quiet, then="sending") as progress:
            yield progress
    except KeyboardInterrupt:
        raise ExecutionError("Interrupted while publishing.", hint=retry_hint(manifest.folder, to)) from None


def pushed_facts(pushed: PushResult) -> dict[str, Any]:
    return {
        "repository": pushed.repo,
        "url": pushed.url,
        "commit": pushed.commit,
        "pull_request": pushed.pull_request,
        "files": pushed.files,
        "bytes": pushed.nbytes,
    }


def show_pushed(pushed: PushResult) -> None:
    where = pushed.pull_request or f"{pushed.url} at {pushed.commit[:12]}"
    render.console.print(f"pushed     {pushed.files} files, {format_bytes(pushed.nbytes)}: {where}", markup=False)


def _dry_run(manifest: Manifest, to: Destination, *, as_json: bool) -> int:
    with render.bytes_bar("checking", manifest.weight_nbytes, quiet=as_json) as progress:
        uploaded = uploaded_weights(manifest, to, progress)
    generated = [a.path_in_repo for a in card_additions(manifest.folder, manifest.files, to.repo, render.note)]
    sizes = {name: path.stat().st_size for name, path in manifest.files.items()}
    missing = sum(size for name, size in sizes.items() if name not in (uploaded or ()))
    if as_json:
        print_json(
            {
                "dry_run": True,
                "repository": to.repo,
                "exists": uploaded is not None,
                "files": sizes,
                "there_already": sorted(uploaded or ()),
                "bytes": missing,
                "left_out": list(manifest.left_out),
            }
        )
        return 0
    table = Table(
        title=f"push: {manifest.folder} to {to.repo}{'' if uploaded is not None else ' (new)'}", title_justify="left", title_style="bold"
    )
    for column in ("file", "size", ""):
        table.add_column(column, justify="right" if column == "size" else "left", overflow="fold")
    for name, size in sizes.items():
        table.add_row(name, format_bytes(size), "there already" if name in (uploaded or ()) else "")
    for name in generated:
        table.add_row(name, "", "written from growth.json")
    render.console.print(table)
    for name in manifest.left_out:
        render.console.print(f"left out   {name}", markup=False)
    for warning in manifest.warnings:
        render.note(warning)
    render.console.print(f"to send    at most {format_bytes(missing)} (nothing sent: --dry-run)", markup=False)
    return 0
