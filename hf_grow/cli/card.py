"""`hf-grow card DIR`: the model card of a grown checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from hf_grow.cli import flags, render
from hf_grow.cli.commands import add_json, existing_folder, print_json
from hf_grow.options import parse
from hf_grow.publish.card import CardOptions, make_card, write_card


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="folder of the grown checkpoint; only its growth.json is read")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="where to write the card; default: README.md in DIR")
    flags.add_flags(parser, [CardOptions])
    parser.add_argument("--overwrite", action="store_true", help="replace a card that was edited, or that hf-grow did not write")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    options = parse(CardOptions, flags.given(arguments, CardOptions), where="The command line", strict=False)
    folder = existing_folder(arguments.folder)
    card = make_card(folder, options)
    files = write_card(folder, card, output=arguments.output, overwrite=arguments.overwrite)
    if arguments.json:
        print_json({"files": list(map(str, files)), "metadata": card.metadata, "notes": list(card.notes)})
        return 0
    for file in files:
        render.console.print(f"wrote      {file}", markup=False)
    for note in card.notes:
        render.console.print(f"note       {note}", style="yellow", markup=False)
    return 0
